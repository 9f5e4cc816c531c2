"""The phantom's promises that need whole folders: determinism, geometry, traps, no leak through sizes and names."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pydicom
import pytest

from ich_fastai import tiny as tiny_module
from ich_fastai.bleeding import Bleed, draw_plane
from ich_fastai.core import InputError
from ich_fastai.head import draw_head
from ich_fastai.labels import LABELS, SUBTYPES, read_labels
from ich_fastai.phantom import MIN_AREA_MM2, make_phantom, read_mask
from ich_fastai.scan import COMPRESSIONS, FILE_TRAPS, TRAPS, Series, draw_scan, draw_slice, write_slice
from ich_fastai.tiny import tiny_phantom

COMMAND = Path(sys.executable).parent / "ich-phantom"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def tiny():
    return tiny_phantom()


@pytest.fixture(scope="module")
def truth(tiny):
    return pd.read_parquet(tiny / "truth.parquet")


def hashes(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def read(tiny, uid):
    return pydicom.dcmread(tiny / "stage_1_train_images" / f"{uid}.dcm")


def test_labels_follow_from_masks(tiny, truth):
    labels = read_labels(tiny / "stage_1_train.csv")
    assert set(labels.index) == set(truth.SOPInstanceUID)
    assert (truth.groupby("PatientID")[list(SUBTYPES)].max().sum() >= 2).all()
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
    assert (
        (odd.Rows, odd.Columns) == (640, 540) == odd.pixel_array.shape == read_mask(tiny, by_trap["odd_size"][0]).shape
    )
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


def test_same_bytes_whatever_the_processor(tmp_path):
    one = make_phantom(tmp_path / "one", 3, 7, slices_per_series=(5, 6), workers=1)
    call = f"make_phantom({str(tmp_path / 'plain')!r}, 3, 7, slices_per_series=(5, 6), workers=1)"
    call = f"from ich_fastai.phantom import make_phantom; {call}"
    plain = {**os.environ, "OMP_NUM_THREADS": "3"}
    plain |= {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512_SKX", "OPENCV_CPU_DISABLE": "AVX2,AVX512_SKX"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", call], env=plain, check=True, timeout=60)
    assert hashes(one) == hashes(tmp_path / "plain")


def test_what_other_code_has_made_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_module, "project_dir", lambda: tmp_path)
    small = {"n_patients": 1, "seed": 7, "slices_per_series": (5, 5), "workers": 1}
    monkeypatch.setattr(tiny_module, "make_phantom", lambda home, **_: make_phantom(home, **small))

    def look():
        run_dir = tiny_module.tiny_sources()
        return [p.stat().st_mtime_ns for p in (tiny_phantom() / "phantom.json", run_dir / "slices.parquet")]

    first = look()
    left = tmp_path / "runs" / "tiny" / "run" / "predictions.parquet"
    left.touch()
    assert look() == first and left.exists()
    monkeypatch.setattr(tiny_module, "sum_modules", lambda *names: "of other code")
    assert all(now > then for now, then in zip(look(), first, strict=True)) and not left.exists()


def test_one_volume_for_simpleitk(tiny, truth):
    sitk = pytest.importorskip("SimpleITK")
    clean = truth.groupby("SeriesInstanceUID").filter(lambda s: (s.traps == "").all())
    series = clean[clean.SeriesInstanceUID == clean.SeriesInstanceUID.iloc[0]].sort_values("z_mm")
    files = [str(tiny / "stage_1_train_images" / f"{uid}.dcm") for uid in series.SOPInstanceUID]
    volume = sitk.ReadImage(files)
    want = float(pydicom.dcmread(files[0]).PixelSpacing[0])
    assert volume.GetSize() == (512, 512, 8)
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
        mask = read_mask(tiny, row.SOPInstanceUID)
        blood, brain = hu[((mask >> k) & 1) > 0], hu[(mask == 0) & (hu > 10) & (hu < 50)]
        assert np.median(brain) + 5 < np.median(blood) < 95


def test_sizes_and_names_say_nothing(tiny, truth):
    sizes = {u: (tiny / "stage_1_train_images" / f"{u}.dcm").stat().st_size for u in truth.SOPInstanceUID}
    table = truth.assign(size=truth.SOPInstanceUID.map(sizes))
    table = table[~table.traps.str.contains("truncated")]
    per_series = table.groupby("SeriesInstanceUID")["size"].agg(lambda s: s.max() - s.min())
    assert per_series.max() <= 8  # only the digits of the position differ
    in_name_order = truth.sort_values("SOPInstanceUID").groupby("SeriesInstanceUID")["index"]
    assert in_name_order.agg(lambda s: s.is_monotonic_increasing or s.is_monotonic_decreasing).mean() < 0.1


def test_what_lies_in_the_way_is_one_line_and_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    for name in ("mine", "mine/thesis.txt/g"):  # parameters out of their range: test_faults
        with pytest.raises(InputError) as e:
            make_phantom(tmp_path / name, 1)
        assert "\n" not in str(e.value)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep me"
    done = subprocess.run([COMMAND, str(tmp_path / "mine")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "thesis" not in done.stdout


@pytest.mark.parametrize(
    ("compress", "syntax"), {"rle": "5", "jpeg": "4.70", "jpegls": "4.80", "jpeg2000": "4.90"}.items()
)
def test_compressed_files_say_how(tmp_path, compress, syntax):  # notebook 05 compares the pixels
    scan, ids = draw_scan(np.random.default_rng(0), 5), dict(PatientID="1", StudyInstanceUID="2", SeriesInstanceUID="3")
    write_slice(path := tmp_path / "ID_4.dcm", np.full((64, 64), 40.0), Series(scan, ids, "16s", compress=compress), 2)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == f"1.2.840.10008.1.2.{syntax}"
    assert compress in COMPRESSIONS and len(COMPRESSIONS) == 4


def test_epidural_blood_stays_within_its_bone():
    head = draw_head(np.random.default_rng(0))
    y, x = np.meshgrid(np.arange(-100, 100, 1, np.float32), np.arange(-100, 100, 1, np.float32), indexing="ij")
    bleed = Bleed("epidural", 65.0, 1, 1.0, direction=(0.98, -0.2, 0.0), size=20.0)
    _, shares = draw_plane(head, [bleed], x, y, np.full_like(x, 2))
    blood = shares[0] > 0.5
    assert blood.sum() > 500
    assert y[blood].min() > -38 + 0.25 * 2 - 1.5  # the coronal suture


def test_metal_streaks_and_says_nothing_of_blood():
    rng = np.random.default_rng(0)
    head, scan = draw_head(rng), draw_scan(rng, 10)
    inside = scan._replace(metal=(10.0, 0.0, scan.z[5] - 72), metal_hu=100.0, holder=0.0)
    clean, _ = draw_slice(head, [], inside._replace(metal_hu=0.0), 5, np.random.default_rng(1))
    hu, mask = draw_slice(head, [], inside, 5, np.random.default_rng(1))
    assert hu.max() > 2500 > clean.max() and not mask.any()


def test_a_killed_run_leaves_nobody_writing_and_can_be_repeated(tmp_path):
    out = tmp_path / "p"
    call = [COMMAND, str(out), "--n-patients", "40", "--workers", "2"]
    first = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    images, process = tmp_path / ".p.part" / "stage_1_train_images", psutil.Process(first.pid)
    until = time.monotonic() + 60
    while not (images.is_dir() and any(images.iterdir())) and time.monotonic() < until:
        time.sleep(0.1)
    children = process.children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert children and not psutil.wait_procs(children, timeout=60)[1]
    assert any(images.iterdir()) and not out.exists()
    make_phantom(out, 2, slices_per_series=(5, 5))
    assert not (tmp_path / ".p.part").exists() and 10 <= len(list((out / "stage_1_train_images").iterdir())) <= 20


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs dciodvfy of Debian's dicom3tools")
def test_a_validator_finds_only_what_the_anonymization_did(tiny, truth):
    known = r"Information Object Not found|MediaStorageSOP\w+ (but missing|different from)|"
    known += r"invalid data values for Value|\((0x0008,0x0018|0x0020,0x000[de])\)"
    for uid in truth[truth.traps == ""].SOPInstanceUID[:10]:
        found = subprocess.run(
            ["dciodvfy", str(tiny / "stage_1_train_images" / f"{uid}.dcm")], capture_output=True, text=True, timeout=60
        ).stderr
        errors = [line for line in found.splitlines() if line.startswith("Error")]
        assert errors and [e for e in errors if not re.search(known, e)] == []
