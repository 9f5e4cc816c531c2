"The JSON of a study says what the tables say, fits its schema and names nobody."

import json
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import PROJECT

from ich_fastai.deliver import ich_predict
from ich_fastai.evaluate import evaluate
from ich_fastai.exports import write_export
from ich_fastai.head import draw_head, make_rng
from ich_fastai.labels import LABELS

SCHEMA = json.loads((PROJECT / "docs" / "study.schema.json").read_text())


@pytest.fixture(scope="module")
def answer(simulated_run, write_predictions, tmp_path_factory):
    "An export's tables and its JSON."
    cohort, home = pd.read_parquet(simulated_run / "cohort.parquet"), tmp_path_factory.mktemp("answer")
    write_predictions(simulated_run, cohort[cohort["fold"] < 2], (0, 1))
    evaluate(simulated_run, None, n_boot=20)
    write_export(home / "in", draw_head(make_rng(5, 0)), [], ["thick", "coronal", "capture"], shrink=2)
    for path in filter(Path.is_file, (home / "in").rglob("*")):
        dataset = pydicom.dcmread(path)
        dataset.PatientName, dataset.InstitutionName, dataset.PatientBirthDate = (
            "CANARY^Ada",
            "CANARY Hospital",
            "19010203",
        )
        dataset.save_as(path)
    model, out = str(simulated_run / "model"), str(home / "out.csv")
    ich_predict(model, [str(home / "in")], out, device="cpu", json=str(home / "json"), html=str(home / "html"))
    slices, studies = pd.read_csv(home / "out.csv"), pd.read_csv(home / "out-studies.csv")
    files = sorted((home / "json").iterdir())
    assert len(files) == 1 == len(list((home / "html").iterdir()))
    return json.loads(files[0].read_text()), slices, studies, home


def test_it_fits_the_schema(answer):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(answer[0], SCHEMA)
    for wrong in ({"findings": {}}, {"schema": "another"}, {"PatientName": "Doe"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(answer[0] | wrong, SCHEMA)


def test_it_says_what_the_tables_say(answer):
    said, slices, studies, _ = answer
    for label in LABELS:
        assert said["findings"][label]["probability"] == pytest.approx(studies[label].iloc[0], abs=1e-9)
        called = studies[f"call_{label}"].iloc[0]
        assert said["findings"][label]["called"] == (None if np.isnan(called) else called)
        assert said["slices_called"][label] == slices.loc[slices[f"call_{label}"] == 1, "SOPInstanceUID"].to_list()
    assert [row["SeriesDescription"] for row in said["series"] if row["used"]] == ["thick"]
    assert all(row["reason"] for row in said["series"] if not row["used"]) and len(said["series"]) == 3


def test_nothing_names_anybody(answer):
    written = [path for path in answer[-1].rglob("*") if path.suffix in (".json", ".csv", ".html")]
    assert len(written) == 5
    for path in written:
        text = path.read_text()
        assert "CANARY" not in text and "19010203" not in text, path.name
