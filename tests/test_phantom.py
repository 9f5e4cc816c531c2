"""The phantom's promises that need whole folders: determinism, geometry, traps, no leak through the files' sizes and names, errors as one line."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest

from ich_fastai.labels import LABELS, SUBTYPES, InputError, read_labels
from ich_fastai.phantom import FILE_TRAPS, MIN_AREA_MM2, TRAPS, make_phantom, read_mask, tiny_phantom

COMMAND = Path(sys.executable).parent / "ich-phantom"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def tiny():
    return tiny_phantom()


@pytest.fixture(scope="module")
def truth(tiny):
    return pd.read_parquet(tiny / "truth.parquet")


def hashes(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def read(tiny, uid):
    return pydicom.dcmread(tiny / "stage_1_train_images" / f"{uid}.dcm")


def test_labels_follow_from_masks(tiny, truth):
    labels = read_labels(tiny / "stage_1_train.csv")
    assert set(labels.index) == set(truth.SOPInstanceUID)
    assert (labels[list(SUBTYPES)].sum() > 0).all()
    for row in truth.sample(20, random_state=0).itertuples():
        area = float(np.prod([float(v) for v in read(tiny, row.SOPInstanceUID).PixelSpacing]))
        mask = read_mask(tiny, row.SOPInstanceUID)
        want = [int(((mask >> k) & 1).sum() * area >= MIN_AREA_MM2) for k in range(5)]
        assert labels.loc[row.SOPInstanceUID, list(LABELS)].tolist() == [*want, int(any(want))]


def test_every_trap_is_there(tiny, truth):
    carried = {t for traps in truth.traps for t in traps.split(",")}
    assert carried >= {*TRAPS, *FILE_TRAPS}
    by_trap = {t: truth[truth.traps.str.contains(t)].SOPInstanceUID.tolist() for t in (*TRAPS, *FILE_TRAPS)}
    image = tiny / "stage_1_train_images"
    assert len(by_trap["truncated"]) == 1
    assert (image / f"{by_trap['truncated'][0]}.dcm").stat().st_size < 200_000
    odd = read(tiny, by_trap["odd_size"][0])
    assert (odd.Rows, odd.Columns) == (640, 540) == odd.pixel_array.shape == read_mask(tiny, by_trap["odd_size"][0]).shape
    wrapped = read(tiny, by_trap["wrapped_intercept"][0])
    assert wrapped.PixelRepresentation == 0 and float(wrapped.RescaleIntercept) > -100
    hu = (wrapped.pixel_array.astype(int) + 1000) % 4096 - 1000
    assert -1001 < np.median(hu[:20]) < -950
    assert len(read(tiny, by_trap["multi_window"][0]).WindowCenter) == 2
    assert read(tiny, by_trap["string_intercept"][0]).RescaleIntercept.original_string == "-1024.000000"
    assert read(tiny, by_trap["padding"][0]).pixel_array.min() == -2000
    z = truth[truth.traps.str.contains("duplicate_position")].z_mm
    assert z.duplicated().sum() == 1
    gaps = np.diff(np.sort(truth[truth.traps.str.contains("missing_position")].z_mm))
    assert gaps.max() > 1.5 * np.median(gaps)
    csv = pd.read_csv(tiny / "stage_1_train.csv")
    assert csv.ID.duplicated().sum() == 6 * len(by_trap["duplicate_labels"]) > 0


def test_groups_and_tilt(tiny, truth):
    first = truth[~truth.traps.str.contains("truncated")].groupby("SeriesInstanceUID").SOPInstanceUID.first()
    headers = [read(tiny, uid) for uid in first]
    assert {(d.BitsStored, d.PixelRepresentation) for d in headers} == {(12, 0), (12, 1), (16, 1)}
    assert {d.file_meta.TransferSyntaxUID for d in headers} == {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1"}
    assert any(abs(float(d.ImageOrientationPatient[5])) > 0.02 for d in headers)


def test_same_bytes_whatever_the_workers_and_the_processor(tmp_path):
    one = make_phantom(tmp_path / "one", 3, 7, slices_per_series=(5, 6), workers=1)
    two = make_phantom(tmp_path / "two", 3, 7, slices_per_series=(5, 6), workers=2)
    assert hashes(one) == hashes(two)
    call = f"from ich_fastai.phantom import make_phantom; make_phantom({str(tmp_path / 'plain')!r}, 3, 7, slices_per_series=(5, 6), workers=1)"
    plain = {**os.environ, "OMP_NUM_THREADS": "3"}
    plain |= {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512_SKX", "OPENCV_CPU_DISABLE": "AVX2,AVX512_SKX"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", call], env=plain, check=True, timeout=60)
    assert hashes(one) == hashes(tmp_path / "plain")


def test_one_volume_for_simpleitk(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    data = make_phantom(tmp_path / "p", 14, 3, slices_per_series=(6, 6))
    truth = pd.read_parquet(data / "truth.parquet")
    clean = truth.groupby("SeriesInstanceUID").filter(lambda s: (s.traps == "").all())
    series = clean[clean.SeriesInstanceUID == clean.SeriesInstanceUID.iloc[0]].sort_values("z_mm")
    files = [str(data / "stage_1_train_images" / f"{uid}.dcm") for uid in series.SOPInstanceUID]
    volume = sitk.ReadImage(files)
    want = float(pydicom.dcmread(files[0]).PixelSpacing[0])
    assert volume.GetSize() == (512, 512, 6)
    assert volume.GetSpacing()[0] == pytest.approx(want)
    step = np.subtract(*[np.array([float(v) for v in pydicom.dcmread(f).ImagePositionPatient]) for f in files[1::-1]])
    assert volume.GetSpacing()[2] == pytest.approx(np.linalg.norm(step), rel=0.02)


def test_blood_is_denser_than_brain(tiny, truth):
    for kind in SUBTYPES:
        k = SUBTYPES.index(kind)
        row = truth[~truth.traps.str.contains("wrapped|truncated")].nlargest(1, f"{kind}_mm2").iloc[0]
        assert row[kind] == 1
        ds = read(tiny, row.SOPInstanceUID)
        hu = ds.pixel_array.astype(int) + int(float(ds.RescaleIntercept))
        blood = hu[((read_mask(tiny, row.SOPInstanceUID) >> k) & 1) > 0]
        assert 42 < np.median(blood) < 95


def test_sizes_and_names_say_nothing(tiny, truth):
    sizes = {u: (tiny / "stage_1_train_images" / f"{u}.dcm").stat().st_size for u in truth.SOPInstanceUID}
    table = truth.assign(size=truth.SOPInstanceUID.map(sizes))
    table = table[~table.traps.str.contains("truncated")]
    per_series = table.groupby("SeriesInstanceUID")["size"].agg(lambda s: s.max() - s.min())
    assert per_series.max() <= 8  # only the digits of the position differ
    assert not truth.index.equals(truth.sort_values(["SeriesInstanceUID", "index"]).index)


def test_a_user_s_mistakes_are_one_line(tmp_path, tiny):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    for name, wrong in (("mine", {}), ("a", {"n_patients": 0}), ("b", {"slices_per_series": (9, 3)})):
        with pytest.raises(InputError) as e:
            make_phantom(tmp_path / name, **wrong)
        assert "\n" not in str(e.value)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep me"
    done = subprocess.run([COMMAND, str(tmp_path / "mine")],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "thesis" not in done.stdout
    assert json.loads((tiny / "phantom.json").read_text())["synthetic"] is True
