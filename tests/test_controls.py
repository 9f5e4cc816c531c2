"""Does it see the blood? What knows only the height falls to one half, and so does what reads blood, painted over."""

import json
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from ich_fastai import controls as room
from ich_fastai.cache import open_cache
from ich_fastai.controls import controls, find_blobs, paint_cache, paint_over, same_height_auc, series_height
from ich_fastai.labels import LABELS
from ich_fastai.metrics import draw_patients
from ich_fastai.phantom import read_mask
from ich_fastai.tiny import tiny_cohort, tiny_phantom


def test_equal_to_a_count_of_all_pairs_in_every_draw():
    rng = np.random.default_rng(1)
    y, score, height = rng.integers(2, size=200), rng.integers(6, size=200), rng.random(200)
    patient, draws = draw_patients(rng.integers(15, size=200), 30)
    level = np.minimum(height * 10, 9).astype(int)
    for found, draw in zip(same_height_auc(y, score, height, patient, draws), draws, strict=True):
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
    rows = room.auc_rows(y, {"network": -np.abs(height - 0.5)}, height, patients, n_boot=20)
    bare, same = (row["value"] for row in rows)
    assert bare > 0.85 and abs(same - 0.5) < 0.05


@pytest.mark.parametrize(
    ("y", "height", "patients", "note"),
    [
        ([0, 0, 0], [0.1, 0.5, 0.9], [1, 2, 3], "undefined: no positive"),
        ([1, 0, 0], [0.1, 0.5, 0.9], [1, 2, 3], room.NO_PAIR),
        ([1], [0.5], [1], "undefined: no negative"),
        ([1, 0], [0.5, 0.5], [1, 1], "one patient: no interval"),
    ],
)
def test_what_is_undefined_says_why(y, height, patients, note):
    score = np.arange(len(y), dtype=float)
    row = room.auc_rows(np.array(y), {"network": score}, np.array(height), np.array(patients), n_boot=5)[1]
    assert row["note"] == note and (row["value"] is None) == note.startswith("undefined")


def test_a_series_of_one_slice_lies_in_the_middle():
    assert series_height(pd.DataFrame({"SeriesInstanceUID": ["a"], "position": [0]})).tolist() == [0.5]


def test_painting_leaves_no_blood_where_the_mask_was():
    run_dir, data_dir = tiny_cohort(), tiny_phantom()
    cohort = pd.read_parquet(run_dir / "cohort.parquet").query("any == 1")
    before = open_cache(run_dir / "cache").gather(cohort["address"].to_numpy())
    after, loose = paint_cache(run_dir, data_dir).gather(cohort["address"].to_numpy()), room.FAINT
    masks = [read_mask(data_dir, uid) > 0 for uid in cohort["SOPInstanceUID"]]
    masks = np.array([cv2.resize(m.astype(np.float32), (256, 256), interpolation=cv2.INTER_AREA) > 0 for m in masks])
    was, left = ((find_blobs(hu, **loose) & masks).sum() for hu in (before, after))
    assert was > 1000 and left <= 0.01 * was
    near = np.array([cv2.dilate(m.astype(np.uint8), np.ones((9, 9), np.uint8)) for m in masks])
    assert (before == after)[near == 0].all()


def test_what_reads_blood_falls_to_one_half_when_it_is_painted_over(monkeypatch, simulated_run, write_predictions):
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(simulated_run, cohort[cohort["fold"] < 2], (0,))
    rows = cohort[cohort["fold"] == 0]

    def network(x):  # the number of pixels as dense as blood
        return ((x > 0.3) & (x < 0.9)).float().flatten(1).sum(1)[:, None].expand(-1, len(LABELS))

    model = SimpleNamespace(network=network, settings=room_settings(simulated_run), device=torch.device("cpu"))
    monkeypatch.setattr("ich_fastai.model.load_model", lambda *_: model)
    calls = {}
    for name, cache in (("as it is", open_cache(simulated_run / "cache")), ("same", paint_cache(simulated_run))):
        calls[name] = room.predict_painted(simulated_run, rows, cache)[:, -1]
    assert calls["same"].mean() < calls["as it is"].mean()


def room_settings(run_dir):
    from ich_fastai.batches import Settings

    return Settings(**json.loads((run_dir / "model" / "model.json").read_text())["settings"])


@pytest.mark.parametrize("which", ["no positive", "one patient", "one slice"])
def test_the_stage_survives_too_little_data(simulated_run, write_predictions, too_little, tmp_path, which):
    shutil.copytree(simulated_run, tmp_path / "run")
    rows = too_little(pd.read_parquet(simulated_run / "cohort.parquet"), which)
    write_predictions(tmp_path / "run", rows, (rows["fold"].iloc[0],))
    table = controls(tmp_path / "run", None, n_boot=5)
    assert table.loc[table["value"].isna(), "note"].str.len().gt(0).all()
    assert (tmp_path / "run" / "tables" / "blood.csv").is_file()


def test_the_rule_and_the_paint_agree_on_pictures_of_8_bits():
    y, x = np.mgrid[:256, :256] - 127.5
    r = np.hypot(y, x)
    head = np.select([r < 80, r < 90], [35, 900], -1000).astype(np.int16)
    head[100:120, 100:120] = 65
    cut = np.clip(head, -20, 100)
    assert (find_blobs(head[None]) == find_blobs(cut[None])).all() and find_blobs(head[None]).any()
    assert not find_blobs(paint_over(cut[None], find_blobs(cut[None]))).any()
