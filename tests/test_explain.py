"""What stands behind the scores: every table and figure is written, also where there is next to nothing to explain."""

import shutil

import pandas as pd
import pytest

from ich_fastai.explain import explain
from ich_fastai.tiny import tiny_phantom


def test_the_stage_writes_its_files(simulated_run, write_predictions):
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(simulated_run, cohort[cohort["fold"] < 2], (0, 1))
    explain(simulated_run, tiny_phantom(), n_boot=50)
    captions = pd.read_csv(simulated_run / "tables" / "captions.csv")
    assert len(captions) >= 3 and all((simulated_run / "figures" / f).is_file() for f in captions["figure"])
    assert captions["caption"].str.contains("Synthetic data").all()
    pointing = pd.read_csv(simulated_run / "tables" / "pointing.csv")
    assert pointing["value"].dropna().between(0, 1).all() and pointing["n"].sum() > 0


@pytest.mark.parametrize("which", ["no positive", "one patient", "one slice"])
def test_the_stage_survives_too_little_data(simulated_run, write_predictions, too_little, tmp_path, which):
    shutil.copytree(simulated_run, tmp_path / "run")
    rows = too_little(pd.read_parquet(simulated_run / "cohort.parquet"), which)
    write_predictions(tmp_path / "run", rows, (rows["fold"].iloc[0],))
    tables = explain(tmp_path / "run", None, n_boot=20)
    for name in ("subgroups", "shortcut"):
        assert tables[name].loc[tables[name]["value"].isna(), "note"].str.len().gt(0).all()
