"""Another hospital's dataset through the stages: labels that do not exist stay out of loss, tables and answers."""

import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_cells

from ich_fastai.adopt import adopt, find_heights
from ich_fastai.arms import train_arms
from ich_fastai.batches import Settings, named_windows
from ich_fastai.cohort import describe_data, make_cohort
from ich_fastai.controls import controls
from ich_fastai.core import InputError, read_stage
from ich_fastai.datasets import open_dataset
from ich_fastai.imbalance import compare
from ich_fastai.inputs import check_data
from ich_fastai.labels import LABELS, LOGITS, SUBTYPES
from ich_fastai.layouts import write_layout
from ich_fastai.model import NEVER, load_model, loss_weights, make_loss
from ich_fastai.predict import decide, format_studies, summarize_studies
from ich_fastai.reproduce import reproduce
from ich_fastai.series import Stack
from ich_fastai.train import fit
from ich_fastai.validate import validate

TINY = {"arch": "resnet10t", "image_size": 32, "neighbors": 0, "epochs": 1, "batch_size": 16, "epoch_size": 32}


@pytest.mark.parametrize("kind", ["inverse", "none", "competition"])
@pytest.mark.parametrize("known", [["any"], ["intraparenchymal", "any"], list(LABELS)])
def test_the_loss_is_that_of_the_known_labels_alone(kind, known):
    rng = torch.Generator().manual_seed(0)
    y = (torch.rand(64, 6, generator=rng) < 0.3).float()
    y[:, -1] = y[:, :-1].amax(1)
    labels = pd.DataFrame(y.numpy(), columns=list(LABELS))[known].reindex(columns=list(LABELS))
    at = [LABELS.index(label) for label in known]
    n = y.sum(0)
    weight = {"inverse": 1 / n, "none": torch.ones(6), "competition": torch.tensor([1.0] * 5 + [2.0])}[kind][at]
    logits = torch.randn(64, 6, generator=rng, requires_grad=True)
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, at], y[:, at], reduction="none")
    filled = torch.from_numpy(labels.fillna(0).to_numpy(np.float32))
    loss = make_loss(loss_weights(labels, kind))(logits, filled)
    assert loss.item() == pytest.approx((each * weight / weight.mean()).mean().item(), rel=1e-5)
    loss.backward()
    assert np.flatnonzero(logits.grad.abs().sum(0)).tolist() == at


@pytest.fixture(scope="module")
def adopted(tmp_path_factory):
    "A run on pictures with labels of `any` alone, stage by stage: four by their notebooks, which must hold for it."
    home = tmp_path_factory.mktemp("adopted")
    write_layout("phe_sich", home / "data", numbers=(1, 2, 3, 4, 5, 160))
    run = home / "run"
    adopt(open_dataset("phe_sich", home / "data"), run, cache_size=64)
    run_cells("09_cohort", run_dir=run, n_folds=2)
    fit(run, Settings(**TINY, windows=named_windows(["brain"])))
    for name in ("13_sequence", "22_evaluate", "24_explain"):
        run_cells(name, run_dir=run, n_boot=20, data_dir=home / "data")
    controls(run, n_boot=20)
    train_arms(run, ["none+none", "undersample+inverse"], seeds=1)
    compare(run, n_boot=20)
    return run


def test_no_table_speaks_of_a_label_that_nobody_gave(adopted):
    tables = {path.name: pd.read_csv(path) for path in (adopted / "tables").glob("*.csv")}
    assert {"headline.csv", "controls.csv", "thresholds.csv", "table_2.csv", "class_balance.csv"} <= set(tables)
    for name, table in tables.items():
        text = table.drop(columns="caption", errors="ignore").to_csv()
        assert not [label for label in (*SUBTYPES, "weighted") if label in text], name
    auc = pd.read_csv(adopted / "metrics.csv").query("metric == 'auc' and level == 'slice'")
    assert auc["value"].notna().all() and set(auc["label"]) == {"any"}
    assert read_stage(adopted, "labels.parquet")[list(SUBTYPES)].isna().all(axis=None)


def test_the_network_is_silent_on_what_it_has_not_learned(adopted):
    predictions, model = read_stage(adopted, "predictions.parquet"), load_model(adopted / "model", "cpu")
    assert np.allclose(predictions[LOGITS[:-1]], NEVER) and predictions["logit_any"].between(-15, 15).all()
    assert model.card["labels"] == ["any"] and model.card["trained_on"] == "phe_sich"
    answers = decide(predictions[LOGITS].to_numpy(float), model.card)
    assert answers[list(SUBTYPES)].isna().all(axis=None) and answers["any"].between(0, 1).all()
    assert answers[[f"call_{s}" for s in SUBTYPES]].isna().all(axis=None) and answers["set_epidural"].eq("").all()
    slices = predictions.assign(error=None, z_mm=np.nan)
    shown = format_studies(summarize_studies(slices, model.card))
    assert "any" in shown.splitlines()[0] and "EDH" not in shown.splitlines()[0] and "nan" not in shown


def test_elsewhere_it_is_asked_for_what_it_knows(adopted, tmp_path):
    write_layout("folder", tmp_path / "data", numbers=(1, 2, 3, 4))
    tables = validate(adopted / "model", open_dataset("folder", tmp_path / "data"), tmp_path / "out", n_boot=20)
    assert all(set(tables[name]["label"]) == {"any"} for name in ("metrics", "headline", "thresholds", "calibration"))
    pages = [path.read_text() for path in (tmp_path / "out" / "pages").iterdir()]
    assert pages and all('"p": [null, null, null, null, null, ' in page for page in pages)
    assert not [page for page in pages if re.search("NaN[],}]", page)]  # in JSON; a picture's base64 may spell it
    with pytest.raises(InputError, match="refused: the model was trained on phe_sich"):
        validate(adopted / "model", open_dataset("phe_sich", adopted.parent / "data"), tmp_path / "own")


def test_the_runner_begins_with_the_dataset_says_it_once_and_resumes(tmp_path, command, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")  # which `reproduce` sets
    write_layout("phe_sich", tmp_path / "data")
    how = {"data": tmp_path / "data", "dataset": "phe_sich", "out": tmp_path / "run", "last": "39b"}
    options = [f"--{'until' if name == 'last' else name}={value}" for name, value in how.items()]
    done = command("ich-reproduce", "--preset=tiny", *options, "--set=cache_size=32")
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "run" / "index.html").read_text()
    assert text.count("8-bit pictures") == 1 and text.count("No labels of epidural") == 1
    assert "synthetic" not in text and "40_paper" not in text and "39b_adopt" in text
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["dataset"] == "phe_sich" and not manifest["synthetic"] and manifest["inputs"]["files"] == 33
    before = (tmp_path / "run" / "slices.parquet").stat().st_mtime_ns
    reproduce("tiny", **how, settings={"cache_size": 32}, resume=True)
    assert (tmp_path / "run" / "slices.parquet").stat().st_mtime_ns == before
    (tmp_path / "data" / "slices" / "0001_00.png").write_bytes(b"another")
    with pytest.raises(InputError, match="cannot go on, the data is not what it was"):
        reproduce("tiny", **how, settings={"cache_size": 32}, resume=True)


def test_what_cannot_be_trained_on_is_one_line(tmp_path):
    write_layout("folder", tmp_path / "studies", key="folder")
    write_layout("folder", tmp_path / "kinds")
    csv = tmp_path / "kinds" / "labels.csv"
    pd.read_csv(csv)[["SOPInstanceUID", "subdural"]].to_csv(csv, index=False)
    wrong = {
        "by study, and the network learns from slices": ("folder", tmp_path / "studies"),
        "it has no labels of any": ("folder", tmp_path / "kinds"),
        "nobody: no such dataset; there are rsna, cq500": ("nobody", tmp_path),
        "known, but not read: 192 volumes": ("bhsd", tmp_path),
        "no such folder": ("phe_sich", tmp_path / "nowhere"),
        "labels.csv: cannot be read": ("phe_sich", tmp_path),
        "give its folder by --data": ("ct_ich", None),
    }
    for words, (name, folder) in wrong.items():
        with pytest.raises(InputError, match=words) as error:
            check_data(folder, {}, name)
        assert "\n" not in str(error.value)


def test_a_study_that_nobody_can_read_stops_no_run(tmp_path):
    write_layout("phe_sich", tmp_path / "data", numbers=(1, 2, 3))
    for picture in (tmp_path / "data" / "slices").glob("0001_*"):
        picture.write_bytes(b"no picture")
    run_cells("39b_adopt", dataset="phe_sich", data_dir=tmp_path / "data", run_dir=tmp_path / "run", cache_size=32)
    slices = read_stage(tmp_path / "run", "slices.parquet")
    assert slices.groupby("StudyInstanceUID")["error"].apply(lambda e: e.isna().any()).tolist() == [False, True, True]
    assert "no readable picture" in slices["error"].dropna().iloc[0]


def test_studies_longer_than_a_shard_are_rows_with_the_reason(tmp_path, monkeypatch):
    write_layout("phe_sich", tmp_path / "data", numbers=(1, 2))
    opened = open_dataset("phe_sich", tmp_path / "data")
    long, short = opened.studies
    read = opened.reader
    monkeypatch.setattr("ich_fastai.adopt.SHARD_ROWS", len(read(short, 32, None)[0].ids))
    reader = partial(make_longer, read, long)
    slices = adopt(replace(opened, reader=reader), tmp_path / "run", cache_size=32).set_index("StudyInstanceUID")
    assert "slices, more than" in slices.loc[long, "error"] and slices.loc[short, "error"].isna().all()
    with pytest.raises(InputError, match="no readable slice, e.g. .* slices, more than 2"):
        monkeypatch.setattr("ich_fastai.adopt.SHARD_ROWS", 2)
        adopt(opened, tmp_path / "run", cache_size=32)


def make_longer(read, study, name, *how):
    "A reader that gives one study twice, one on the other."
    stack, series = read(name, *how)
    if name != study:
        return stack, series
    double = {"hu": np.concatenate([stack.hu] * 2), "slab": np.concatenate([stack.slab, stack.slab + len(stack.hu)])}
    ids = (*stack.ids, *(f"{i} again" for i in stack.ids))
    return stack._replace(**double, ids=ids, z_mm=np.arange(len(ids)) * 1.0), series


def test_the_table_has_the_scanners_pixels_not_the_caches(tmp_path):
    "240 mm in 128 px; a model's card must say 1.875 mm, which another hospital's files are compared with."
    write_layout("ct_ich", tmp_path / "data", size=128, numbers=(49, 50))
    slices = adopt(open_dataset("ct_ich", tmp_path / "data"), tmp_path / "run", cache_size=32)
    assert set(slices["rows"]) == set(slices["columns"]) == {128}
    assert np.allclose(slices[["pixel_spacing_row_mm", "pixel_spacing_column_mm"]].astype(float), 1.875)
    about = describe_data(tmp_path / "run", make_cohort(tmp_path / "run", n_folds=2))
    assert about["inputs"]["pixel_mm"] == [1.875] * 3 and about["geometry"]["field_mm"] == [240] * 3


def test_a_number_is_a_position_where_there_is_no_other():
    stack = Stack(np.empty((3, 8, 8), np.int16), np.arange(3), 1, {}, [], np.array([0, np.nan, 2]), tuple("abc"))
    assert find_heights(stack, 2.5).tolist() == [0, 2.5, 5] and find_heights(stack, np.nan).tolist() == [0, 5, 10]
    assert np.isnan(find_heights(stack._replace(step=0), 2.5)).all()
    assert find_heights(stack._replace(z_mm=np.arange(3.0)), 9).tolist() == [0, 1, 2]


def test_a_run_in_the_data_is_refused_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    write_layout("phe_sich", tmp_path / "data")
    with pytest.raises(InputError, match="run: lies in the folder of the data; choose a run folder outside of it"):
        reproduce("tiny", tmp_path / "data", tmp_path / "data" / "run", dataset="phe_sich", last="39b")
