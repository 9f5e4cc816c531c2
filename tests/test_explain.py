"""What stands behind the scores: every table and figure is written, also where there is next to nothing to explain."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from ich_fastai.explain import explain, score_slices, worst_mistakes
from ich_fastai.tiny import tiny_phantom


def test_the_stage_writes_its_files(simulated_run, write_predictions):
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(simulated_run, cohort[cohort["fold"] < 2], (0, 1))
    explain(simulated_run, tiny_phantom(), n_boot=50)
    captions = pd.read_csv(simulated_run / "tables" / "captions.csv")
    assert {"grad_cam.png", "mistakes.png", "subgroups.svg"} <= set(captions["figure"])
    assert all((simulated_run / "figures" / f).is_file() for f in captions["figure"])
    assert captions["caption"].str.contains("Synthetic data").all()
    pointing = pd.read_csv(simulated_run / "tables" / "pointing.csv")
    assert pointing["value"].dropna().between(0, 1).all() and pointing["n"].sum() > 0


def test_the_sensitivity_that_was_asked_for_reaches_the_subgroups(simulated_run, write_predictions):
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(simulated_run, cohort[cohort["fold"] < 2], (0, 1))
    path, found = simulated_run / "model" / "model.json", {}
    for wanted in (0.5, 1.0):
        card = json.loads(path.read_text())
        path.write_text(json.dumps(card | {"thresholds": {"wanted_sensitivity": wanted}}))
        table = explain(simulated_run, n_boot=2)["subgroups"].query("metric == 'sensitivity'")
        found[wanted] = np.average(table["value"].fillna(0).astype(float), weights=table["n_positive"])
    assert found[0.5] < found[1.0] - 0.1


def test_a_mistake_is_a_wrong_call_at_the_threshold(simulated_run, write_predictions):
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(simulated_run, cohort[cohort["fold"] < 2], (0, 1))
    predictions, d = pd.read_parquet(simulated_run / "predictions.parquet"), score_slices(simulated_run)
    mistakes = worst_mistakes(predictions, d, n=100)
    called = pd.Series(d.calibrated[:, -1] >= d.threshold[:, -1], index=predictions["SOPInstanceUID"])
    truth = predictions.set_index("SOPInstanceUID")["any"]
    for kind, rows in mistakes.groupby("kind"):
        assert (truth[rows["SOPInstanceUID"]] == (kind == "missed")).all()
        assert (called[rows["SOPInstanceUID"]] == (kind == "false alarm")).all()
        assert (rows["mistakes"] == ((called != truth) & (truth == (kind == "missed"))).sum()).all()
    assert len(mistakes)


@pytest.mark.parametrize("which", ["no positive", "one patient", "one slice"])
def test_the_stage_survives_too_little_data(simulated_run, write_predictions, too_little, tmp_path, which):
    shutil.copytree(simulated_run, tmp_path / "run")
    rows = too_little(pd.read_parquet(simulated_run / "cohort.parquet"), which)
    write_predictions(tmp_path / "run", rows, (rows["fold"].iloc[0],))
    tables = explain(tmp_path / "run", None, n_boot=20)
    subgroups = tables["subgroups"]
    assert subgroups.loc[subgroups["value"].isna(), "note"].str.len().gt(0).all()
