"The JSON of a study says what the tables say and names nobody; so do an archive's objects, which lie with its patient."

import importlib.util
import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import PROJECT
from highdicom.sr import ComprehensiveSR

from ich_fastai.core import InputError
from ich_fastai.deliver import ich_predict
from ich_fastai.evaluate import evaluate
from ich_fastai.exports import write_export
from ich_fastai.head import draw_head, make_rng
from ich_fastai.images import WHOSE
from ich_fastai.labels import LABELS, find_dataset
from ich_fastai.objects import RESEARCH, check_folders, stand_for
from ich_fastai.tiny import tiny_phantom

NAME = "CANARY^Ædå"
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
        dataset.SpecificCharacterSet, dataset.StudyDate, dataset.PatientSex = "ISO_IR 100", "20200101", "F"
        dataset.PatientName, dataset.InstitutionName, dataset.PatientBirthDate = (NAME, "CANARY Hospital", "19010203")
        dataset.save_as(path)
    model, out = str(simulated_run / "model"), str(home / "out.csv")
    folders = {name: str(home / name) for name in ("json", "html", "dicom")}
    ich_predict(model, [str(home / "in")], out, device="cpu", **folders)
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


# ---- the objects for an archive


def read_objects(home):
    "(report, picture) of the one study in a folder."
    report, picture = sorted((home / "dicom").iterdir(), key=lambda p: "picture" in p.name)
    return pydicom.dcmread(report), pydicom.dcmread(picture)


def predict(model, given, home):
    "(home, report, picture, good slices, studies) of the one study in `given`."
    out = home / "out.csv"
    ich_predict(model, list(map(str, given)), str(out), device="cpu", all_series=True, dicom=str(home / "dicom"))
    return home, *read_objects(home), pd.read_csv(out), pd.read_csv(home / "out-studies.csv")


@pytest.fixture(scope="module")
def thick(answer):
    "What `predict` gives of a plain series with a patient's name."
    _, slices, studies, home = answer
    return home, *read_objects(home), slices[slices["error"].isna()], studies


@pytest.fixture(scope="module")
def phantom(answer, simulated_run, tmp_path_factory):
    "The same of a study in RSNA's manner: ID_... for UIDs, no name, no SOP class."
    table, home = pd.read_parquet(simulated_run / "slices.parquet"), tmp_path_factory.mktemp("phantom")
    files = table.loc[table["StudyInstanceUID"] == table["StudyInstanceUID"].dropna().iloc[0], "file"]
    given = [find_dataset(tiny_phantom()).dicom_dir / name for name in files]
    return predict(str(simulated_run / "model"), given, home)


def all_values(ds, vr):
    "Values of this kind anywhere in a dataset."
    return [e.value for e in ds.iterall() if e.VR == vr and e.value]


def test_the_report_says_what_the_tables_say(thick):
    _, report, _, slices, studies = thick
    groups = ComprehensiveSR.from_dataset(report).content.get_image_measurement_groups()
    assert [g.tracking_identifier for g in groups] == list(LABELS)
    for label, group in zip(LABELS, groups, strict=True):
        numbers = {m.name.meaning: m.value for m in group.get_measurements()}
        assert numbers["Probability"] == pytest.approx(studies[label].iloc[0], abs=1e-5)
        said, call = {e.name.meaning: e.value.meaning for e in group.get_qualitative_evaluations()}, "call_" + label
        want = None if np.isnan(studies[call].iloc[0]) else ("Absent", "Present")[int(studies[call].iloc[0])]
        assert (said.get("Call at the threshold"), "Threshold of the call" in numbers) == (want, want is not None)
        shown = [i.referenced_sop_instance_uid for i in group.source_images]
        assert shown == slices.loc[slices[call].eq(1), "SOPInstanceUID"].to_list()
    text = " ".join(map(str, all_values(report, "UT")))
    assert RESEARCH in text and re.search(r"weights_sha256=[0-9a-f]{64}", text)
    read = {uid for _, _, uid, _ in ComprehensiveSR.from_dataset(report).get_evidence()}
    assert read == set(slices["SOPInstanceUID"])


def test_both_lie_with_the_study(thick):
    home, report, picture, slices, _ = thick
    source = pydicom.dcmread(next((home / "in" / "thick").iterdir()))
    for ds in (report, picture):
        assert (ds.StudyInstanceUID, ds.PatientID, str(ds.PatientName)) == (source.StudyInstanceUID, "P1", NAME)
        assert ds.SeriesInstanceUID != source.SeriesInstanceUID and RESEARCH in ds.SeriesDescription
        assert (ds.StudyDate, ds.PatientSex) == ("20200101", "F")
    top = slices["any"].idxmax()
    assert picture.SourceImageSequence[0].ReferencedSOPInstanceUID == slices.loc[top, "SOPInstanceUID"]


def test_research_only_stands_in_the_pixels(thick):
    page, bar = thick[2].pixel_array, 34
    assert (page[:bar] == (230, 159, 0)).all(2).mean() > 0.8 and page[bar:, :512].std() > 20
    assert np.array_equal(thick[2].PatientOrientation, ["L", "P"])


@pytest.mark.parametrize("of", ["thick", "phantom"])
def test_a_validator_finds_no_error(of, request):
    home = request.getfixturevalue(of)[0]
    if shutil.which("dciodvfy") is None:
        pytest.skip("no dciodvfy: apt-get install dicom3tools")
    for path in (home / "dicom").iterdir():
        done = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
        said = (done.stdout + done.stderr).splitlines()
        assert not [line for line in said if line.startswith("Error")] and len(said) > 0, path.name


def test_rsna_files_give_valid_identifiers(phantom):
    _, report, picture, slices, _ = phantom
    assert slices["SOPInstanceUID"].str.startswith("ID_").all()
    uids = all_values(report, "UI") + all_values(picture, "UI")
    assert len(uids) > 10 and all(pydicom.uid.UID(uid).is_valid for uid in uids)
    assert report.StudyInstanceUID == picture.StudyInstanceUID and report.PatientName == ""
    read = {uid for _, _, uid, _ in ComprehensiveSR.from_dataset(report).get_evidence()}
    assert len(read) == len(slices)


@pytest.mark.parametrize(
    ("keyword", "value", "expected"),
    [
        ("PatientSex", "female", ""),
        ("PatientSex", "F", "F"),
        ("StudyDate", "1 May", ""),
        ("StudyTime", "25:99", ""),
        ("AccessionNumber", "1" * 17, ""),
        ("PatientID", "x" * 65, ""),
        ("PatientID", "A 1", "A 1"),
        ("SOPClassUID", "", "1.2.840.10008.5.1.4.1.1.2"),
        ("StudyInstanceUID", "1.2.3", "1.2.3"),
    ],
)
def test_what_an_attribute_may_not_hold_is_left_empty(keyword, value, expected):
    image = dict.fromkeys(("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"), "")
    image |= {"study": "s", "series": 0, "file": "f", "frame": 0}
    whose = dict.fromkeys(WHOSE, "")
    (whose if keyword in whose else image)[keyword] = value
    stand = stand_for(SimpleNamespace(**image), whose)
    assert stand[keyword].value == expected
    assert all(pydicom.uid.UID(uid).is_valid for uid in all_values(stand, "UI"))


def test_frames_of_an_enhanced_file_in_a_zip_are_named(answer, simulated_run, tmp_path):
    write_export(tmp_path / "in", draw_head(make_rng(5, 0)), [], ["enhanced"], shrink=2)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as packed:
        packed.write(tmp_path / "in" / "enhanced" / "IM0001", "IM0001")
    _, report, picture, slices, _ = predict(str(simulated_run / "model"), [tmp_path / "in.zip"], tmp_path)
    evidence = ComprehensiveSR.from_dataset(report).get_evidence()
    assert [(uid, kind.name) for _, _, uid, kind in evidence] == [
        (slices["SOPInstanceUID"].iloc[0], "Enhanced CT Image Storage")
    ]
    groups = ComprehensiveSR.from_dataset(report).content.get_image_measurement_groups()
    for label, group in zip(LABELS, groups, strict=True):
        frames = slices.loc[slices[f"call_{label}"].eq(1), "frame"].to_list()
        assert [i.referenced_frame_numbers for i in group.source_images] == ([frames] if frames else [])
    assert picture.SourceImageSequence[0].ReferencedFrameNumber == slices.loc[slices["any"].idxmax(), "frame"]


@pytest.mark.parametrize("option", ["dicom", "html", "json"])
def test_a_folder_of_others_is_refused(option, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "IM0001").touch()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "study-0123abcd-report.dcm").touch()
    check_folders(["elsewhere"], **{option: str(tmp_path / "ours")})
    for folder, why in (
        ("in", "holds other files, e.g. IM0001"),
        ("in/deep", "which is read"),
        ("in/IM0001", "a file"),
    ):
        given = [str(tmp_path / "in")] if folder == "in/deep" else []
        with pytest.raises(InputError, match=why):
            check_folders(given, **{option: str(tmp_path / folder)})


def test_without_the_extra_one_line_names_the_remedy(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "highdicom" else found(name, *a))
    with pytest.raises(InputError, match=r'pip install "ich_fastai\[dicom\]"') as e:
        ich_predict("no model", [str(tmp_path)], str(tmp_path / "out.csv"), dicom=str(tmp_path / "objects"))
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())
