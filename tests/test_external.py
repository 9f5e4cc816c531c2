"""Pictures of another hospital as a run folder: HU, orientation, order, faults; the counts of the real set."""

import cv2
import numpy as np
import pandas as pd
import pytest

from ich_fastai.adopt import adopt, frame_heads
from ich_fastai.cache import Cache
from ich_fastai.cohort import make_cohort
from ich_fastai.core import DicomError, InputError, Window, read_stage
from ich_fastai.datasets import find_facts, open_pictures
from ich_fastai.external import PICTURE_SETS, PictureSet, head_frame
from ich_fastai.external import read_picture, read_picture_labels, skull_box, to_hu, to_picture
from ich_fastai.labels import SUBTYPES
from ich_fastai.tiny import tiny_cohort

BRAIN = Window(40, 120)


def import_pictures(folder, run, about, size=256):
    "The set as a run folder; its cohort."
    adopt(open_pictures(about, folder, None, find_facts("phe_sich")), run, cache_size=size)
    return make_cohort(run, n_folds=2)


@pytest.fixture(scope="module")
def slices():
    "Five phantom slices of two patients, at 256 px, bottom to top."
    cohort = read_stage(tiny_cohort(), "cohort.parquet").drop_duplicates(["PatientID", "position"])
    rows = cohort[cohort["PatientID"].isin(cohort["PatientID"].unique()[:2]) & cohort["position"].isin([1, 3, 5])]
    rows = rows.sort_values(["PatientID", "position"])
    return rows, Cache(tiny_cohort() / "cache").gather(rows["address"].to_numpy())


@pytest.fixture()
def picture_set(slices, tmp_path):
    "The slices as a set that lies on its side; names in another order than the numbers."
    rows, hu = slices
    (tmp_path / "set" / "slices").mkdir(parents=True)
    table = []
    for k, (row, x) in enumerate(zip(rows.itertuples(), hu, strict=True)):
        name = f"s{9 - k}"
        assert cv2.imwrite(str(tmp_path / "set" / "slices" / f"{name}.png"), np.rot90(to_picture(x, BRAIN)))
        table.append((name, row.PatientID, row.position, row.any))
    table = pd.DataFrame(table, columns=["slice", "patient", "number", "any"])
    table.to_csv(tmp_path / "set" / "labels.csv", index=False)
    return tmp_path / "set"


@pytest.mark.parametrize("burned", [BRAIN, Window(40, 80), Window(50, 350)])
def test_hu_comes_back_within_half_a_gray_level(slices, burned):
    for hu in slices[1]:
        gray = to_picture(hu, burned)
        back, inside = to_hu(gray, burned), (gray > 0) & (gray < 255)
        assert np.abs(back.astype(int) - hu)[inside].max() <= burned.width / 255 / 2 + 0.5
        low, high = burned.center - burned.width / 2, burned.center + burned.width / 2
        assert set(np.unique(back[gray == 0])) <= {-1000, low} and set(np.unique(back[gray == 255])) <= {800, high}
        assert (back[gray == 0] == -1000).mean() > 0.9, "background is air"
        assert (back[gray == 255] == 800).mean() > 0.5, "bone is bone"


def test_single_pixels_that_noise_cuts_off_are_no_holes():
    "A ventricle of 5 HU with noise of 6 HU, in a window that begins at 0."
    hu = 5 + 6 * np.random.default_rng(0).standard_normal((64, 64))
    back = to_hu(to_picture(hu, Window(40, 80)), Window(40, 80))
    assert (hu < 0).mean() > 0.15 and abs(cv2.resize(back, (16, 16), interpolation=cv2.INTER_AREA).mean() - 6) < 2


def test_a_lying_picture_is_set_upright(tmp_path):
    gray = np.full((6, 8), 100, np.uint8)
    gray[0, 5] = 200  # above and right of the middle
    for turns in range(4):
        cv2.imwrite(str(tmp_path / "p.png"), np.rot90(gray, turns))
        assert np.argwhere(read_picture(tmp_path / "p.png", BRAIN, turns) > 60).tolist() == [[0, 5]]


def test_a_set_becomes_a_run_folder_in_order(slices, picture_set, tmp_path):
    rows, hu = slices
    cohort = import_pictures(picture_set, tmp_path / "run", PictureSet(BRAIN, turns=1))
    assert any("No labels of epidural, intra" in text for text in read_stage(tmp_path / "run", "dataset.json")["says"])
    assert cohort["PatientID"].tolist() == rows["PatientID"].tolist(), "sorted by patient, then from below"
    assert cohort["z_mm"].tolist() == [5.0 * n for n in rows["position"]]
    assert cohort["any"].tolist() == rows["any"].tolist() and cohort[list(SUBTYPES)].isna().all(axis=None)
    assert cohort.groupby("PatientID")["position"].apply(list).tolist() == [[0, 1, 2]] * 2
    pixels = Cache(tmp_path / "run" / "cache").gather(cohort["address"].to_numpy())
    inside = (hu > -19) & (hu < 99)
    assert pixels.shape == hu.shape and np.abs(pixels - hu)[inside].max() <= 1, "the right slice, upright"
    above = Cache(tmp_path / "run" / "cache").gather(cohort["next"].to_numpy()[:1])
    np.testing.assert_array_equal(above[0], pixels[1])


def test_another_window_for_some_patients(slices, picture_set, tmp_path):
    rows, hu = slices
    other = rows["PatientID"].unique()[1]
    names = pd.read_csv(picture_set / "labels.csv").query("patient == @other")["slice"]
    for name, x in zip(names, hu[rows["PatientID"].eq(other).to_numpy()], strict=True):
        cv2.imwrite(str(picture_set / "slices" / f"{name}.png"), np.rot90(to_picture(x, Window(40, 80))))
    cohort = import_pictures(picture_set, tmp_path / "run", PictureSet(BRAIN, {other: Window(40, 80)}, turns=1))
    pixels = Cache(tmp_path / "run" / "cache").gather(cohort["address"].to_numpy())
    inside = (hu > 1) & (hu < 79)
    assert np.abs(pixels - hu)[inside].max() <= 1


def test_what_cannot_be_used_is_a_row_with_the_reason(picture_set, tmp_path):
    folder = picture_set / "slices"
    (folder / "s9.png").write_bytes(b"no picture")
    cv2.imwrite(str(folder / "s8.png"), np.full((8, 8), 900, np.uint16))
    cv2.imwrite(str(folder / "s7.png"), np.dstack([np.full((8, 8), k, np.uint8) for k in (1, 2, 3)]))
    cv2.imwrite(str(folder / "other.png"), np.zeros((8, 8), np.uint8))
    opened = open_pictures(PictureSet(BRAIN), picture_set, None, find_facts("phe_sich"))
    adopt(opened, tmp_path / "run", cache_size=32)
    table = read_stage(tmp_path / "run", "slices.parquet").set_index("StudyInstanceUID")
    assert len(table) == 4 and table["error"].notna().sum() == 1, "a patient without a readable picture is one row"
    assert table["error"].dropna().item().endswith("no readable picture")
    assert table.loc[table["error"].isna(), "row"].tolist() == [0, 1, 2]


def test_useless_input_is_one_line(picture_set, tmp_path):
    csv = tmp_path / "labels.csv"
    for text, why in {
        "slice,patient,any\na,1,0\n": "has no column number",
        "slice,patient,number,any\na,1,0,1\na,1,1,1\n": "2 rows with a label that is not 0 or 1",
        "slice,patient,number,any\na,1,,1\n": "1 rows with",
        "slice,patient,number,any,subdural\na,1,0,0,1\n": "a subtype without any",
    }.items():
        csv.write_text(text)
        with pytest.raises(InputError, match=why):
            read_picture_labels(csv)
    with pytest.raises(InputError, match="cannot be read"):
        read_picture_labels(tmp_path / "none.csv")
    for path in (picture_set / "slices").iterdir():
        path.write_bytes(b"-")
    with pytest.raises(InputError, match="no readable slice, e.g. .*no readable picture"):
        import_pictures(picture_set, tmp_path / "run", PictureSet(BRAIN))
    with pytest.raises(DicomError, match="cannot be read"):
        read_picture(tmp_path / "none.png", BRAIN)


def test_heads_of_one_size(slices, picture_set, tmp_path):
    "The second patient's field of view is twice as large and off center: framed, both heads are alike."
    rows, _ = slices
    small = rows["PatientID"].unique()[1]
    names = pd.read_csv(picture_set / "labels.csv", dtype=str)
    for name in names.loc[names["patient"] == small, "slice"]:
        path = str(picture_set / "slices" / f"{name}.png")
        cv2.imwrite(path, np.pad(cv2.imread(path, cv2.IMREAD_UNCHANGED), ((200, 56), (40, 216))))
    import_pictures(picture_set, tmp_path / "run", PictureSet(BRAIN, turns=1))
    frame_heads(tmp_path / "run", tmp_path / "framed")
    assert read_stage(tmp_path / "framed", "dataset.json") == read_stage(tmp_path / "run", "dataset.json")
    boxes = {}
    for name in ("run", "framed"):
        cohort, cache = read_stage(tmp_path / name, "cohort.parquet"), Cache(tmp_path / name / "cache")
        series = [cache.gather(part["address"].to_numpy()) for _, part in cohort.groupby("SeriesInstanceUID")]
        boxes[name] = np.array([max(map(skull_box, hus), key=lambda box: box[3]) for hus in series])
        assert name == "run" or (head_frame(series[0])[2] == pytest.approx(256, rel=0.03))
    rows = read_stage(tmp_path / "framed", "slices.parquet").set_index("SOPInstanceUID")
    assert cohort["crc32"].tolist() == rows.loc[cohort["SOPInstanceUID"], "crc32"].tolist()
    assert cohort["crc32"].tolist() != read_stage(tmp_path / "run", "cohort.parquet")["crc32"].tolist()
    shard = tmp_path / "framed" / "cache" / "shard-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\1\2")
    with pytest.raises(InputError, match="another checksum"):
        Cache(shard.parent).gather(cohort["address"].to_numpy())
    lengths, middles = boxes["framed"][:, 3], boxes["framed"][:, :2] + boxes["framed"][:, 2:] / 2
    assert boxes["run"][0, 3] > 1.6 * boxes["run"][1, 3] and lengths == pytest.approx(256 / 1.15, rel=0.06)
    assert np.abs(middles - 128).max() < 16


def test_a_series_without_a_skull_stays_as_it_is():
    assert head_frame(np.full((3, 64, 64), -1000, np.int16)) == (0, 0, 64)


def test_the_real_set(real_data):
    "Each slice upright: the skull is longer than wide."
    home, about = real_data / "phe_sich", PICTURE_SETS["phe_sich"]
    if not home.is_dir():
        pytest.skip(f"no phe_sich/ in {real_data.name}/")
    rows, unknown = read_picture_labels(home / about.labels)
    assert unknown == list(SUBTYPES) and {path.stem for path in (home / "slices").iterdir()} == set(rows.index)
    middle = rows[rows["any"] == 1].groupby("PatientID").head(1).index[::6]
    for name in middle:
        burned = about.exceptions.get(rows.loc[name, "PatientID"], about.burned)
        hu = read_picture(home / "slices" / f"{name}.png", burned, about.turns)
        parts = cv2.connectedComponentsWithStats((hu == 800).astype(np.uint8))[2][1:]
        _, _, width, height, _ = max(parts.tolist(), key=lambda part: part[4])
        assert hu.shape == (512, 512) and height > width, name
        assert 25 < np.median(hu[(hu > 15) & (hu < 60)]) < 45, "brain has the HU of brain"
