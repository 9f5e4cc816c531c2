"What a user of a trained model gets must be what was evaluated, for every file that was given."

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from dicom_files import make_file

from ich_fastai.calibrate import calibrate, score_levels
from ich_fastai.evaluate import evaluate
from ich_fastai.core import InputError
from ich_fastai.labels import LABELS
from ich_fastai.model import load_model
from ich_fastai.predict import make_submission, predict_series, save_submission, summarize_studies


@pytest.fixture(scope="module")
def trained(simulated_run, write_predictions):
    "A run folder with an evaluated model."
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(simulated_run, cohort[cohort["fold"] < 2], (0, 1))
    evaluate(simulated_run, None, n_boot=20)
    return simulated_run


def test_a_studys_probability_is_the_one_that_was_evaluated(trained):
    config, predictions = (
        json.loads((trained / "model" / "model.json").read_text()),
        pd.read_parquet(trained / "predictions.parquet"),
    )
    study = score_levels(predictions)["study"]
    fitted = config["corrections"]["study_calibration"]
    slope, intercept = (np.array([fitted[label][name] for label in LABELS]) for name in ("slope", "intercept"))
    order = predictions["StudyInstanceUID"].drop_duplicates()
    got = summarize_studies(predictions.assign(error=None), config).loc[order, list(LABELS)]
    assert got.to_numpy() == pytest.approx(calibrate(study.x, slope, intercept), abs=1e-9)
    assert predictions["keep_rate"].max() < 1, "or the order of correction and maximum would not matter"


def test_each_file_is_a_row_that_can_be_told_apart(trained, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "good").write_bytes(make_file(SOPInstanceUID="ID_same"))
        (tmp_path / name / "bad").write_bytes(b"junk")
    result = predict_series(load_model(trained / "model", "cpu"), tmp_path).set_index("file")
    assert sorted(result.index) == ["a/bad", "a/good", "b/bad", "b/good"]
    assert result["error"].isna().tolist() == result["any"].notna().tolist() and result["error"].isna().sum() == 1
    assert result.loc["b/good", "error"] == "duplicate: same SOPInstanceUID as a/good"


@pytest.mark.parametrize("harm", ["[]", "{", "weights", "file", "device"])
def test_a_model_of_no_use_is_one_line(trained, tmp_path, harm):
    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    if harm in ("[]", "{"):
        (folder / "model.json").write_text(harm)
    elif harm == "weights":
        (folder / "weights.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError) as e:
        load_model(folder / "model.json" if harm == "file" else folder, "nowhere" if harm == "device" else "cpu")
    assert "\n" not in str(e.value)


def test_no_files_are_an_error(trained):
    with pytest.raises(InputError, match="no files"):
        predict_series(load_model(trained / "model", "cpu"), [])


def test_submission_follows_the_sample(tmp_path):
    sample = tmp_path / "sample.csv"
    sample.write_text("ID,Label\n" + "".join(f"ID_{s}_{label},0.5\n" for s in "cab" for label in LABELS))
    p = np.random.default_rng(0).uniform(size=(4, 6))
    table = make_submission([f"ID_{s}" for s in "abcd"], p, sample)
    assert table["ID"].to_list() == pd.read_csv(sample)["ID"].to_list() and list(table.columns) == ["ID", "Label"]
    assert table["Label"].to_list() == p[[2, 0, 1]].ravel().tolist()
    with pytest.raises(InputError, match="sample.csv: 6 of its rows have no prediction, e.g. ID_b_epidural"):
        make_submission(["ID_a", "ID_c"], p[:2], sample)
    predicted = pd.DataFrame(p, columns=LABELS).assign(SOPInstanceUID=[f"ID_{s}" for s in "abcd"])
    written = pd.read_csv(save_submission(predicted, sample, tmp_path / "submission.csv"))
    assert written["ID"].to_list() == table["ID"].to_list() and written["Label"].to_numpy() == pytest.approx(
        table["Label"].to_numpy(), abs=1e-12
    )
    with pytest.raises(InputError, match="6 rows have no probability from 0 to 1, e.g. ID_c_epidural"):
        save_submission(
            predicted.assign(
                **{label: predicted[label].where(predicted["SOPInstanceUID"] != "ID_c") for label in LABELS}
            ),
            sample,
            tmp_path / "no.csv",
        )
    assert not (tmp_path / "no.csv").exists()
    sample.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="has the columns a, b; a sample submission has ID,Label"):
        make_submission(["ID_a"], p[:1], sample)
