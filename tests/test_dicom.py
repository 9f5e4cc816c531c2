"""`read_slice` against independent decoders, in every encoding, and on broken bytes."""

import base64
import io
import os
import warnings
import zipfile
import zlib

import numpy as np
import pydicom
import pytest
from dicom_files import HEAD, make_dataset, make_file, plain_variants, to_bytes
from pydicom import uid

from ich_fastai.core import InputError
from ich_fastai.dicom import DicomError, decode_slice, read_file, read_slice, slice_position
from ich_fastai.images import list_sources, read_images
from ich_fastai.labels import read_labels
from ich_fastai.plain import read_plain, walk_header

PLAIN = plain_variants()


def pydicom_hu(data):
    "HU as pydicom gives them, rounded and clipped; without the repair."
    with warnings.catch_warnings(action="ignore"):
        ds = pydicom.dcmread(io.BytesIO(data))
        slope, intercept = (float(np.atleast_1d(ds[k].value)[0]) for k in ("RescaleSlope", "RescaleIntercept"))
        return np.clip(np.rint(ds.pixel_array.astype(float) * slope + intercept), -32768, 32767)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_walker_equals_pydicom(name):
    data = memoryview(PLAIN[name])
    hu, record = read_slice(data)
    assert hu.dtype == np.int16 and np.isfinite(record.brain_fraction)
    for plain in (read_plain(data), read_plain(memoryview(bytearray(data)), in_place=True)):
        assert (plain is None) == (walk_header(data) is None)
        if plain is not None:
            assert walk_header(data)[0] == decode_slice(data)[0] and plain[1] == record
            assert plain[0].dtype == np.int16
            np.testing.assert_array_equal(plain[0], hu)
    if not record.repaired:
        np.testing.assert_array_equal(hu, pydicom_hu(PLAIN[name]))


def test_the_walker_reads_what_rsna_has_and_leaves_the_rest():
    taken = {name for name, data in PLAIN.items() if walk_header(memoryview(data)) is not None}
    assert {
        "explicit",
        "implicit",
        "12 bits unsigned",
        "12 bits signed",
        "12 bits, unused bits set",
        "private",
        "several slopes",
    } <= taken
    assert not {"8 bits", "32 bits", "umlaut", "two patients", "padding after", "pixels as OB", "too long"} & taken


def test_the_46_real_slices_equal_simpleitk_to_the_last_unit(real_data):
    sitk = pytest.importorskip("SimpleITK")
    sitk.ProcessObject_SetGlobalWarningDisplay(False)
    paths = sorted((real_data / "rsna" / "stage_1_train_images").glob("*.dcm"))
    assert len(paths) == 46
    for path in paths:
        hu, record = read_slice(path)
        assert not record.repaired, "none of the 46 is wrapped, so there is nothing to compare apart"
        np.testing.assert_array_equal(hu, sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0], err_msg=path.name)
        plain = read_plain(memoryview(read_file(path)))
        assert plain is not None, "a real slice took the long way"
        assert plain[1] == record
        np.testing.assert_array_equal(plain[0], hu)


def test_cq500_equals_simpleitk(real_data):
    sitk = pytest.importorskip("SimpleITK")
    for path in sorted((real_data / "cq500").glob("*.dcm")):
        hu = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0]
        assert (hu == -3024).any(), "padding: PixelPaddingValue is -2000, the intercept -1024"
        np.testing.assert_array_equal(read_slice(path)[0], np.where(hu == -3024, -1000, hu), err_msg=path.name)


def gdcm_encode(data, syntax, folder):
    "A file compressed by GDCM, which writes the JPEG family; `syntax` is a name of gdcm.TransferSyntax."
    import gdcm

    source, target = folder / "plain.dcm", folder / f"{syntax}.dcm"
    source.write_bytes(data)
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return target.read_bytes()


def syntax_of(data):
    return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True).file_meta.TransferSyntaxUID


JPEG = {  # GDCM's name: pydicom's
    "JPEGLosslessProcess14": "JPEGLossless",
    "JPEGLosslessProcess14_1": "JPEGLosslessSV1",
    "JPEGLSLossless": "JPEGLSLossless",
    "JPEG2000Lossless": "JPEG2000Lossless",
}
LOSSY = {"JPEGLSNearLossless": "JPEGLSNearLossless", "JPEG2000": "JPEG2000", "JPEGBaselineProcess1": "JPEGBaseline8Bit"}


RAMP = np.add.outer(17 * np.arange(64), 23 * np.arange(64)).astype(np.uint16)
HTJ2K = (  # RAMP as a High-Throughput JPEG 2000 codestream, by imagecodecs 2026.3.6 (OpenJPH), base 85
    "|4;u>04YEK0000$0000$00000000000000$0000$0000000000009pH0sl|{2mk^A000XAQUDA90ssL31q1{@0smY86Cj9?kdTm&"
    "kdTm&kdTmwh=~7W02crOPjF>!N>E53R%LP^FfKASE;BCwkN^q*00001ApimYlfVEg0RMj@`)&D=^a6pj0KfnfzyK3~NRj>m0(1au"
    "viSgmQ~<yL6)*q=SfZk$qN;I%bpSSPY;69(F@fy10Kfnh@Bjs*P$(1%g+ig{%6fWn0(bzL8jVJy(P;kth(LSxApz{V0Kfni%m4v&"
    "0H$f0rfHg{X_}^Kn)&|<dU|?#dU|kzeE>>DQ4~c{6h%=KMN$6$cwj;YzhMX-{e&QU_7H*WvjM;WE~)?lcL0nr#u#IaF~%5Uj4{R-"
    "V~jDz7-Rmw{0e${dU|?#dU|?#dU|?#Z~}G#AOHXW00000000000000000000{{Mg5000NSU;rNdfB<{;00HmV00+Nd03Q8-"
    "0DJZT0qnB^|Je"
)


@pytest.mark.parametrize("syntax", ["HTJ2KLossless", "HTJ2KLosslessRPCL", "HTJ2K"])
def test_high_throughput_jpeg_2000_gives_the_very_values(syntax):
    ds = make_dataset(RAMP)
    ds.file_meta.TransferSyntaxUID = getattr(uid, syntax)
    ds.PixelData = pydicom.encaps.encapsulate([base64.b85decode(HTJ2K)])
    ds["PixelData"].VR = "OB"
    hu, _ = read_slice(to_bytes(ds))
    np.testing.assert_array_equal(hu, RAMP.astype(int) + int(ds.RescaleIntercept))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", JPEG)
def test_compressed_by_gdcm(syntax, signed, tmp_path):
    data = make_file(HEAD - 500) if signed else make_file(HEAD.astype(np.uint16), BitsStored=12)
    packed = gdcm_encode(data, syntax, tmp_path)
    assert syntax_of(packed) == getattr(uid, JPEG[syntax])
    np.testing.assert_array_equal(read_slice(packed)[0], read_slice(data)[0])
    np.testing.assert_array_equal(read_slice(packed)[0], pydicom_hu(packed))


@pytest.mark.parametrize("syntax", LOSSY)
def test_lossy_files_are_what_pydicom_says(syntax, tmp_path):
    baseline = syntax == "JPEGBaselineProcess1"  # 8 bits only
    data = make_file((HEAD // 8).astype(np.uint8), BitsAllocated=8, BitsStored=8) if baseline else make_file(HEAD - 500)
    packed = gdcm_encode(data, syntax, tmp_path)
    assert syntax_of(packed) == getattr(uid, LOSSY[syntax])
    np.testing.assert_array_equal(read_slice(packed)[0], pydicom_hu(packed))
    assert np.abs(read_slice(packed)[0] - read_slice(data)[0]).max() < 10


@pytest.mark.parametrize("name", ["ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian", "RLELossless"])
def test_other_syntaxes(name):
    ds = make_dataset()
    if name == "RLELossless":
        ds.compress(uid.RLELossless)
    ds.file_meta.TransferSyntaxUID = getattr(uid, name)
    if name == "ExplicitVRBigEndian":
        ds.PixelData = HEAD.astype(">i2").tobytes()
    np.testing.assert_array_equal(read_slice(to_bytes(ds))[0], HEAD - 1024)


def make_looked_up(kind):
    "A file of four pixels whose HU, or what else its table says that they are, are looked up."
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [4, 0, 16], kind
    table.add_new("LUTData", "US", [0, 10, 40, 100])
    stored, unscaled = np.array([[0, 1], [2, 3]], np.uint16), {"RescaleSlope": None, "RescaleIntercept": None}
    return make_file(stored, ModalityLUTSequence=pydicom.Sequence([table]), **unscaled)


def test_a_modality_lut_gives_hu_or_is_refused():
    hu, record = read_slice(make_looked_up("HU"))
    np.testing.assert_array_equal(hu, [[0, 10], [40, 100]])
    assert record.brain_fraction == 0.5 and not record.repaired
    with pytest.raises(DicomError, match="not in HU: ModalityLUTType is OD"):
        read_slice(make_looked_up("OD"))


def test_the_tilted_series_is_evenly_spaced_along_its_normal(real_data):
    records = [read_slice(p)[1] for p in sorted((real_data / "rsna" / "stage_1_train_images").glob("*.dcm"))]
    z = np.sort([r.z_mm for r in records if r.PatientID == "ID_fff502d5"])
    gaps = np.diff(z)
    assert len(z) == 36 and gaps.min() > 0.9 * np.median(gaps) and gaps.max() < 1.5 * np.median(gaps)


def test_position_equals_the_cross_product():
    rng = np.random.default_rng(1)
    for _ in range(20):
        x, y, p = rng.normal(size=(3, 3))
        normal = np.cross(x, y)
        assert np.isclose(slice_position(tuple(p), (*x, *y)), normal @ p * np.sign(normal[2]))


@pytest.mark.parametrize("row", [(1, 0, 0), (-1, 0, 0)])
def test_the_lowest_slice_comes_first_at_ingest_and_in_prediction(row, tmp_path):
    "Rows that run from left to right turn the normal of rows and columns to the feet; the slices stay where they are."
    for k, z in enumerate((10.0, 0.0, 5.0)):
        ids = {"SOPInstanceUID": f"2.25.{k}", "ImagePositionPatient": [0, 0, z]}
        (tmp_path / f"{k}.dcm").write_bytes(make_file(**ids, ImageOrientationPatient=[*row, 0, 1, 0]))
    z_mm = [read_slice(tmp_path / f"{k}.dcm")[1].z_mm for k in range(3)]
    (tmp_path / "scratch").mkdir()
    images = read_images(list_sources(sorted(tmp_path.glob("*.dcm")), tmp_path / "scratch"), tmp_path / "scratch")
    assert z_mm == images["z_mm"].to_list() == [10, 0, 5]


def test_every_truncation_is_an_error_or_the_whole_slice():
    data = make_file(HEAD[:8, :8])
    for n in range(len(data)):
        with pytest.raises(DicomError):
            read_slice(data[:n])
        assert read_plain(memoryview(data[:n])) is None


def flip_bytes(data, n_cases, seed):
    "Copies of `data` with one to three random bytes changed; a third of them in the first 2 kB, where the header is."
    rng = np.random.default_rng(seed)
    for case in range(n_cases):
        broken = bytearray(data)
        for at in rng.integers(0, min(len(data), 2000) if case % 3 == 0 else len(data), rng.integers(1, 4)):
            broken[at] = rng.integers(256)
        yield bytes(broken)


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "RLELossless", "DeflatedExplicitVRLittleEndian"])
def test_flipped_bytes_give_a_slice_or_a_reason(syntax):
    ds, good = make_dataset(HEAD[:16, :16]), 0
    if syntax == "RLELossless":
        ds.compress(uid.RLELossless)
    elif syntax.startswith("Deflated"):
        ds.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    for broken in flip_bytes(to_bytes(ds, syntax == "implicit"), 400, seed=2):
        try:
            plain = read_plain(memoryview(broken))
            hu, record = plain or read_slice(broken)
        except DicomError as e:
            assert ":" in str(e) or str(e) in ("no pixel data", "no SOPInstanceUID"), e
        else:
            assert hu.dtype == np.int16 and hu.ndim == 2
            good += 1
    assert 0 < good < 400, "some flips do harm, some do not"


def test_a_deflate_bomb_is_refused():
    ds = make_dataset()
    ds.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    data = to_bytes(ds)
    start = 144 + int.from_bytes(data[140:144], "little")  # the length of group 2
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = data[:start] + b"".join(deflate.compress(bytes(1 << 20)) for _ in range(200)) + deflate.flush()
    with pytest.raises(DicomError, match="too large"):
        read_slice(bomb)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_says_so(tmp_path):
    path = tmp_path / "secret.dcm"
    path.write_bytes(make_file())
    path.chmod(0)
    with pytest.raises(DicomError, match="Permission denied"):
        read_slice(path)


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("harm", ["locked", "broken", "short"])
def test_a_zip_that_cannot_be_read_is_one_line_or_a_row(packing, harm, tmp_path):
    "Of labels or asked for by name: one line. Found in a folder, as a viewer on a CD: a file with a reason."
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", packing) as packed:
        packed.writestr("stage_1_train.csv", np.random.default_rng(0).bytes(5000))
    raw = bytearray(data.getvalue())
    if harm == "locked":
        raw[6] = raw[raw.index(b"PK\1\2") + 8] = 1
    if harm == "broken":
        raw[60:90] = bytes(30)
    if harm == "short":
        del raw[1000:3000]
    (tmp_path / "cd").mkdir()
    (tmp_path / "scratch").mkdir()
    path = tmp_path / "cd" / "viewer.zip"
    path.write_bytes(raw)
    (tmp_path / "cd" / "a.dcm").write_bytes(make_file())
    with pytest.raises(InputError, match="viewer.zip: cannot be read as a label CSV"):
        read_labels(path)
    with pytest.raises(InputError, match="viewer.zip: a zip that cannot be read"):
        list_sources(path, tmp_path / "scratch")
    images = read_images(list_sources(tmp_path / "cd", tmp_path / "scratch"), tmp_path / "scratch").set_index("file")
    assert images.loc["a.dcm", "error"] == "" and images.loc["viewer.zip", "error"].startswith("a zip that cannot be")
