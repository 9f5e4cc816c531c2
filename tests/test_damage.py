"""Each file of a run, damaged in each way, read by what reads it: one line that names it, or the very same result."""

import contextlib
import io
import json
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PROJECT
from damage import DAMAGE, damage_file
from dicom_files import HEAD, make_file
from safetensors.torch import save_file

from ich_fastai.arms import read_arms
from ich_fastai.cache import Cache
from ich_fastai.cohort import describe_data, make_cohort
from ich_fastai.core import MARKED, InputError, read_stage, save_captioned, save_json, save_table, write_checked
from ich_fastai.deliver import ich_predict
from ich_fastai.evaluate import read_predictions
from ich_fastai.explain import bleeding_area
from ich_fastai.ingest import ingest
from ich_fastai.labels import find_dataset
from ich_fastai.model import WEIGHTS, load_model
from ich_fastai.phantom import make_phantom
from ich_fastai.report import sum_written, write_report
from ich_fastai.outputs import copy_outputs
from ich_fastai.reproduce import print_headline
from ich_fastai.sequence import read_together
from ich_fastai.tiny import tiny_phantom
from ich_fastai.learner import Checkpoint

STAGE = "16_arms"  # a small notebook, as if it had run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, simulated_run, write_predictions):
    "A run folder with a file of every kind."
    run, data = tmp_path_factory.mktemp("damaged"), find_dataset(tiny_phantom())
    shutil.copytree(simulated_run, run, dirs_exist_ok=True)
    cohort = read_stage(run, "cohort.parquet")
    write_predictions(run, cohort[cohort["fold"] == 0], [0])
    save_table(pd.read_parquet(run / "predictions.parquet"), run / "predictions.parquet")
    (run / "arms" / "none" / "seed-1").mkdir(parents=True)
    shutil.copy(run / "predictions.parquet", run / "arms" / "none" / "seed-1")
    (run / "data").mkdir()
    for name in ("phantom.json", "truth.parquet"):
        shutil.copy(tiny_phantom() / name, run / "data")
    (run / "data" / "stage_1_train_images").symlink_to(data.dicom_dir)
    (run / "notebooks").mkdir()
    shutil.copy(PROJECT / "nbs" / f"{STAGE}.ipynb", run / "notebooks")
    read_together(run, 0.2)
    (run / "few_dicom").mkdir()
    for k in range(12):
        (run / "few_dicom" / f"{k:02}.dcm").write_bytes(make_file(HEAD + k, SOPInstanceUID=f"1.2.{k}"))
    ingest(run / "few_dicom", run / "few" / "cache", 32, workers=1)
    write_networks(run)
    write_results(run)
    return run


def write_results(run):
    "What a report shows and vouches for."
    for name in ("metrics.csv", "tables/headline.csv", "model/history.csv"):
        save_table(pd.DataFrame({"label": ["any"], "value": [0.893]}), run / name)
    save_captioned({"auc.svg": (plt.figure(), "AUC.")}, run)
    (run / "viewer").mkdir()
    (run / "viewer" / "study-1.html").write_text("<p>a study</p>" * 20)
    save_json({"name": "phantom"}, run / "dataset.json", checked=True)
    about = {"preset": "toy", "data": "d", "commit": None, "uncommitted_changes": None, "gpu": [], "cpu_count": 2}
    about |= {"python": "3", "versions": {}, "parameters": {}, "synthetic": True, "seconds": {STAGE: 1.0}}
    about["checksums"] = sum_written(run, {}, "22_evaluate")
    save_json(about, run / "manifest.json", checked=True)


def write_networks(run):
    "A checkpoint, and a model of two networks with a recurrent one."
    state = {"fingerprint": "f", "epoch": 1, "model": {"w": torch.arange(500.0)}, "history": [{"loss": 0.5}]}
    write_checked(run / "model" / "checkpoints" / "fold-0.pt", lambda p: torch.save(state, p), behind=True)
    shutil.copytree(run / "model", run / "folds" / "model")
    card = read_stage(run, "model/model.json") | {"recurrent": 8, "networks": [WEIGHTS, "weights-2.safetensors"]}
    save_json(card, run / "folds" / "model" / "model.json", checked=True)
    shutil.copy(run / "model" / WEIGHTS, run / "folds" / "model" / "weights-2.safetensors")
    tensors = {"w": torch.arange(500.0)}
    write_checked(run / "folds" / "model" / "recurrent.safetensors", lambda p: save_file(tensors, p, MARKED))


def read_checkpoint(run):
    state = Checkpoint(run / "model" / "checkpoints" / "fold-0.pt", "f").read()
    return state and state | {"model": state["model"]["w"].tolist()}


def read_networks(run):
    model = load_model(run / "folds" / "model", "cpu")
    return [float(w.double().sum()) for w in (*model.network.state_dict().values(), *model.recurrent.values())]


def gather(run):
    "All slices of the cache."
    return Cache(run / "few" / "cache").gather(np.arange(12))


def predict(run):
    "ich-predict on one file: the CSV."
    path = sorted(find_dataset(tiny_phantom()).dicom_dir.glob("*.dcm"))[0]
    ich_predict(run / "model", str(path), str(run / "out.csv"), all_series=True)
    return (run / "out.csv").read_bytes()


def copy_back(run):
    "copy_outputs into copies of the notebooks: their bytes."
    shutil.rmtree(run / "nbs", ignore_errors=True)
    shutil.copytree(run / "notebooks", run / "nbs")
    for name in copy_outputs(run, run / "nbs"):
        assert (run / "nbs" / f"{name}.ipynb").is_file()
    return json.loads((run / "nbs" / f"{STAGE}.ipynb").read_text())["cells"]


def report(run):
    return write_report(run).read_text()


def headline(run):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_headline(run)
    return out.getvalue()


def ingest_again(run):
    return ingest(run / "few_dicom", run / "few" / "cache", 32, workers=1)


READERS = {  # file: what reads it, and a word that the message must have where it is damaged
    "labels.parquet": [(make_cohort, "01_labels")],
    "slices.parquet": [(make_cohort, "08_ingest")],
    "few/slices.parquet": [(ingest_again, "")],
    "cohort.parquet": [(lambda run: read_together(run, 0.2), "09_cohort")],
    "predictions.parquet": [(read_predictions, "12_train"), (lambda run: read_together(run, 0.2), "12_train")],
    "arms/none/seed-1/predictions.parquet": [(lambda run: [*read_arms(run)][0][2], "25_imbalance")],
    "model/model.json": [(lambda run: load_model(run / "model").card, "12_train"), (predict, "12_train")],
    "model/weights.safetensors": [(predict, "12_train")],
    "model/checkpoints/fold-0.pt": [(read_checkpoint, "delete it, to start anew")],
    "folds/model/weights-2.safetensors": [(read_networks, "12_train")],
    "folds/model/recurrent.safetensors": [(read_networks, "12_train")],
    "dataset.json": [(lambda run: describe_data(run, read_stage(run, "cohort.parquet")), "01_labels")],
    "model/history.csv": [(report, "--from 22")],
    "viewer/study-1.html": [(report, "--from 22")],
    "few/cache/cache.json": [(gather, "08_ingest"), (ingest_again, "run")],
    "few/cache/plan.parquet": [(ingest_again, "run again")],
    "few/cache/shard-00000.parquet": [(gather, "08_ingest"), (ingest_again, "")],
    "few/cache/shard-00000.npy": [(gather, "08_ingest")],
    "data/phantom.json": [(lambda run: make_phantom(run / "data", 12, 7, slices_per_series=(8, 8)), "delete")],
    "data/truth.parquet": [(lambda run: bleeding_area(run / "data", IDS), "06_phantom")],
    "manifest.json": [(report, "ich-reproduce"), (headline, "ich-reproduce"), (copy_back, "ich-reproduce")],
    "notebooks/16_arms.ipynb": [(report, "--from 22"), (copy_back, "--from 22")],
    "metrics.csv": [(report, "--from 22")],
    "tables/headline.csv": [(report, "--from 22"), (headline, "--from 22")],
    "tables/captions.csv": [(report, "--from 22")],
    "figures/auc.svg": [(report, "--from 22")],
}
MAY_BE_GONE = {"model/checkpoints/fold-0.pt", "dataset.json"}  # the same call begins anew; no name of a dataset
IDS = pd.Series(["ID_1"])
CASES = sorted((file, k) for file, readers in READERS.items() for k in range(len(readers)))


def same(a, b):
    if isinstance(a, pd.DataFrame):
        return a.equals(b)
    return np.array_equal(a, b, equal_nan=True) if isinstance(a, np.ndarray) else a == b


@pytest.fixture(scope="module")
def wanted(run_dir):
    "What each reader gives of the whole files."
    return {(file, k): read(run_dir) for file, readers in READERS.items() for k, (read, _) in enumerate(readers)}


@pytest.mark.parametrize(("file", "k"), CASES)
def test_damage_is_one_line_or_harmless(run_dir, wanted, file, k):
    read, word = READERS[file][k]
    raised, path = set(), run_dir / file
    for name in DAMAGE:
        data = damage_file(path, name)
        try:
            got = read(run_dir)
        except InputError as e:
            raised.add(name)
            said = str(path.parent if name == "gone" else path)
            assert "\n" not in str(e) and said in str(e), (name, str(e))
            assert (word or "again") in str(e) or name == "gone", (name, str(e))
        else:
            begins_anew = name == "gone" and file in MAY_BE_GONE
            assert begins_anew or same(got, wanted[file, k]), f"{name}: another result, and nothing said"
        finally:
            path.write_bytes(data)
    assert raised >= {"emptied", "halved", "zeroed", "zero-tailed"} or not word, raised
