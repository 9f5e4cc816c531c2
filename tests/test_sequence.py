"""The slices of a series read together, by a mean and by a network: ends, gaps, order, series and patients apart."""

import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit

from ich_fastai.arms import read_arms
from ich_fastai.batches import SliceBatches
from ich_fastai.cache import Cache
from ich_fastai.calibrate import correct_logits, order_logits, score_levels, to_logits
from ich_fastai.core import InputError, read_stage
from ich_fastai.imbalance import compare_arms
from ich_fastai.labels import LOGITS
from ich_fastai.model import load_model, predict_logits
from ich_fastai.predict import find_inputs, score_stack
from ich_fastai.recurrent import SeriesNetwork, add_network, cross_fit_series, make_scans, masked_loss, run_network
from ich_fastai.sequence import ADDED, read_together, read_unseen, series_logits, smooth_logits
from ich_fastai.tiny import tiny_cohort


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
    assert np.array_equal(series_logits(predictions), predictions[LOGITS].to_numpy(float))


@pytest.mark.parametrize("smooth", [-0.1, 1.5, True, float("nan")])
def test_a_weight_that_is_none_is_one_line(stage, smooth):
    with pytest.raises(InputError, match=f"smooth={smooth}: must be 0.0 to 1.0") as error:
        read_together(stage, smooth)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def read_run(tmp_path_factory, write_predictions):
    "A run of one fold, 12 patients, whose series a recurrent network reads; its predictions are its network's own."
    run_dir = tmp_path_factory.mktemp("read")
    shutil.copytree(tiny_cohort() / "cache", run_dir / "cache")
    cohort = pd.read_parquet(tiny_cohort() / "cohort.parquet").assign(fold=0)
    cohort.to_parquet(run_dir / "cohort.parquet")
    write_predictions(run_dir, cohort, [0])
    table, model = pd.read_parquet(run_dir / "predictions.parquet"), load_model(run_dir / "model", "cpu")
    batches = SliceBatches(cohort, run_dir / "cache", model.settings, train=False)
    with torch.no_grad():
        table[LOGITS] = torch.cat([model.network(x) for x, _ in batches]).numpy()
    table.to_parquet(run_dir / "predictions.parquet")
    read_together(run_dir, 0.33)
    return run_dir, add_network(run_dir, 8)


def make_some_scans(n_features=5):
    rng = np.random.default_rng(3)
    series, z = np.repeat(list("abc"), [4, 10, 16]), np.concatenate([5.0 * np.arange(n) for n in (4, 10, 16)])
    return make_scans(rng.normal(size=(30, 6)), rng.normal(size=(30, n_features)), series, z, 0.33)


def test_a_recurrent_network_starts_as_the_mean_to_the_last_bit_and_padding_changes_nothing():
    scans, network = make_some_scans(), SeriesNetwork(5, 16, 8)
    assert np.array_equal(scans.base + run_network(network, scans), scans.base)
    torch.nn.init.normal_(network.say[1].weight)
    together, alone = (run_network(network, scans, batch=n) for n in (3, 1))
    assert np.allclose(together, alone, atol=1e-6) and abs(together).max() > 0.1
    logits, y = torch.randn(2, 5, 6), torch.randint(0, 2, (2, 5, 6)).float()
    y[1, 3:] = -1
    rows = torch.cat([logits[0], logits[1, :3]]), torch.cat([y[0], y[1, :3]])
    assert torch.allclose(masked_loss(logits, y, 0.3), masked_loss(*rows, 0.3))


def test_a_patient_is_read_by_a_network_that_has_not_seen_it():
    scans = make_some_scans()
    scans = scans._replace(groups=[np.flatnonzero(np.arange(30) // 2 == k) for k in range(15)])
    patients, y = np.arange(30) // 2, np.random.default_rng(0).integers(0, 2, (30, 6))
    added, part, network, _ = cross_fit_series(scans, y, patients, 4, steps=20)
    for k in range(4):
        mine = part == k
        other = cross_fit_series(scans, np.where(mine[:, None], 1 - y, y), patients, 4, steps=20)[0]
        assert np.array_equal(other[mine], added[mine]) and not np.array_equal(other, added)
    assert np.array_equal(run_network(network, scans)[part == 0], added[part == 0]), "the first part's is kept"


def test_the_model_folder_holds_both_networks_and_predicts_as_the_stage_did(read_run):
    run_dir, table = read_run
    model, unseen = load_model(run_dir / "model", "cpu"), read_unseen(run_dir)
    assert model.card["recurrent"]["units"] == 8 and set(unseen["part"]) == {0} < set(table["part"])
    assert abs(unseen[ADDED].to_numpy()).max() > 0.01, "it does add something"
    cohort, cache = pd.read_parquet(run_dir / "cohort.parquet").set_index("SOPInstanceUID"), Cache(run_dir / "cache")
    for _, rows in unseen.groupby("SeriesInstanceUID"):
        rows = rows.sort_values("z_mm")
        stack = SimpleNamespace(hu=cache.gather(cohort.loc[rows["SOPInstanceUID"], "address"].to_numpy()), step=1)
        assert np.allclose(score_stack(model, stack, rows["z_mm"]), series_logits(rows), atol=1e-3)
        stack.step = 0
        alone = score_stack(model, stack, rows["z_mm"])
        assert np.array_equal(alone, predict_logits(model, stack.hu, find_inputs(len(rows), 1, 0))), "no order known"


def test_what_is_calibrated_on_has_not_been_seen_by_either_network(read_run):
    level = score_levels(read_run[1])["slice"]
    assert np.array_equal(level.fold, 1000 * read_run[1]["part"])


@pytest.mark.parametrize("read_with", [lambda run_dir: read_together(run_dir, 0.33), add_network], ids=["13", "17"])
def test_without_a_recurrent_network_nothing_of_it_stays(read_run, tmp_path, read_with):
    run_dir = tmp_path / "run"
    shutil.copytree(read_run[0], run_dir)
    read_with(run_dir)
    table, card = read_stage(run_dir, "predictions.parquet"), read_stage(run_dir, "model/model.json")
    assert not {"part", *ADDED} & set(table) and not (run_dir / "model" / "recurrent.safetensors").exists()
    assert "recurrent" not in card and card["smooth"] == 0.33 and set(table["smooth"]) == {0.33}
    assert not load_model(run_dir / "model").recurrent


def test_a_recurrent_network_is_fitted_again_as_at_first_and_an_earlier_one_goes(read_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(read_run[0], run_dir)
    assert add_network(run_dir, 8).equals(read_run[1]), "not on top of what the first one added"
    again, first = (load_model(folder / "model", "cpu") for folder in (run_dir, read_run[0]))
    assert again.card == first.card and all(torch.equal(again.recurrent[k], w) for k, w in first.recurrent.items())


@pytest.mark.parametrize("units, why", [(-1, "must be 0 to 1024"), (True, "must be 0 to 1024"), (8, "train one")])
def test_a_recurrent_network_that_cannot_be_is_one_line(stage, units, why):
    with pytest.raises(InputError, match=f"recurrent={units}: .*{why}") as error:
        add_network(stage, units)
    assert "\n" not in str(error.value)
