"""Does it see the blood? What knows only the height falls to one half, and so does what reads blood, painted over."""

import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from ich_fastai.cache import Cache
from ich_fastai.controls import FAINT, auc_at_same_position, control_rows, controls, find_blobs, paint_over
from ich_fastai.controls import header_scores, relative_height, true_masks
from ich_fastai.metrics import draw_patients
from ich_fastai.phantom import read_mask
from ich_fastai.tiny import tiny_cohort, tiny_phantom


def test_equal_to_a_count_of_all_pairs_in_every_draw():
    rng = np.random.default_rng(1)
    y, score, height = rng.integers(2, size=200), rng.integers(6, size=200), rng.random(200)
    patient, draws = draw_patients(rng.integers(15, size=200), 30)
    level = np.minimum(height * 10, 9).astype(int)
    for found, draw in zip(auc_at_same_position(y, score, height, patient, draws), draws, strict=True):
        right = pairs = 0
        for i in np.flatnonzero(y == 1):
            for j in np.flatnonzero((y == 0) & (level == level[i])):
                weight = draw[patient[i]] * draw[patient[j]]
                pairs += weight
                right += weight * ((score[i] > score[j]) + (score[i] == score[j]) / 2)
        assert abs(found - right / pairs) < 1e-12


def test_what_knows_only_the_height_is_worth_nothing_at_the_same_height():
    rng = np.random.default_rng(2)
    height, patients = rng.random(6000), rng.integers(100, size=6000)
    level = (height * 10).astype(int)
    y = (rng.random(6000) < 0.9 * np.exp(-(((level - 4.5) / 2) ** 2))).astype(int)
    rows = control_rows("any", y, {"network": -np.abs(height - 0.5)}, height, *draw_patients(patients, 20))
    bare, same = (row["value"] for row in rows)
    assert bare > 0.85 and abs(same - 0.5) < 0.05


@pytest.mark.parametrize(
    ("y", "height", "patients", "note"),
    [
        ([0, 0, 0], [0.1, 0.5, 0.9], [1, 2, 3], "undefined: no positive"),
        ([1, 0, 0], [0.1, 0.5, 0.9], [1, 2, 3], "undefined: no pair at the same position"),
        ([1], [0.5], [1], "undefined: no negative"),
        ([1, 0], [0.5, 0.5], [1, 1], "one patient: no interval"),
    ],
)
def test_what_is_undefined_says_why(y, height, patients, note):
    score = np.arange(len(y), dtype=float)
    row = control_rows("any", np.array(y), {"network": score}, np.array(height), *draw_patients(patients, 5))[1]
    assert row["note"] == note and (row["value"] is None) == note.startswith("undefined")


def test_where_no_header_is_known_there_is_no_score_of_headers():
    cohort, slices = (pd.read_parquet(tiny_cohort() / f"{name}.parquet") for name in ("cohort", "slices"))
    cohort = cohort.set_index("SOPInstanceUID", drop=False)
    rows = cohort[cohort["fold"] == 0]
    assert np.isfinite(header_scores(slices, cohort, rows)).all()
    assert np.isnan(header_scores(slices.assign(BitsStored=pd.NA), cohort, rows)).all()


def test_a_series_of_one_slice_lies_in_the_middle():
    assert relative_height(pd.DataFrame({"SeriesInstanceUID": ["a"], "position": [0]})).tolist() == [0.5]


@pytest.fixture(scope="module")
def phantom_slices():
    "Rows of the tiny cohort, their HU, and those painted over by the true masks."
    run_dir, data_dir = tiny_cohort(), tiny_phantom()
    rows = pd.read_parquet(run_dir / "cohort.parquet")
    hu = Cache(run_dir / "cache").gather(rows["address"].to_numpy())
    masks = true_masks(data_dir, rows["SOPInstanceUID"], hu.shape[-1])
    return rows, hu, masks, paint_over(hu, masks)


def test_painting_leaves_no_blood_where_the_mask_was(phantom_slices):
    rows, before, masks, after = (a[phantom_slices[0]["any"].to_numpy() == 1] for a in phantom_slices)
    for uid, mask in zip(rows["SOPInstanceUID"], masks, strict=True):
        true = (read_mask(tiny_phantom(), uid) > 0).astype(np.float32)
        assert ((cv2.resize(true, mask.shape, interpolation=cv2.INTER_AREA) > 0) == mask).all()
    was, left = ((find_blobs(hu, **FAINT) & masks).sum() for hu in (before, after))
    assert was > 1000 and left <= 0.01 * was
    near = np.array([cv2.dilate(m.astype(np.uint8), np.ones((9, 9), np.uint8)) for m in masks])
    assert (before == after)[near == 0].all()


def test_normal_slices_are_painted_too_so_that_the_paint_tells_nothing(phantom_slices):
    rows, before, masks, after = phantom_slices
    assert masks.any((1, 2)).all()
    changed = (before != after).any((1, 2))
    assert changed[rows["any"] == 0].mean() > 0.5 < changed[rows["any"] == 1].mean()


def test_what_reads_blood_falls_to_one_half_when_it_is_painted_over(phantom_slices):
    rows, before, _, after = phantom_slices
    areas = (find_blobs(hu).sum((1, 2)) for hu in (before, after))
    was, left = (roc_auc_score(rows["any"], area) for area in areas)
    assert was > 0.7 and abs(left - 0.5) < 0.1, (was, left)


@pytest.mark.parametrize("which", ["no positive", "one patient", "one slice"])
def test_the_controls_survive_too_little_data(simulated_run, write_predictions, too_little, tmp_path, which):
    shutil.copytree(simulated_run, tmp_path / "run")
    rows = too_little(pd.read_parquet(simulated_run / "cohort.parquet"), which)
    write_predictions(tmp_path / "run", rows, (rows["fold"].iloc[0],))
    table = controls(tmp_path / "run", None, n_boot=5)
    assert table.loc[table["value"].isna(), "note"].str.len().gt(0).all()
    assert (tmp_path / "run" / "tables" / "controls_short.csv").is_file()


def test_the_rule_and_the_paint_agree_on_pictures_of_8_bits():
    y, x = np.mgrid[:256, :256] - 127.5
    r = np.hypot(y, x)
    head = np.select([r < 80, r < 90], [35, 900], -1000).astype(np.int16)
    head[100:120, 100:120] = 65
    cut = np.clip(head, -20, 100)
    assert (find_blobs(head[None]) == find_blobs(cut[None])).all() and find_blobs(head[None]).any()
    assert not find_blobs(paint_over(cut[None], find_blobs(cut[None]))).any()
