"""A model on another hospital's data: the dataset's truth comes out, faults are one line, a kill costs nothing."""

import io
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LAYOUT_SIZE as SIZE

from ich_fastai.batches import Settings
from ich_fastai.core import InputError, read_stage, save_json
from ich_fastai.datasets import open_dataset, read_cq500
from ich_fastai.evaluate import evaluate
from ich_fastai.labels import LABELS, LOGITS, SUBTYPES
from ich_fastai.guard import hold_folder
from ich_fastai.layouts import ALL_BLEED, LAYOUTS
from ich_fastai.model import Model
from ich_fastai.predict import score_stack
from ich_fastai.series import Stack
from ich_fastai.tiny import tiny_cohort
from ich_fastai.transfer import DELIVERED, read_published
from ich_fastai.validate import (
    ask_all,
    check_overlap,
    claim_folder,
    ich_validate,
    read_qure,
    score_probabilities,
    validate,
)


def spoil_cq500(folder, truth):
    "CQ500 with two series a study, a study without images, labels without files, and a vendor's answers; its truth."
    for path in [*folder.rglob("bone"), *folder.rglob("scout")]:
        shutil.rmtree(path)
    shutil.rmtree(folder / "CQ500CT490 CQ500CT490" / "Unknown Study")
    table = pd.read_csv(folder / "reads.csv")
    pd.concat([table, table.tail(1).assign(name="CQ500-CT-99")]).to_csv(folder / "reads.csv", index=False)
    p = pd.DataFrame({short: [0.9, 0.1, 0.95, 0.5] for short in ("EDH", "IPH", "IVH", "SAH", "SDH", "ICH")})
    p = p.assign(name=["CQ500-CT-12", "CQ500-CT-7", "CQ500-CT-490", "CQ500-CT-1000"])
    p.to_csv(folder / "prediction_probabilities.csv", index=False)
    hu = {study: x for study, x in truth.hu.items() if study != "CQ500-CT-490"}
    return truth._replace(hu=hu, labels=truth.labels[truth.labels["study"].isin(hu)])


@pytest.fixture(scope="module")
def validated(layouts, model_dir, tmp_path_factory):
    "validated(name): the command on that layout, once: its folder, the truth, and what it said."

    @cache
    def run(name):
        home, (folder, truth), said = tmp_path_factory.mktemp(name), layouts[name], io.StringIO()
        if name == "cq500":
            folder = Path(shutil.copytree(folder, home / "data"))
            truth = spoil_cq500(folder, truth)
        with redirect_stdout(said):
            ich_validate(str(model_dir), name, str(folder), str(home / "out"), n_boot=10)
        return home / "out", truth, said.getvalue(), folder

    return run


@pytest.fixture(scope="module")
def model_dir(simulated_run, write_predictions):
    "An untrained network with calibration and thresholds; its run folder is around it."
    cohort = read_stage(simulated_run, "cohort.parquet")
    write_predictions(simulated_run, cohort, [0])
    evaluate(simulated_run, n_boot=10)
    return simulated_run / "model"


class Sides(torch.nn.Module):
    "Logits of a slice that tell left from right, front from back, and slices from each other."

    def __init__(self):
        super().__init__()
        self.last = torch.nn.Linear(6, 6, bias=False)  # a network has one; this one changes nothing
        torch.nn.init.eye_(self.last.weight)

    def forward(self, x):
        upper, lower = (part.mean((1, 2, 3)) for part in x.chunk(2, dim=2))
        left, right = (part.mean((1, 2, 3)) for part in x.chunk(2, dim=3))
        return self.last(torch.stack([left, right, upper, lower, left - right, x.std((1, 2, 3))], 1))


@pytest.mark.parametrize("name", ["folder", "ct_ich", "instance2022"])
def test_the_network_sees_the_phantoms_slices_in_order_and_the_right_way_round(layouts, tmp_path, name):
    folder, truth = layouts[name]
    settings = Settings(image_size=SIZE, neighbors=1)
    model = Model(Sides(), settings, {"cache_size": SIZE, "geometry": None}, torch.device("cpu"))
    dataset = open_dataset(name, folder)
    studies = list(truth.hu)[1:2]  # it bleeds
    dataset.studies[:] = studies
    answers = ask_all(model, dataset, tmp_path)
    assert answers["id"].tolist() == [i for study in studies for i in truth.ids[study]]
    assert answers.groupby("study")["z_mm"].apply(lambda z: (z.diff().dropna() > 0).all()).all()
    for study in studies:
        hu = truth.hu[study]
        stack = Stack(hu, np.arange(len(hu)), 1, {}, [])
        wanted = score_stack(model, stack, pd.Series(10.0 * np.arange(len(hu))))
        np.testing.assert_array_equal(answers.loc[answers["study"] == study, LOGITS], wanted)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_command_on_each_layout_counts_the_phantoms_truth(validated, name):
    out, truth, screen, _ = validated(name)
    tables = out / "tables"
    assert screen.endswith(f"\n\nMore: {out / 'index.html'}\n") and not (out / ".lock").exists()
    assert all(len(line) <= 80 for line in screen.splitlines() if not line.startswith("More: "))
    metrics = pd.read_csv(tables / "metrics.csv")
    known = ["any"] if name in ALL_BLEED else list(LABELS)
    levels = {"study": truth.studies()} | ({} if name == "cq500" else {"slice": truth.labels})
    assert set(metrics["level"]) == set(levels) and set(metrics["label"]) == set(known)
    for level, y in levels.items():
        rows = metrics[
            metrics["level"].eq(level) & metrics["metric"].eq("auc") & metrics["probabilities"].eq(DELIVERED)
        ]
        assert dict(zip(rows["label"], rows["n_positive"], strict=True)) == y[known].sum().to_dict()
        assert set(rows["n"]) == {len(y)} and set(rows["n_patients"]) == {len(truth.hu)}
    page = (out / "index.html").read_text()
    if name in ALL_BLEED:
        of = metrics.query("level == 'study' and metric == 'specificity'")
        assert of["note"].eq("undefined: no negative").all() and of["value"].isna().all()
        assert page.count(f"No labels of {', '.join(SUBTYPES)}") == 1 and "By study all bleed: no specificity" in page


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_tables_and_pages_of_each_layout_say_what_they_know(validated, name):
    out, truth, _, folder = validated(name)
    tables, page = out / "tables", (out / "index.html").read_text()
    if name == "phe_sich":
        assert all("8-bit" in pd.read_csv(tables / f"{t}.csv")["data"].iloc[0] for t in ("metrics", "shift", "series"))
    shift = pd.read_csv(tables / "shift.csv")  # this model is older than a description of its training's inputs
    assert shift["note"].eq("not in its model.json").all() and shift["training"].isna().all()
    assert pd.read_csv(tables / "histogram.csv")["here"].sum() == pytest.approx(1, abs=1e-6)
    series = pd.read_csv(tables / "series.csv")
    assert not {"PatientID", "file"} & {*series, *next((out / "answers").glob("*.csv")).read_text().split(",")}
    assert series.groupby("study")["used"].sum().eq(1).all() and series["study"].nunique() == len(truth.hu)
    if name == "cq500":
        assert series["reason"].str.startswith("contrast").any()
        assert {"B1", "B2"} <= set(pd.read_csv(tables / "subgroups.csv")["value_of"])
        published = pd.read_csv(tables / "published.csv")
        assert published["system"].iloc[0] == "this model" and "Qure" in set(published["system"])
    assert str(folder) not in page and all(study not in page for study in truth.hu if len(study) > 4)
    mistakes = pd.read_csv(tables / "mistakes.csv")
    assert len(mistakes) and all((out / "pages" / page).is_file() for page in mistakes["page"])
    assert mistakes["kind"].eq("false alarm").eq(mistakes["p"] >= mistakes["threshold"]).all(), "a wrong call, no other"
    if name in ALL_BLEED:
        look = (out / "pages" / mistakes["page"].iloc[0]).read_text()
        assert f"no labels of {', '.join(SUBTYPES)}" in look, "what is not known is not shown as absent"


def test_killed_it_goes_on_and_ends_with_the_same_bytes(validated, model_dir, tmp_path, warm):
    undisturbed, _, _, folder = validated("ct_ich")
    call = [str(model_dir), "ct_ich", str(folder), str(tmp_path / "killed")]
    script = tmp_path / "script.py"
    code = f"from ich_fastai.validate import ich_validate; ich_validate(*{call}, n_boot=10)"
    script.write_text(f"import os\nprint(os.getpid(), flush=True)\n{code}\n")
    process = subprocess.Popen([*warm, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pid, answers = int(process.stdout.readline()), tmp_path / "killed" / "answers"
    while process.poll() is None and not list(answers.glob("[!.]*.parquet")):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in answers.glob("[!.]*.parquet")}
    validate(model_dir, open_dataset("ct_ich", folder), tmp_path / "killed", n_boot=10)
    files = [
        {p.relative_to(home): p.read_bytes() for p in home.rglob("*") if p.is_file()}
        for home in (tmp_path / "killed", undisturbed)
    ]
    assert done and all(path.stat().st_mtime_ns == before for path, before in done.items()), "finished studies are kept"
    assert files[0] == files[1] and len(files[0]) > 12


FAULTS = {  # what is done to the folder of CQ500; what the message says
    "wrong folder": (lambda folder: [shutil.rmtree(p) for p in folder.glob("CQ500CT*")], "has no folder CQ500CT"),
    "no folder": (shutil.rmtree, "no such folder"),
    "no reads": (lambda folder: (folder / "reads.csv").unlink(), "reads.csv: no such file"),
    "other model": (lambda folder: None, "holds answers of another model, dataset or folder"),
    "broken claim": (lambda folder: None, "of.json: damaged; choose another --out"),
    "not empty": (lambda folder: None, "is not empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line(layouts, model_dir, tmp_path, fault):
    change, message = FAULTS[fault]
    shutil.copytree(layouts["cq500"][0], tmp_path / "data")
    change(tmp_path / "data")
    out = tmp_path / "out"
    out.mkdir()
    if fault in ("other model", "broken claim"):
        (out / "answers").mkdir()
        (out / "answers" / "of.json").write_text("{" + "}" * (fault == "other model"))
    if fault == "not empty":
        (out / "thesis.doc").write_text("mine")
    with pytest.raises(InputError, match=message) as e:
        ich_validate(str(model_dir), "cq500", str(tmp_path / "data"), str(out), n_boot=10)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("change", ["networks", "recurrent", "folder", "labels", "nothing"])
def test_answers_are_of_these_weights_this_folder_and_these_labels(layouts, tmp_path, change):
    shutil.copytree(layouts["ct_ich"][0], tmp_path / "data")
    dataset, card = open_dataset("ct_ich", tmp_path / "data"), {"networks": ["a", "b"], "recurrent": {"units": 8}}
    for name in ("a", "b", "recurrent.safetensors"):
        (tmp_path / name).write_text(name)
    claim_folder(tmp_path / "out", tmp_path, card, dataset)
    if change in ("networks", "recurrent"):
        (tmp_path / {"networks": "b", "recurrent": "recurrent.safetensors"}[change]).write_text("other weights")
    if change == "folder":
        dataset = open_dataset("ct_ich", shutil.copytree(tmp_path / "data", tmp_path / "other"))
    if change == "labels":
        dataset.labels["any"] ^= 1
    with nullcontext() if change == "nothing" else pytest.raises(InputError, match="holds answers of another"):
        claim_folder(tmp_path / "out", tmp_path, card, dataset)


@pytest.mark.parametrize("harm", ["range", "damaged", "held", "disk"])
def test_what_stops_it_later_is_one_line(validated, model_dir, tmp_path, monkeypatch, harm):
    out, _, _, folder = validated("ct_ich")
    out, n_boot, held, message = shutil.copytree(out, tmp_path / "out"), 10, nullcontext(), "n_boot=-5: must be 0 to"
    (out / ".lock").touch()  # a killed run leaves it
    if harm == "range":
        n_boot = -5
    if harm == "damaged":
        path, message = next((out / "answers").glob("*.parquet")), "damaged.*; delete it and run the same command"
        path.write_bytes(path.read_bytes()[:-9])
    if harm == "held":
        held, message = hold_folder(out), "another command is writing there"
    if harm == "disk":
        message = "No space left on device; the same command goes on"
        monkeypatch.setattr("ich_fastai.validate.make_tables", raise_full)
    with held, pytest.raises(InputError, match=message) as e:
        ich_validate(str(model_dir), "ct_ich", str(folder), str(out), n_boot=n_boot)
    assert "\n" not in str(e.value)


def raise_full(*args, **kwargs):
    "The disk is full."
    raise OSError(28, "No space left on device")


def test_without_labels_of_any_nothing_is_said_of_it(validated, model_dir, tmp_path):
    "A hospital that labels only subdural hemorrhage; a reason that would be a formula in a spreadsheet."
    table = pd.read_csv(validated("ct_ich")[3] / "hemorrhage_diagnosis_raw_ct.csv")
    folder = tmp_path / "data"
    shutil.copytree(validated("ct_ich")[3] / "ct_scans", folder / "ct_scans")
    table.to_csv(folder / "hemorrhage_diagnosis_raw_ct.csv", index=False)
    dataset = open_dataset("ct_ich", folder)
    dataset = replace(dataset, labels=dataset.labels[["subdural", "PatientID", "study"]], reasons={"x": "=1+1"})
    tables = validate(model_dir, dataset, tmp_path / "out", n_boot=10)
    assert set(tables["metrics"]["label"]) == {"subdural"} and not {"mistakes", "position"} & set(tables)
    assert not (tmp_path / "out" / "pages").exists()
    assert (tmp_path / "out" / "index.html").read_text().count("nothing on position, and no worst mistakes") == 1
    assert "'=1+1" in (tmp_path / "out" / "tables" / "reasons.csv").read_text()


@pytest.mark.parametrize("name", ["rsna", "bhsd", "mbh_seg", "hemseg200", "nowhere"])
def test_what_overlaps_the_training_is_refused(model_dir, tmp_path, name):
    folder = tmp_path if name != "rsna" else None
    with pytest.raises(InputError) as e:
        if name == "rsna":
            from ich_fastai.tiny import tiny_phantom

            folder = tiny_phantom()
        ich_validate(str(model_dir), name, str(folder), str(tmp_path / "out"))
    assert "\n" not in str(e.value) and name in str(e.value)


def test_without_a_common_label_nobody_is_asked(layouts, model_dir, tmp_path):
    dataset, model = open_dataset("phe_sich", layouts["phe_sich"][0]), tmp_path / "model"
    shutil.copytree(model_dir, model)
    card = read_stage(tmp_path, "model/model.json")
    save_json(card | {"labels": ["subdural"]}, model / "model.json", checked=True)
    with pytest.raises(InputError, match="the model knows subdural; the dataset has any: nothing in common"):
        validate(model, dataset, tmp_path / "out", n_boot=10)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["slices or studies", "patients, by PatientID,"])
def test_who_was_in_the_training_run_is_refused_whatever_the_dataset_says(layouts, model_dir, tmp_path, what):
    "A slice; or a patient, with another study."
    dataset, run_dir = open_dataset("folder", layouts["folder"][0]), tmp_path / "run"
    shutil.copytree(model_dir, run_dir / "model")
    ids = (
        {"SOPInstanceUID": dataset.labels.index[0]}
        if "slices" in what
        else {"PatientID": dataset.labels["PatientID"].iloc[0]}
    )
    read_stage(tiny_cohort(), "cohort.parquet").assign(**ids).to_parquet(run_dir / "cohort.parquet")
    with pytest.raises(InputError, match=f"1 of its {what} were in the model's training run"):
        validate(run_dir / "model", dataset, tmp_path / "out")


def test_a_number_that_two_hospitals_give_is_no_overlap(layouts, model_dir, tmp_path):
    "CQ500's patients are numbers of CQ500; without a PatientID nobody is told apart."
    dataset, run_dir = open_dataset("cq500", layouts["cq500"][0]), tmp_path / "run"
    (run_dir / "model").mkdir(parents=True)
    rows = read_stage(tiny_cohort(), "cohort.parquet")
    for data, patient in (
        (dataset, dataset.labels["PatientID"].iloc[0]),
        (open_dataset("folder", layouts["folder"][0]), ""),
    ):
        rows.assign(PatientID=patient).to_parquet(run_dir / "cohort.parquet")
        labels = data.labels.assign(PatientID=patient)
        check_overlap(replace(data, labels=labels, studies=[]), run_dir / "model", {"trained_on": "phantom"})
    labels = data.labels.assign(PatientID="0001")
    rows.assign(PatientID="0001").to_parquet(run_dir / "cohort.parquet")
    check_overlap(replace(data, labels=labels, studies=[]), run_dir / "model", {"trained_on": "phe_sich"})


def test_what_is_missing_is_a_reason_and_a_vendor_stands_beside_on_the_same_studies(validated):
    "A study without images, labels without files, and a vendor who has read another study, too."
    tables = validated("cq500")[0] / "tables"
    reasons = pd.read_csv(tables / "reasons.csv").set_index("study")["reason"]
    assert reasons["CQ500-CT-99"] == "labels without files" and len(reasons["CQ500-CT-490"].splitlines()) == 1
    published = pd.read_csv(tables / "published.csv")
    of = published.query("label == 'any' and system == 'Qure, the same studies'").iloc[0]
    assert (of["auc"], of["n"]) == (1.0, 2), "the study without images, which the vendor got wrong, is not counted"


def test_published_figures_of_qure_come_out_of_its_probabilities(real_data):
    "The real reads of 491 studies and Qure's own probabilities, by the way of every validation."
    labels, p = (read(real_data / "cq500" / name) for read, name in
                 ((read_cq500, "reads.csv"), (read_qure, "prediction_probabilities.csv")))  # fmt: skip
    metrics = score_probabilities(labels, p, "Qure", n_boot=200)
    auc = metrics[metrics["metric"] == "auc"].set_index("label")
    published = read_published("cq500").query("system == 'Qure'").set_index("label")
    assert auc["value"].round(3).to_dict() == published["auc"].to_dict() and len(published) == 6
    assert auc["n"].eq(491).all() and auc["n_patients"].eq(491).all()
    positives = {"any": 205, "intraparenchymal": 134, "intraventricular": 28}
    positives |= {"subdural": 53, "epidural": 13, "subarachnoid": 60}
    assert auc["n_positive"].to_dict() == positives
    assert (auc["low"] < auc["value"]).all() and (auc["value"] < auc["high"]).all()
    assert auc.loc["any", "high"] - auc.loc["any", "low"] < 0.06


def test_every_published_figure_has_its_source():
    table = read_published()
    assert table[["dataset", "system", "label", "auc", "level", "source"]].notna().all(axis=None)
    assert table["auc"].between(0.5, 1).all() and set(table["label"]) <= set(LABELS)
    assert json.loads(table["n"].to_json(orient="values"))[0] == 491
