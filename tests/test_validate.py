"""A model on another hospital's data: the dataset's truth comes out, faults are one line, a kill costs nothing."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from ich_fastai.batches import Settings
from ich_fastai.core import InputError, read_stage
from ich_fastai.datasets import open_dataset, read_cq500
from ich_fastai.evaluate import evaluate
from ich_fastai.labels import LABELS, LOGITS, SUBTYPES
from ich_fastai.layouts import ALL_BLEED, LAYOUTS, write_layout
from ich_fastai.model import Model
from ich_fastai.predict import score_stack
from ich_fastai.series import Stack
from ich_fastai.tiny import tiny_cohort
from ich_fastai.transfer import DELIVERED, read_published
from ich_fastai.validate import ask_all, ich_validate, read_qure, score_probabilities, validate

SIZE = 64


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    "Each layout once: its folder and its truth."
    home = tmp_path_factory.mktemp("layouts")
    return {name: (home / name, write_layout(name, home / name, size=SIZE)) for name in LAYOUTS}


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


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "phe_sich"])
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
def test_the_command_on_each_layout_counts_the_phantoms_truth(layouts, model_dir, tmp_path, name, capsys):
    folder, truth = layouts[name]
    ich_validate(str(model_dir), name, str(folder), str(tmp_path / "out"), n_boot=10)
    screen, tables = capsys.readouterr().out, tmp_path / "out" / "tables"
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
    page = (tmp_path / "out" / "index.html").read_text()
    if name in ALL_BLEED:
        of = metrics.query("level == 'study' and metric == 'specificity'")
        assert of["note"].eq("undefined: no negative").all() and of["value"].isna().all()
        assert page.count(f"No labels of {', '.join(SUBTYPES)}") == 1 and "By study all bleed: no specificity" in page
    if name == "phe_sich":
        assert all("8-bit" in pd.read_csv(tables / f"{t}.csv")["data"].iloc[0] for t in ("metrics", "shift", "series"))
    series = pd.read_csv(tables / "series.csv")
    assert series.groupby("study")["used"].sum().eq(1).all() and series["study"].nunique() == len(truth.hu)
    if name == "cq500":
        assert series["reason"].str.startswith("contrast").any()
        assert {"B1", "B2"} <= set(pd.read_csv(tables / "subgroups.csv")["value_of"])
        published = pd.read_csv(tables / "published.csv")
        assert published["system"].iloc[0] == "this model" and "Qure" in set(published["system"])
    assert str(folder) not in page and all(study not in page for study in truth.hu if len(study) > 4)
    mistakes = pd.read_csv(tables / "mistakes.csv")
    assert len(mistakes) and all((tmp_path / "out" / "pages" / page).is_file() for page in mistakes["page"])


def test_killed_it_goes_on_and_ends_with_the_same_bytes(layouts, model_dir, tmp_path):
    folder, _ = layouts["ct_ich"]
    call = [str(model_dir), "ct_ich", str(folder), str(tmp_path / "killed")]
    code = f"from ich_fastai.validate import ich_validate; ich_validate(*{call}, n_boot=10)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    answers = tmp_path / "killed" / "answers"
    while process.poll() is None and not list(answers.glob("[!.]*.parquet")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in answers.glob("[!.]*.parquet")}
    for name in ("killed", "undisturbed"):
        validate(model_dir, open_dataset("ct_ich", folder), tmp_path / name, device="cpu", n_boot=10)
    files = [
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("killed", "undisturbed")
    ]
    assert done and all(path.stat().st_mtime_ns == before for path, before in done.items()), "finished studies are kept"
    assert files[0] == files[1] and len(files[0]) > 12


def no_images(folder):
    "A study of CQ500 that has no file."
    home = next(folder.glob("CQ500CT7 *"))
    shutil.rmtree(home)
    home.mkdir()


FAULTS = {  # what is done to the folder of CQ500; what the message says
    "wrong folder": (lambda folder: [shutil.rmtree(p) for p in folder.glob("CQ500CT*")], "has no folder CQ500CT"),
    "no folder": (shutil.rmtree, "no such folder"),
    "no reads": (lambda folder: (folder / "reads.csv").unlink(), "reads.csv: no such file"),
    "other model": (lambda folder: None, "holds answers of another model or dataset"),
    "not empty": (lambda folder: None, "is not empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line(layouts, model_dir, tmp_path, fault):
    change, message = FAULTS[fault]
    shutil.copytree(layouts["cq500"][0], tmp_path / "data")
    change(tmp_path / "data")
    out = tmp_path / "out"
    out.mkdir()
    if fault == "other model":
        (out / "answers").mkdir()
        (out / "answers" / "of.json").write_text("{}")
    if fault == "not empty":
        (out / "thesis.doc").write_text("mine")
    with pytest.raises(InputError, match=message) as e:
        ich_validate(str(model_dir), "cq500", str(tmp_path / "data"), str(out), n_boot=10)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["rsna", "bhsd", "mbh_seg", "hemseg200", "nowhere"])
def test_what_overlaps_the_training_is_refused(layouts, model_dir, tmp_path, name):
    folder = tmp_path if name != "rsna" else None
    with pytest.raises(InputError) as e:
        if name == "rsna":
            from ich_fastai.tiny import tiny_phantom

            folder = tiny_phantom()
        ich_validate(str(model_dir), name, str(folder), str(tmp_path / "out"))
    assert "\n" not in str(e.value) and name in str(e.value)


def test_slices_of_the_training_run_are_refused_whatever_the_dataset_says(layouts, model_dir, tmp_path):
    folder, truth = layouts["folder"]
    run_dir = tmp_path / "run"
    shutil.copytree(model_dir, run_dir / "model")
    rows = read_stage(tiny_cohort(), "cohort.parquet").assign(SOPInstanceUID=truth.labels.index[0])
    rows.to_parquet(run_dir / "cohort.parquet")
    with pytest.raises(InputError, match="1 of its slices or studies were in the model's training run"):
        validate(run_dir / "model", open_dataset("folder", folder), tmp_path / "out")


def test_what_is_missing_is_a_reason_and_a_vendor_stands_beside_on_the_same_studies(layouts, model_dir, tmp_path):
    "A study without images, labels without files, and a vendor who has read another study, too."
    shutil.copytree(layouts["cq500"][0], tmp_path / "data")
    no_images(tmp_path / "data")
    table = pd.read_csv(tmp_path / "data" / "reads.csv")
    pd.concat([table, table.tail(1).assign(name="CQ500-CT-99")]).to_csv(tmp_path / "data" / "reads.csv", index=False)
    p = pd.DataFrame({short: [0.9, 0.95, 0.1, 0.5] for short in ("EDH", "IPH", "IVH", "SAH", "SDH", "ICH")})
    p = p.assign(name=["CQ500-CT-12", "CQ500-CT-7", "CQ500-CT-490", "CQ500-CT-1000"])
    p.to_csv(tmp_path / "data" / "prediction_probabilities.csv", index=False)
    ich_validate(str(model_dir), "cq500", str(tmp_path / "data"), str(tmp_path / "out"), n_boot=10)
    reasons = pd.read_csv(tmp_path / "out" / "tables" / "reasons.csv").set_index("study")["reason"]
    assert reasons["CQ500-CT-99"] == "labels without files" and len(reasons["CQ500-CT-7"].splitlines()) == 1
    assert set(pd.read_csv(tmp_path / "out" / "tables" / "metrics.csv")["n"]) == {2}
    published = pd.read_csv(tmp_path / "out" / "tables" / "published.csv")
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
