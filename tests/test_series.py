"An export as a hospital makes it: one series is read, and each other has its reason."

import shutil
import zipfile

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from dicom_files import HEAD, make_file

from ich_fastai.bleeding import draw_bleed
from ich_fastai.cache import Decoder
from ich_fastai.core import InputError
from ich_fastai.dicom import DicomError, read_slice
from ich_fastai.exports import SERIES, View, draw_view, save_dataset, write_export, write_view
from ich_fastai.cohort import measure_noise
from ich_fastai.geometry import RAYS, REACH, Geometry, measure_look
from ich_fastai.head import draw_head, make_rng
from ich_fastai.images import refuse_image
from ich_fastai.series import Sight, format_series, order_images, read_series, refuse_extent, refuse_sight, refuse_tilt
from ich_fastai.series import survey_files

TRAINING = Geometry((220.0, 240.0, 264.0), (8.0, 10.0, 12.0))
NAMES = [*SERIES, "scout", "capture", "report", "enhanced"]


@pytest.fixture(scope="module")
def head():
    rng = make_rng(5, 0)
    return draw_head(rng), [draw_bleed(rng, "intraparenchymal")]


@pytest.fixture(scope="module")
def export(head, tmp_path_factory):
    "A study with every series; SeriesInstanceUIDs by name."
    folder = tmp_path_factory.mktemp("export")
    return folder, write_export(folder, *head, NAMES, shrink=2)


@pytest.fixture(scope="module")
def survey(export, tmp_path_factory):
    return survey_files(export[0], tmp_path_factory.mktemp("scratch"), TRAINING)


REASONS = {
    "bone": "sharp kernel: H70h",
    "noisy": "noise of",
    "coronal": "not axial: 90",
    "sagittal": "not axial: 90",
    "contrast": "contrast: ULTRAVIST 300",
    "short": "5 positions",
    "iodine": "not in HU: RescaleType is MGML",
    "scout": "a localizer",
    "capture": "no CT image: Secondary Capture",
    "report": "no CT image: X-Ray Radiation Dose SR",
}


@pytest.mark.parametrize("name", NAMES)
def test_each_series_is_used_or_has_its_reason(survey, export, name):
    row = survey.series[survey.series["uid"].eq(export[1][name])].iloc[0]
    if name == "thick":
        assert row["used"] and row["reason"] == ""
    else:
        assert not row["used"] and row["reason"].startswith(REASONS.get(name, "usable; another series comes first"))


PLAIN = ["AXIAL POST FOSSA 2.5", "POST OP HEAD", "HEAD POST TPA", "POST TRAUMA", "POSTERIOR FOSSA", "CTA PRE CONTRAST"]
PLAIN += ["HEAD PRECONTRAST", "NON CONTRAST HEAD", "HEAD W/O CONTRAST", "PREOP HEAD"]
ENHANCED = ["CTA COW PREVIEW", "CT ANGIO (PRESET 2)", "HEAD W CONTRAST COMPRESSED", "AX POST-CON", "HEAD POST KM"]
ENHANCED += ["HEAD POST 5.0", "AXIAL POST 5.0 H31S", "POST C 5MM", "BRAIN POST 3MM", "AX POST STD"]
ENHANCED += ["POST GAD", "POST INJ 5.0", "POSTCONTRAST", "AXIAL POST", "CT PERFUSION"]


@pytest.mark.parametrize("name", [*PLAIN, *ENHANCED])
def test_a_description_speaks_of_contrast_or_does_not(name):
    series = pd.DataFrame({"ConvolutionKernel": [""], "SeriesDescription": [name], "ContrastBolusAgent": [""]})
    reason = refuse_sight(series, Sight(heads=1.0), 5.0)
    assert reason == (f"contrast: {name}" if name in ENHANCED else "")


def test_the_table_fits_a_screen(survey):
    screen = format_series(survey.series)
    assert max(map(len, screen.splitlines())) <= 80 and screen.count("\n*") == 1


def pixels_of(folder, scratch, size=64):
    survey = survey_files(folder, scratch, TRAINING)
    row = next(survey.series[survey.series["used"]].itertuples())
    with Decoder() as decoder:
        return read_series(survey.images.loc[row.images], row, size, TRAINING, decoder)


def brain_difference(a, b):
    "Mean absolute difference through the brain window, 0 to 1."
    a, b = (np.clip(x.astype(float), 0, 80) / 80 for x in (a, b))
    return np.abs(a - b).mean()


def test_what_is_in_the_trainings_geometry_is_not_touched(export, tmp_path):
    stack = pixels_of(export[0] / "thick", tmp_path)
    files = sorted((export[0] / "thick").iterdir())
    assert stack.step == 1 and not stack.notes
    np.testing.assert_array_equal(stack.hu, [read_slice(path)[0] for path in files])


@pytest.mark.parametrize("name", ["mirrored", "turned", "feet", "enhanced", "wide"])
def test_other_geometries_come_out_like_the_straight_one(export, tmp_path, name):
    straight, other = pixels_of(export[0] / "thick", tmp_path), pixels_of(export[0] / name, tmp_path)
    assert other.hu.shape == straight.hu.shape, "slices from the feet to the top, as many"
    assert brain_difference(straight.hu, straight.hu[:, ::-1]) > 0.08, "or nothing is compared"
    assert brain_difference(straight.hu, other.hu) < (0.08 if name == "wide" else 0.04)


def test_thin_slices_become_slabs_of_the_trainings_kind(export, tmp_path):
    thin = pixels_of(export[0] / "thin", tmp_path)
    assert len(thin.slab) == 62 and len(thin.hu) == 31 and thin.step == 2
    assert np.bincount(thin.slab).tolist() == [2] * 31
    files = sorted((export[0] / "thin").iterdir())[20:40]
    noise = np.median([measure_noise(hu) for hu in thin.hu[10:20]])
    assert noise < 0.85 * np.median([measure_noise(read_slice(path)[0]) for path in files]), "1 / sqrt(2) of it"


def copy_with(source, target, change):
    "A series whose files are changed: change(dataset, number)."
    for k, path in enumerate(sorted(source.iterdir())):
        ds = pydicom.dcmread(path)
        change(ds, k)
        save_dataset(ds, target / path.name)


def empty_uids(ds, k):
    ds.SOPInstanceUID = ds.SeriesInstanceUID = ds.StudyInstanceUID = ""


def without_position(ds, k):
    del ds.ImagePositionPatient, ds.ImageOrientationPatient
    ds.InstanceNumber = 100 - k


def without_order(ds, k):
    without_position(ds, k)
    del ds.InstanceNumber


def test_emptied_identifiers_keep_patients_apart(export, tmp_path):
    for patient in ("A", "B"):

        def change(ds, k, patient=patient):
            empty_uids(ds, k)
            ds.PatientID = patient

        copy_with(export[0] / "thick", tmp_path / "x" / patient, change)
    survey = survey_files(tmp_path / "x", tmp_path, TRAINING)
    assert survey.series["used"].tolist() == [True, True] and survey.images["study"].nunique() == 2
    assert survey.images.groupby("study")["PatientID"].nunique().max() == 1


def test_one_study_uid_of_two_patients_is_two_studies(export, tmp_path):
    for patient in ("A", "B"):
        copy_with(export[0] / "thick", tmp_path / "x" / patient, lambda ds, k, p=patient: setattr(ds, "PatientID", p))
    survey = survey_files(tmp_path / "x", tmp_path, TRAINING)
    assert survey.images["study"].nunique() == 2 and survey.series["used"].all()
    assert not survey.images["error"].str.startswith("duplicate").any()


def test_without_positions_numbers_tell_the_order(export, tmp_path):
    copy_with(export[0] / "thick", tmp_path / "x", without_position)
    survey = survey_files(tmp_path / "x", tmp_path, TRAINING)
    row = survey.series.iloc[0]
    assert row["used"] and "InstanceNumber" in row["notes"]
    numbers = survey.images.loc[row["images"], "InstanceNumber"].map(lambda v: v[0])
    assert numbers.tolist() == sorted(numbers), "100 comes after 99"


def test_without_any_order_each_slice_is_its_own_neighbor(export, tmp_path):
    copy_with(export[0] / "thick", tmp_path / "x", without_order)
    stack = pixels_of(tmp_path / "x", tmp_path)
    assert stack.step == 0 and len(stack.hu) == 16


def test_a_dose_page_or_scout_in_the_series_is_left_out(export, tmp_path):
    shutil.copytree(export[0] / "thick", tmp_path / "x")
    uid = export[1]["thick"]
    for name, change in {
        "page": dict(ImagePositionPatient=None, ImageOrientationPatient=None),
        "scout": dict(ImageOrientationPatient=["0", "1", "0", "0", "0", "-1"]),
    }.items():
        tags = dict(PatientID="P1", StudyInstanceUID="2.25.1", SeriesInstanceUID=uid, SOPInstanceUID=f"9.{len(name)}")
        (tmp_path / "x" / name).write_bytes(make_file(**(tags | change)))
    images = survey_files(tmp_path / "x", tmp_path, TRAINING).images.set_index("file")["error"]
    assert images["page"] == "no orientation, where the others of its series have one"
    assert images["scout"] == "lies across the others of its series"
    assert images.ne("").sum() == 2


@pytest.mark.parametrize("tag", ["AcquisitionNumber", None])
def test_two_time_points_are_told_apart_or_refused(export, tmp_path, tag):
    for k in (1, 2):
        change = {"SOPInstanceUID": lambda ds, i, k=k: f"2.25.7.{k}.{i}", tag: lambda ds, i, k=k: k}

        def apply(ds, i, change=change):
            for name, value in change.items():
                if name:
                    setattr(ds, name, value(ds, i))

        copy_with(export[0] / "thick", tmp_path / "x" / str(k), apply)
    series = survey_files(tmp_path / "x", tmp_path, TRAINING).series
    if tag:
        assert series["used"].tolist() == [True, False] and "time point 2 of 2" in series["reason"][1]
    else:
        assert series["used"].tolist() == [False] and "no tag tells its time points apart" in series["reason"][0]


def test_a_zip_and_a_dicomdir_are_read(export, tmp_path):
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as packed:
        for path in (export[0] / "thick").iterdir():
            packed.write(path, f"a/b/{path.name}")
    (tmp_path / "scratch").mkdir()
    survey = survey_files(tmp_path / "study.zip", tmp_path / "scratch", TRAINING)
    assert survey.series["used"].tolist() == [True] and survey.images["file"][0] == "IM0001"
    shutil.copytree(export[0] / "thick", tmp_path / "cd" / "A")
    records = []
    for path in sorted((tmp_path / "cd" / "A").iterdir()):
        record = pydicom.Dataset()
        record.DirectoryRecordType, record.ReferencedFileID = "IMAGE", ["A", path.name]
        records.append(record)
    directory = pydicom.Dataset()
    directory.SOPClassUID, directory.SOPInstanceUID = "1.2.840.10008.1.3.10", "2.25.8"
    directory.DirectoryRecordSequence = pydicom.Sequence(records)
    save_dataset(directory, tmp_path / "cd" / "DICOMDIR")
    survey = survey_files(tmp_path / "cd" / "DICOMDIR", tmp_path / "scratch", TRAINING)
    assert survey.series["used"].tolist() == [True] and len(survey.images) == 16
    data = (tmp_path / "study.zip").read_bytes()
    (tmp_path / "bad.zip").write_bytes(data[:2000] + bytes(2000) + data[4000:])
    with pytest.raises(InputError, match="unpack it and give the folder"):
        survey_files(tmp_path / "bad.zip", tmp_path / "scratch", TRAINING)


def test_another_body_part_has_no_head(head, tmp_path):
    ids = {"PatientID": "P", "StudyInstanceUID": "1", "SeriesInstanceUID": "1.1"}
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    chest = np.where(x**2 + (y / 0.7) ** 2 < 0.9, np.where((abs(x) - 0.4) ** 2 * 6 + y**2 * 3 < 0.5, -850, 40), -1000)
    write_view(tmp_path / "x", *head, View(n=16, size=64), ids, change=lambda hu: chest + 0 * hu)
    series = survey_files(tmp_path / "x", tmp_path, TRAINING).series
    assert not series["used"].any() and series["reason"][0] == "no head to be seen"


def test_a_series_can_be_asked_for(export, tmp_path):
    series = survey_files(export[0] / "bone", tmp_path, TRAINING, export[1]["bone"]).series
    assert series["used"].tolist() == [True] and "sharp kernel" in series["reason"][0]
    with pytest.raises(InputError, match="--series nothing: no readable series"):
        survey_files(export[0] / "bone", tmp_path, TRAINING, "nothing")


LOW = HEAD.astype(np.uint16)


@pytest.mark.parametrize(
    ("name", "data"),
    {
        "high bit 15 of 12": make_file(LOW << 4, BitsStored=12, HighBit=15),
        "high bit 13 of 12": make_file(LOW << 2, BitsStored=12, HighBit=13),
        "no preamble": make_file(LOW, BitsStored=12)[132:],
    }.items(),
)
def test_odd_files_are_read(name, data):
    np.testing.assert_array_equal(read_slice(data)[0], read_slice(make_file(LOW, BitsStored=12))[0])


@pytest.mark.parametrize(
    "tags",
    [
        dict(stored=np.full((64, 64), -2000, np.int16), PixelPaddingValue=-2000),
        dict(stored=np.full((64, 64), 63536, np.uint16), PixelPaddingValue=63536),
        dict(stored=np.full((64, 64), 2096, np.uint16), PixelPaddingValue=63536, BitsStored=12),
        dict(stored=np.full((64, 64), 100, np.int16), PixelPaddingValue=0, PixelPaddingRangeLimit=120),
    ],
    ids=["signed", "unsigned", "more bits than stored", "a range"],
)
def test_padding_becomes_air(tags):
    stored = tags.pop("stored")
    stored[16:48, 16:48] = 1064
    hu = read_slice(make_file(stored, **tags))[0]
    assert hu[0, 0] == -1000 and hu[32, 32] == 40


def test_water_is_no_padding():
    stored = np.zeros((64, 64), np.int16)
    stored[8:56, 8:56], stored[30, 30] = 40, 0
    hu = read_slice(make_file(stored, PixelPaddingValue=0, RescaleIntercept="0"))[0]
    assert hu[0, 0] == -1000 and hu[30, 30] == 0 and hu[20, 20] == 40


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        (dict(RescaleType="MGML"), "not in HU: RescaleType is MGML"),
        (dict(HighBit=9), "bad pixel format: 16 bits that end at bit 9"),
    ],
)
def test_what_is_not_hu_is_refused(tags, why):
    with pytest.raises(DicomError, match=why):
        read_slice(make_file(**tags))


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({}, ""),
        ({"BurnedInAnnotation": "NO"}, ""),
        ({"BurnedInAnnotation": "YES"}, "text burned into the image: BurnedInAnnotation is YES"),
        ({"ImageType": "DERIVED SECONDARY PERFUSION"}, "not in HU: ImageType is DERIVED SECONDARY PERFUSION"),
        ({"ImageType": "DERIVED PRIMARY DENSITY"}, "not in HU: ImageType is DERIVED PRIMARY DENSITY"),
        ({"ImageType": "DERIVED PRIMARY CBV"}, "not in HU: ImageType is DERIVED PRIMARY CBV"),
        ({"ImageType": "DERIVED PRIMARY CT_PERFUSION"}, "not in HU: ImageType is DERIVED PRIMARY CT_PERFUSION"),
        ({"ImageType": "DERIVED PRIMARY ELECTRON_DENSITY"}, "not in HU: ImageType is DERIVED PRIMARY ELECTRON_DENSITY"),
        ({"ImageType": "DERIVED SECONDARY SCREEN_SAVE"}, "a screen save: ImageType is DERIVED SECONDARY SCREEN_SAVE"),
        ({"RescaleType": "HU_MOD"}, "not in HU: RescaleType is HU_MOD"),
        ({"ImageType": "ORIGINAL PRIMARY AXIAL LOW_DOSE STD_3D"}, ""),
    ],
)
def test_a_tag_refuses_an_image(tags, why):
    plain = {"ImageType": "ORIGINAL PRIMARY AXIAL", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "Modality": "CT"}
    plain |= {"pixels": True, "RescaleType": "HU", "BurnedInAnnotation": ""}
    assert refuse_image(plain | tags) == why


@pytest.mark.parametrize(("degrees", "why"), [(34.9, ""), (-34.9, ""), (35.5, "not axial: 36 degrees from it")])
def test_a_gantry_tilts_so_far(degrees, why):
    a = np.radians(degrees)
    lying = pd.DataFrame({"ImageOrientationPatient": [(1.0, 0, 0, 0, np.cos(a), np.sin(a))]})
    assert refuse_tilt(lying) == why


@pytest.mark.parametrize(
    ("n", "mm", "why"), [(8, 80, ""), (8, 79, "covers 79 mm: a head needs 80 or more"), (7, 99, "7 positions: a head")]
)
def test_a_head_is_so_long(n, mm, why):
    found = refuse_extent(pd.DataFrame({"z_mm": np.linspace(0, mm, n)}), float(mm))
    assert found.startswith(why) and bool(found) == bool(why)


def test_a_brain_that_is_bright_has_had_contrast():
    series = pd.DataFrame({"ConvolutionKernel": [""], "SeriesDescription": [""], "ContrastBolusAgent": [""]})
    assert refuse_sight(series, Sight(heads=1.0, bright=0.04), 5.0) == ""
    assert refuse_sight(series, Sight(heads=1.0, bright=0.05), 5.0) == "5% of the brain is bright, as by contrast"


def test_without_positions_locations_tell_the_order_before_numbers():
    series = pd.DataFrame(
        {"z_mm": np.nan, "SliceLocation": [(5.0,), (-5.0,), (0.0,)], "InstanceNumber": [(1,), (2,), (3,)]}
    )
    ordered, note, known = order_images(series)
    assert ordered["z_mm"].tolist() == [-5, 0, 5] and note == "no position in space: ordered by SliceLocation" and known
    again, note, _ = order_images(series.assign(SliceLocation=[(0.0,)] * 3))
    assert again.index.tolist() == [0, 1, 2] and note.endswith("InstanceNumber") and again["z_mm"].isna().all()


def test_a_missing_plugins_reason_keeps_its_remedy(monkeypatch):
    def fail(*_):
        raise RuntimeError("x" * 300 + " install pylibjpeg")

    monkeypatch.setattr("ich_fastai.dicom._read_image", fail)
    with pytest.raises(DicomError, match="install pylibjpeg"):
        read_slice(make_file())


def test_the_real_series_is_chosen_in_order(real_data, tmp_path):
    survey = survey_files(real_data / "rsna" / "stage_1_train_images", tmp_path)
    used = survey.series[survey.series["used"]].iloc[0]
    assert survey.series["used"].sum() == 1 and used["slices"] == 36
    z = survey.images.loc[used["images"], "z_mm"].to_numpy()
    assert (np.diff(z) > 0).all() and used["spacing_mm"] == pytest.approx(np.median(np.diff(z)), abs=0.01)
    assert survey.series.loc[~survey.series["used"], "reason"].str.startswith("1 position").all()


def test_real_cq500_slices_show_heads(real_data, tmp_path):
    series = survey_files(real_data / "cq500", tmp_path, every=True).series
    series, other = series[series["used"]], series[~series["used"]]
    assert (series["heads"] == 1).all() and series["thickness_mm"].tolist() == [0.625, 5.0]
    assert other["reason"].str.startswith("not a DICOM file").all()


def test_a_head_in_a_corner_is_measured_whatever_memory_held(head, monkeypatch):
    "Rays that leave the image end in air."
    hu, looks, warp = draw_view(*head, View(size=64, noise=0.0), 8, make_rng(0)), [], cv2.warpPolar
    for fill in (-1000, 3000):
        held = np.full((RAYS, REACH), fill, np.float32)  # as a new array may have it
        monkeypatch.setattr(cv2, "warpPolar", lambda *args, held=held: warp(*args, dst=held))
        looks.append(measure_look(hu, (3.75, 3.75)))
    assert looks[0] == looks[1] and looks[0].ring > 0.9


def test_a_head_beyond_the_border_is_said(head, tmp_path):
    ids = {"PatientID": "P", "StudyInstanceUID": "1", "SeriesInstanceUID": "1.1"}
    write_view(tmp_path / "x", *head, View(field=150.0, size=64), ids)
    series = survey_files(tmp_path / "x", tmp_path, TRAINING).series
    assert series["used"].tolist() == [True] and "border cuts the head" in series["notes"][0]
