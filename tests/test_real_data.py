"""The real RSNA labels and the 46 real slices: skipped where they are absent."""

import json
import re

import pandas as pd
from conftest import PROJECT, run_cells

from ich_fastai.core import save_json
from ich_fastai.labels import class_balance, read_labels, subtypes_per_slice
from ich_fastai.report import date_files, sum_written, write_report
from ich_fastai.reproduce import STAGES, parse_settings, prepare_run

TABLE_1 = {  # domain facts, counted from the competition's file
    "epidural": (2_761, 0.004095, 0.028434),
    "intraparenchymal": (32_564, 0.048296, 0.335355),
    "intraventricular": (23_766, 0.035248, 0.244750),
    "subarachnoid": (32_122, 0.047641, 0.330803),
    "subdural": (42_496, 0.063026, 0.437638),
    "any": (97_103, 0.144015, 1.0),
}


def test_class_balance_of_the_real_labels_is_exact(real_data):
    labels = read_labels(real_data / "rsna" / "stage_1_train.csv.gz")
    table = class_balance(labels)
    assert len(labels) == 674_258
    assert {name: (int(r.n), round(r.p, 6), round(r.p_given_any, 6)) for name, r in table.iterrows()} == TABLE_1
    assert subtypes_per_slice(labels).to_list() == [577_155, 67_969, 22_587, 5_642, 885, 20]


def run_stages(run):
    "The stages of a run with their cells in this process: test_chain has them run by papermill, as a user's do."
    for stage in run.stages:
        before, output = date_files(run.folder), run.folder / "notebooks" / f"{stage}.ipynb"
        run_cells(stage, **{name: run.given[name] for name in run.declared[stage] if name in run.given})
        cells = json.loads((PROJECT / "nbs" / output.name).read_text())
        cells["cells"] = [cell for cell in cells["cells"] if cell["cell_type"] == "markdown"][:1]  # a page to link to
        output.parent.mkdir(exist_ok=True)
        output.write_text(json.dumps(cells))
        run.manifest["seconds"][stage] = 0.0
        run.manifest["checksums"] |= sum_written(run.folder, before, stage)
    save_json(run.manifest, run.folder / "manifest.json", checked=True)


def test_the_whole_chain_on_46_real_slices(real_data, tmp_path, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.chdir(PROJECT / "nbs")
    run_dir = tmp_path / "real"
    fast = "epochs=1 image_size=64 arch=resnet10t batch_size=8 n_boot=50 neighbors=0 pretrained_from= seeds=2"
    small = parse_settings([*fast.split(), "arms=[undersample+inverse,none+none]"])
    run_stages(prepare_run("paper", real_data / "rsna", run_dir, small, STAGES, False))
    index = write_report(run_dir).read_text()
    paper = pd.read_csv(run_dir / "tables" / "paper.csv", dtype=str, keep_default_na=False)
    text = {" ".join(row) for row in paper.to_numpy().tolist()}
    for number in ("674258", "577155", "97103"):
        assert any(number in row.replace(",", "") and "equal" in row for row in text), number
    assert any("194082" in row.replace(",", "") and "not computable" in row for row in text)
    metrics = pd.read_csv(run_dir / "metrics.csv")
    assert metrics.loc[metrics["value"].isna(), "note"].str.len().gt(0).all()
    assert not json.loads((run_dir / "manifest.json").read_text())["synthetic"]
    assert "data is synthetic" not in index and re.search(r"<td>nan</td>", index) is None
