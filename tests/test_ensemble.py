"Several models asked as one: what they agree on, who is held out, what is fitted to the mean, and the command."

import shutil

import numpy as np
import pandas as pd
import pytest

from ich_fastai.core import InputError, read_run_file, read_stage, save_json, save_table
from ich_fastai.ensemble import average_predictions, check_alike, join_models, open_models
from ich_fastai.evaluate import evaluate
from ich_fastai.labels import LOGITS
from ich_fastai.model import load_model


@pytest.fixture(scope="module")
def runs(simulated_run, write_predictions, tmp_path_factory):
    "Two runs that hold out the same fold: the same network, logits that differ by noise; the second kept fewer slices."
    home, cohort = tmp_path_factory.mktemp("runs"), pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(simulated_run, cohort[cohort["fold"] == 0], [0])
    for name, seed in (("a", 0), ("b", 1)):
        table = pd.read_parquet(simulated_run / "predictions.parquet")
        table[LOGITS] += np.random.default_rng(seed).normal(0, 1, (len(table), 6)) * seed
        (home / name).mkdir()
        save_table(table.assign(keep_rate=0.4 if name == "a" else 0.1), home / name / "predictions.parquet")
        shutil.copytree(simulated_run / "model", home / name / "model")
        shutil.copy(simulated_run / "cohort.parquet", home / name)
        evaluate(home / name, n_boot=5)
    return home / "a" / "model", home / "b" / "model"


def test_calibration_and_thresholds_are_the_means_own(runs, tmp_path):
    model = load_model(join_models(runs, tmp_path), "cpu")
    evaluate(tmp_path, n_boot=5)  # as notebook 22 would fit a run of the mean
    again, single = (read_run_file(folder / "model.json") for folder in (tmp_path / "model", runs[0]))
    assert model.card["thresholds"] == again["thresholds"] and model.card["corrections"] == again["corrections"]
    assert model.card["thresholds"]["slice"] != single["thresholds"]["slice"]
    assert model.card["corrections"]["keep_rate"] == pytest.approx(0.2)  # a mean of logits: the geometric mean
    assert len(model.network.networks) == 2
    assert read_stage(tmp_path, "cohort.parquet")["PatientID"].ne("").all(), "of whom a validation must ask"


def test_only_patients_that_none_has_seen_speak(runs, tmp_path):
    table = pd.read_parquet(runs[1].parent / "predictions.parquet")
    patients = sorted(set(table["PatientID"]))
    (tmp_path / "model").mkdir()
    card = read_run_file(runs[1] / "model.json")
    save_json(card, tmp_path / "model" / "model.json", checked=True)
    save_table(table[table["PatientID"] != patients[0]], tmp_path / "predictions.parquet")
    mean = average_predictions([runs[0].parent, tmp_path])
    assert sorted(set(mean["PatientID"])) == patients[1:]
    save_json(card | {"training": {"folds": [{"fold": 1}]}}, tmp_path / "model" / "model.json", checked=True)
    with pytest.raises(InputError, match="no patient was held out by all of these models"):
        average_predictions([runs[0].parent, tmp_path])


@pytest.mark.parametrize("what", ["labels", "windows", "image_size", "geometry", "cache_size", "smooth", "networks"])
def test_models_that_see_otherwise_are_refused(runs, what):
    card = read_run_file(runs[0] / "model.json")
    other = card | {what: ["x", "y"]}
    if what in ("windows", "image_size"):
        other = card | {"settings": card["settings"] | {what: 1}}
    with pytest.raises(InputError, match="networks of several folds" if what == "networks" else f"another {what}") as e:
        check_alike({"a": card, "b": other})
    assert "\n" not in str(e.value)


def test_a_name_that_is_no_model_is_one_line(runs, tmp_path):
    with pytest.raises(InputError, match="nowhere/model.json: not there") as e, open_models(f"{runs[0]},nowhere"):
        pass
    assert "\n" not in str(e.value)
    (tmp_path / "a,b").mkdir()
    with open_models(tmp_path / "a,b") as folder:
        assert folder == tmp_path / "a,b"
