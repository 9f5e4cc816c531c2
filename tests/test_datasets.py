"Other hospitals' datasets: what a reader gives is what the phantom laid out, pixel by pixel and label by label."

import gzip
import shutil
import sys
from itertools import product

import numpy as np
import pandas as pd
import pytest
from conftest import LAYOUT_SIZE as SIZE

from ich_fastai.batches import Settings
from ich_fastai.core import DicomError, InputError
from ich_fastai.datasets import ADAPTERS, check_independent, find_facts, open_dataset, read_cq500
from ich_fastai.datasets import read_datasets
from ich_fastai.external import PICTURE_SETS
from ich_fastai.labels import LABELS, name_source, read_labels, tabulate_labels
from ich_fastai.layouts import LAYOUTS, write_layout
from ich_fastai.cohort import describe_data
from ich_fastai.model import make_card
from ich_fastai.tiny import tiny_phantom
from ich_fastai.volumes import read_nifti, stand_volume


@pytest.mark.parametrize("name", LAYOUTS)
def test_labels_level_and_studies_are_the_phantoms(layouts, name):
    folder, truth = layouts[name]
    dataset = open_dataset(name, folder)
    wanted = truth.studies() if name == "cq500" else truth.labels
    there = [label for label in LABELS if label in dataset.labels]
    assert there == (["any"] if name in ("instance2022", "phe_sich") else list(LABELS))
    assert dataset.level == ("study" if name == "cq500" else "slice")
    assert dataset.labels[there].sort_index().equals(wanted[there].sort_index().astype("uint8"))
    assert dataset.studies == list(truth.hu) and not dataset.reasons
    assert dataset.labels["study"].nunique() == dataset.labels["PatientID"].nunique() == len(truth.hu)
    if name == "cq500":
        assert dataset.labels["category"].to_list() == ["B1", "B2", "B1"]
    else:
        assert dataset.labels["study"].sort_index().equals(truth.labels["study"].sort_index())


@pytest.mark.parametrize("name", LAYOUTS)
def test_slices_their_order_and_their_sides_are_the_phantoms(layouts, name):
    folder, truth = layouts[name]
    dataset = open_dataset(name, folder)
    for study, hu in list(truth.hu.items())[1 : 2 if name in ("cq500", "folder") else None]:  # that bleeds
        stack = dataset.read(study, SIZE)
        assert stack.ids == tuple(truth.ids[study]) and not stack.errors and stack.step == 1
        assert np.allclose(np.diff(stack.z_mm), 5 if name == "phe_sich" else 10)
        if name != "phe_sich":
            assert np.array_equal(stack.hu, hu) and not np.array_equal(stack.hu, hu[:, :, ::-1])
            continue
        about = PICTURE_SETS[name]
        center, width = about.exceptions.get(study, about.burned)
        inside = np.abs(hu - center) < width / 2 - 1
        assert inside.mean() > 0.1 and np.abs(stack.hu - hu)[inside].max() <= 1
        assert "no pixel spacing" in stack.notes[0]
    assert all(table["used"].sum() == 1 for table in dataset.series.values())
    assert not {"PatientID", "file"} & set().union(*dataset.series.values()), "nobody's name"
    if name == "cq500":
        reasons = dataset.series["CQ500-CT-12"].set_index("description")["reason"]
        assert reasons["thick"] == "" and reasons["bone"].startswith("sharp kernel")
        assert reasons["contrast"].startswith("contrast") and reasons["scout"].startswith("a localizer")


@pytest.mark.parametrize("key", ["StudyInstanceUID", "folder"])
def test_a_hospitals_labels_may_be_by_study(tmp_path, key):
    truth = write_layout("folder", tmp_path, size=SIZE, numbers=(1, 3), key=key)
    dataset = open_dataset("folder", tmp_path)
    assert dataset.level == "study" and dataset.labels[list(LABELS)].equals(truth.studies().astype("uint8"))
    if key == "StudyInstanceUID":  # a folder is read as those of CQ500
        assert np.array_equal(dataset.read("2.25.3", SIZE).hu, truth.hu["2.25.3"])


def test_labels_that_do_not_exist_stay_out(tmp_path):
    write_layout("folder", tmp_path, size=SIZE, numbers=(1,), key="folder")
    csv = tmp_path / "labels.csv"
    table = pd.read_csv(csv)
    table[["folder", "subdural", "any"]].to_csv(csv, index=False)
    assert list(open_dataset("folder", tmp_path).labels) == ["subdural", "any", "study", "PatientID"]
    table.drop(columns="any").assign(subdural=1).to_csv(csv, index=False)
    assert open_dataset("folder", tmp_path).labels["any"].eq(1).all()  # the OR of all five


def edit(csv, change):
    "Change a table of labels in place."
    change(pd.read_csv(csv, dtype=str)).to_csv(csv, index=False)


def empty(folder):
    "A folder without its files."
    shutil.rmtree(folder)
    folder.mkdir()


WRONG = {  # layout, what is done to it, the message
    "no folder": ("cq500", lambda d: shutil.rmtree(d), "no such folder; give the one that holds CQ500CT<N>"),
    "another folder": ("cq500", empty, "has no folder CQ500CT<N> CQ500CT<N>"),
    "no reads.csv": ("cq500", lambda d: (d / "reads.csv").unlink(), "reads.csv: no such file"),
    "another table": (
        "cq500",
        lambda d: edit(d / "reads.csv", lambda t: t[["name", "Category"]]),
        "reads.csv: has no column R1:EDH",
    ),
    "a label of 2": (
        "cq500",
        lambda d: edit(d / "reads.csv", lambda t: t.assign(**{"R1:ICH": "2"})),
        "3 rows with a label that is not 0 or 1",
    ),
    "other studies": (
        "cq500",
        lambda d: edit(d / "reads.csv", lambda t: t.assign(name="CQ500-CT-9" + t["name"].str[9:])),
        "labels of CQ500-CT-97, CQ500-CT-912, CQ500-CT-9490, but files of CQ500-CT-",
    ),
    "no volumes": ("ct_ich", lambda d: empty(d / "ct_scans"), "but no files: nothing fits"),
    "no masks": ("instance2022", lambda d: empty(d / "train_2" / "label"), "no mask NNN.nii.gz in it"),
    "no pictures": ("phe_sich", lambda d: empty(d / "slices"), "but no files: nothing fits"),
    "no key": (
        "folder",
        lambda d: edit(d / "labels.csv", lambda t: t.rename(columns={"SOPInstanceUID": "name"})),
        "labels.csv: has no column that names what is labelled: SOPInstanceUID, StudyInstanceUID, folder",
    ),
    "no label": (
        "folder",
        lambda d: edit(d / "labels.csv", lambda t: t[["SOPInstanceUID"]]),
        "labels.csv: has no label; name a column epidural",
    ),
    "other slices": (
        "folder",
        lambda d: edit(d / "labels.csv", lambda t: t.assign(SOPInstanceUID=t["SOPInstanceUID"] + ".7")),
        "labels of other slices, but files of 2.25.1",
    ),
    "a name twice": (
        "folder",
        lambda d: edit(d / "labels.csv", lambda t: t.assign(SOPInstanceUID="2.25.1.1.1")),
        "31 rows with a label that is not 0 or 1, a name that occurs twice",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line(layouts, tmp_path, case):
    name, harm, message = WRONG[case]
    folder = shutil.copytree(layouts[name][0], tmp_path / "data")
    harm(folder)
    with pytest.raises(InputError) as e:
        open_dataset(name, folder)
    assert message in str(e.value) and "\n" not in str(e.value)


BROKEN = {  # layout, study, what is done to its files, the reason
    "no images": ("cq500", "CQ500-CT-7", lambda d: empty(d / "CQ500CT7 CQ500CT7"), "nothing in it"),
    "one series, bone": (
        "cq500",
        "CQ500-CT-7",
        lambda d: [shutil.rmtree(d / "CQ500CT7 CQ500CT7" / "Unknown Study" / s) for s in ("thick", "contrast")],
        "no usable series: bone: sharp kernel: H70h; scout: a localizer",
    ),
    "no volume": ("ct_ich", "049", lambda d: (d / "ct_scans" / "049.nii").write_bytes(b"x" * 500), "as NIfTI"),
    "fewer labels": (
        "ct_ich",
        "049",
        lambda d: edit(d / "hemorrhage_diagnosis_raw_ct.csv", lambda t: t.drop(index=3)),
        "16 slices, but labels of others: 1 of either do not fit",
    ),
    "no picture": (
        "phe_sich",
        "0001",
        lambda d: [p.write_bytes(b"x") for p in (d / "slices").glob("0001*")],
        "no readable picture",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_study_that_cannot_be_read_is_one_line_and_a_reason(layouts, tmp_path, case):
    name, study, harm, message = BROKEN[case]
    folder = shutil.copytree(layouts[name][0], tmp_path / "data")
    harm(folder)
    dataset = open_dataset(name, folder)
    with pytest.raises(InputError) as e:
        dataset.read(study, SIZE)
    assert str(e.value).startswith(f"{name}, study {study}: ") and "\n" not in str(e.value)
    assert message in dataset.reasons[study]
    assert list(dataset.reasons) == [study]


@pytest.mark.parametrize("flips", list(product((1, -1), repeat=3)))
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("tilt", [0, 20])
def test_a_volume_stands_upright_however_it_is_stored(flips, swapped, tilt):
    "A head of 6 x 5 px (front to back, right to left) and 4 slices; columns 0.5 mm, rows 0.4, slices 5 mm apart."
    upright = np.arange(4 * 6 * 5).reshape(4, 6, 5)
    a = np.radians(tilt)  # around the axis from right to left, as a gantry
    axes = np.array([[-0.5, 0, 0], [0, -0.4 * np.cos(a), -0.4 * np.sin(a)], [0, -5 * np.sin(a), 5 * np.cos(a)]])
    voxels, affine = upright.transpose(2, 1, 0), np.eye(4)
    for axis, flip in enumerate(flips):
        voxels = np.flip(voxels, axis) if flip < 0 else voxels
        affine[:3, 3] += axes[axis] * (voxels.shape[axis] - 1) * (flip < 0)
        affine[:3, axis] = axes[axis] * flip
    if swapped:
        voxels, affine[:, [0, 1]] = voxels.transpose(1, 0, 2), affine[:, [1, 0]]
    volume = stand_volume(voxels, affine)
    assert np.allclose(np.abs(volume.spacing), (0.4, 0.5)) and np.allclose(np.diff(volume.z_mm), 5 * flips[2])
    assert np.array_equal(volume.slices, upright[:: flips[2]])  # in the file's order


@pytest.mark.parametrize(
    "affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.diag([5.0, 0.5, 0.5, 1])[[2, 1, 0, 3]]]
)
def test_a_volume_that_is_not_axial_is_refused(affine):
    with pytest.raises(DicomError, match="no geometry|not axial"):
        stand_volume(np.zeros((3, 3, 3)), affine)


def test_values_of_a_nifti_file_are_hu(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(np.full((4, 4, 2), 30.0), np.diag([-1.0, -1, 5, 1]))
    image.header.set_slope_inter(0.5, -7)  # of what is stored
    image.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "a.nii.gz")
    assert (read_nifti(tmp_path / "a.nii.gz").slices == 0.5 * 30 - 7).all()
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 2, 2)), np.eye(4)), tmp_path / "b.nii")
    with pytest.raises(DicomError, match="b.nii: not a volume"):
        read_nifti(tmp_path / "b.nii")


HEADERS = {  # of NIfTI: where, what is written there, the message
    "another datatype": (70, np.int16(9999), "cannot be read"),
    "colors": (70, np.array([128, 24], np.int16), "not in HU"),
    "an offset beyond the file": (108, np.float32(1e9), "cannot be read"),
    "an offset that is none": (108, np.float32("nan"), "cannot be read"),
    "a negative side": (42, np.int16(-4), "not a volume|cannot be read"),
    "more slices than there are": (46, np.int16(30_000), "cannot be read"),
    "huge": (42, np.full(3, 32_767, np.int16), "not a volume"),
}


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_header_that_lies_is_one_line(tmp_path, case, suffix):
    nibabel = pytest.importorskip("nibabel")
    at, value, message = HEADERS[case]
    data = bytearray(nibabel.Nifti1Image(np.zeros((4, 4, 2), np.int16), np.eye(4)).to_bytes() + bytes(64))
    data[at : at + value.nbytes] = value.tobytes()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(data) if suffix == ".nii.gz" else data)
    with pytest.raises(DicomError, match=f"a{suffix}: ({message})") as e:
        read_nifti(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["ct_ich", "instance2022"])
def test_without_nibabel_one_line_says_so_before_any_study(layouts, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(InputError, match="need nibabel: pip install"):
        open_dataset(name, layouts[name][0])


def test_rsnas_layout_is_read_like_any_other():
    phantom = tiny_phantom()
    dataset = open_dataset("rsna", phantom)
    labels = read_labels(phantom / "stage_1_train.csv")
    assert dataset.level == "slice" and list(dataset.labels)[:6] == list(LABELS)
    assert dataset.labels[list(LABELS)].equals(labels.loc[dataset.labels.index])
    assert len(labels) - len(dataset.labels) < 5 and dataset.labels["PatientID"].nunique() > 5
    stack = dataset.read(dataset.studies[0], 64)
    assert set(stack.ids) <= set(dataset.labels.index[dataset.labels["study"].eq(dataset.studies[0])])


def test_missing_files_and_labels_are_said(layouts, tmp_path):
    folder = shutil.copytree(layouts["cq500"][0], tmp_path / "data")
    shutil.rmtree(folder / "CQ500CT7 CQ500CT7")
    edit(folder / "reads.csv", lambda t: t[t["name"] != "CQ500-CT-490"])
    dataset = open_dataset("cq500", folder)
    assert dataset.studies == ["CQ500-CT-12"]
    assert dataset.reasons == {"CQ500-CT-7": "labels without files", "CQ500-CT-490": "files without labels"}


def test_a_picture_that_cannot_be_read_is_an_error_of_its_own(layouts, tmp_path):
    folder = shutil.copytree(layouts["phe_sich"][0], tmp_path / "data")
    (folder / "slices" / "0001_03.png").write_bytes(b"x")
    stack = open_dataset("phe_sich", folder).read("0001", SIZE)
    assert list(stack.errors) == ["0001_03"] and (stack.slab == -1).sum() == 1 and len(stack.hu) == 15


@pytest.mark.parametrize("name", ["bhsd", "mbh_seg", "hemseg200"])
def test_rsnas_patients_under_another_name_are_refused(name, tmp_path):
    for trained_on in ("rsna", ""):
        with pytest.raises(InputError, match="RSNA's studies"):
            check_independent(find_facts(name), {"trained_on": trained_on})
    check_independent(find_facts(name), {"trained_on": "phantom"})
    with pytest.raises(InputError, match=f"{name}: known, but not read"):
        open_dataset(name, tmp_path)


def test_a_model_says_what_it_was_trained_on(tmp_path):
    rows = pd.DataFrame({label: [0, 1] for label in LABELS}, ["a", "b"]).astype("uint8")
    for name, file in {"rsna": "other.json", "phantom": "phantom.json"}.items():
        (tmp_path / file).write_text("{}")
        tabulate_labels(rows, tmp_path / name, name_source(tmp_path / "stage_1_train.csv"))
        card = make_card(Settings(), 256, [], describe_data(tmp_path / name, rows))
        assert (card["trained_on"], card["geometry"]) == (name, None)
    assert make_card(Settings(), 256, [])["trained_on"] == ""
    with pytest.raises(InputError, match="rsna: refused: the model was trained on rsna; 22_evaluate"):
        check_independent(find_facts("rsna"), {"trained_on": "rsna"})
    check_independent(find_facts("rsna"), {"trained_on": "phantom"})


def test_a_model_does_not_judge_itself_on_what_it_was_trained_on():
    for name in ("phe_sich", "cq500"):
        with pytest.raises(InputError, match=f"{name}: refused: the model was trained on {name}"):
            check_independent(find_facts(name), {"trained_on": name})
    check_independent(find_facts("phe_sich"), {"trained_on": "cq500"})
    check_independent(find_facts("folder"), {"trained_on": "folder"})  # whose name says nothing of the patients


def test_the_table_says_all_that_it_promises():
    table = read_datasets()
    assert set(ADAPTERS) <= set(table.index) and set(table["independent"]) == set(table["hu"]) == {"yes", "no"}
    assert table[["title", "get", "terms", "layout", "labels", "level"]].ne("").all(axis=None)
    assert "no HU" in table.loc["phe_sich", "note"] and "no specificity" in table.loc["instance2022", "note"]


def test_the_real_reads_of_cq500(real_data):
    labels = read_cq500(real_data / "cq500" / "reads.csv")
    assert labels[list(LABELS)].sum().to_list() == [13, 134, 28, 60, 53, 205]
    assert labels["category"].value_counts().to_dict() == {"B2": 277, "B1": 214}


def test_the_real_slices_of_phe_sich(real_data):
    dataset = open_dataset("phe_sich", real_data / "phe_sich")
    assert (len(dataset.labels), dataset.labels["any"].sum(), len(dataset.studies)) == (1695, 371, 59)
    stack = dataset.read("0160", 128)
    assert (
        len(stack.hu) == dataset.labels["study"].eq("0160").sum()
        and 10 < np.median(stack.hu[(stack.hu > 0) & (stack.hu < 80)]) < 45
    )
