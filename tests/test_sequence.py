"""The slices of a series read together: ends, gaps, order, series apart, nothing invented, and what carries it."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from ich_fastai.arms import read_arms
from ich_fastai.calibrate import correct_logits, order_logits, score_levels, to_logits
from ich_fastai.core import InputError, read_stage
from ich_fastai.imbalance import compare_arms
from ich_fastai.labels import LABELS, LOGITS
from ich_fastai.sequence import read_together, series_logits, smooth_logits


@pytest.fixture
def scans():
    "Logits, series and positions of 30 slices of three series of unequal length, in random order."
    rng = np.random.default_rng(0)
    series = np.repeat(["a", "b", "c"], [4, 10, 16])
    z = np.concatenate([5.0 * np.arange(n) for n in (4, 10, 16)])
    order = rng.permutation(30)
    return rng.normal(size=(30, 6)), series[order], z[order]


def by_hand(x, series, z, weight):
    "The same by a loop over slices."
    out = np.empty_like(x)
    for i in range(len(x)):
        pairs = [(1.0, x[i])]
        for side in (z < z[i], z > z[i]):
            here = np.flatnonzero((series == series[i]) & side)
            if len(here):
                pairs.append((weight, x[here[np.abs(z[here] - z[i]).argmin()]]))
        out[i] = sum(w * v for w, v in pairs) / sum(w for w, _ in pairs)
    return out


def test_the_mean_is_that_of_a_loop_whatever_the_order_of_the_rows(scans):
    x, series, z = scans
    smooth = smooth_logits(x, series, z, 1 / 3)
    assert np.allclose(smooth, by_hand(x, series, z, 1 / 3)) and not np.allclose(smooth, x)
    order = np.random.default_rng(1).permutation(len(x))
    assert np.array_equal(smooth_logits(x[order], series[order], z[order], 1 / 3), smooth[order])


def test_ends_gaps_single_slices_and_no_weight():
    x = np.array([[0.0], [4.0], [8.0]])
    assert smooth_logits(x, ["a"] * 3, [0, 5, 10], 1.0).ravel().tolist() == [2, 4, 6]
    assert smooth_logits(x, ["a"] * 3, [0, 5, 30], 1.0).ravel().tolist() == [2, 2, 8], "25 mm is a gap"
    assert np.array_equal(smooth_logits(x, ["a", "b", "c"], [0, 5, 10], 1.0), x)
    assert np.array_equal(smooth_logits(x, ["a"] * 3, [0, 5, 10], 0.0), x)
    assert smooth_logits(np.empty((0, 6)), [], [], 1.0).shape == (0, 6)


def test_two_series_never_mix(scans):
    x, series, z = scans
    changed = np.where((series == "b")[:, None], 100.0, x)
    same = series != "b"
    assert np.array_equal(smooth_logits(x, series, z, 0.5)[same], smooth_logits(changed, series, z, 0.5)[same])


def test_slices_at_one_position_are_one_neighbor():
    x, z = np.array([[0.0], [2.0], [4.0], [9.0]]), [0, 5, 5, 10]
    assert smooth_logits(x, ["a"] * 4, z, 1.0).ravel().tolist() == [1.5, 11 / 3, 13 / 3, 6]


def test_what_is_not_known_spreads_nowhere_and_is_not_invented():
    x = np.array([[0.0, 0.0], [np.nan, 3.0], [6.0, 6.0], [1.0, 1.0], [2.0, 2.0]])
    series, z = pd.Series(["a", "a", "a", "a", None]), pd.Series([0, 5, 10, np.nan, 7])
    smooth = smooth_logits(x, series, z, 1.0)
    assert np.isnan(smooth[1, 0]) and np.isfinite(smooth).sum() == 9
    assert smooth[[0, 2], 0].tolist() == [0, 6] and smooth[:3, 1].tolist() == [1.5, 3, 4.5]
    assert np.array_equal(smooth[3:], x[3:]), "no position, no series: no neighbors"


def test_before_or_after_the_correction_is_the_same_for_any_and_without_undersampling_for_all(scans):
    x, series, z = scans
    first, then = (to_logits(smooth_logits(x, series, z, 0.3), r) for r in (1.0, 0.2))
    assert np.allclose(first, smooth_logits(to_logits(x, 1.0), series, z, 0.3))
    after = smooth_logits(to_logits(x, 0.2), series, z, 0.3)
    assert np.allclose(then[:, -1], after[:, -1]) and not np.allclose(then, after)


@pytest.fixture
def stage(simulated_run, write_predictions):
    "A run with simulated predictions of two folds, and the same as an arm of one seed."
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    for folder in (simulated_run, simulated_run / "arms" / "none+none" / "seed-42"):
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(folder, cohort[cohort["fold"] < 2], [0, 1])
    return simulated_run


def test_the_stage_keeps_the_networks_logits_and_says_how_they_are_read(stage):
    was = pd.read_parquet(stage / "predictions.parquet")
    for _ in range(2):  # a second time changes nothing
        read_together(stage, 0.5)
        now = pd.read_parquet(stage / "predictions.parquet")
        assert now[was.columns].equals(was)
        assert list(now.columns.difference(was.columns)) == ["SeriesInstanceUID", "smooth", "z_mm"]
        assert read_stage(stage, "model/model.json")["smooth"] == 0.5
    expected = smooth_logits(now[LOGITS], now["SeriesInstanceUID"], now["z_mm"], 0.5)
    assert np.allclose(series_logits(now), expected) and not np.allclose(expected, now[LOGITS])
    arm, seed, of_arm = next(read_arms(stage))
    assert (arm, seed) == ("none+none", 42) and np.allclose(series_logits(of_arm), expected)


def test_evaluation_and_comparison_read_the_series_together(stage):
    predictions = read_together(stage, 0.5)
    x = series_logits(predictions)
    assert np.allclose(correct_logits(predictions), to_logits(x, 0.4))
    level = score_levels(predictions)["slice"]
    assert np.allclose(level.raw, expit(x)) and np.allclose(level.x, order_logits(to_logits(x, 0.4)))
    alone = score_levels(read_together(stage, 0))["slice"]
    assert np.allclose(alone.raw, expit(predictions[LOGITS]))
    as_read = predictions.assign(**dict(zip(LOGITS, x.T, strict=True)), smooth=0.0)
    a, b = (compare_arms([("none+none", 42, table)], n_boot=5) for table in (predictions, as_read))
    assert all(
        np.array_equal(a.values["none+none"][kind]["any"]["auc"], b.values["none+none"][kind]["any"]["auc"])
        for kind in ("raw", "corrected")
    )


def test_predictions_of_before_are_read_slice_by_slice(stage):
    predictions = read_together(stage, 0.5).drop(columns=["SeriesInstanceUID", "z_mm", "smooth"])
    assert np.array_equal(series_logits(predictions), predictions[LOGITS].to_numpy(float)) and len(LABELS) == 6


@pytest.mark.parametrize("smooth", [-0.1, 1.5, True, float("nan")])
def test_a_weight_that_is_none_is_one_line(stage, smooth):
    with pytest.raises(InputError, match=f"smooth={smooth}: must be 0.0 to 1.0") as error:
        read_together(stage, smooth)
    assert "\n" not in str(error.value)
