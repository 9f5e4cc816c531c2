"""DICOM files made for tests: good ones in every encoding, and bad ones of every kind."""

import io
import warnings

import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

RNG = np.random.default_rng(0)
HEAD = np.clip(np.add.outer(np.arange(64), np.arange(64)) * 12 + RNG.integers(-40, 40, (64, 64)), 0, 1500).astype(
    np.int16
)  # stored values
HOSTILE_SETS = ("unicode_escape", "utf_7", "rot13", "idna", "punycode", "undefined", "base64", "ISO_IR 100\\utf_16")


def make_dataset(stored=HEAD, **tags):
    "A CT slice as a pydicom dataset; `tags` change or, where None, delete elements."
    signed = np.asarray(stored).dtype.kind == "i"
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = CTImageStorage, "1.2.3"
    about = dict(
        SOPClassUID=CTImageStorage,
        SOPInstanceUID="1.2.3",
        Modality="CT",
        PatientID="ID_1",
        StudyInstanceUID="1.2",
        SeriesInstanceUID="1.2.1",
        ImagePositionPatient=["-120", "-120", "35.5"],
        ImageOrientationPatient=["1", "0", "0", "0", "0.9659258", "-0.2588190"],
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        Rows=np.shape(stored)[-2],
        Columns=np.shape(stored)[-1],
        PixelSpacing=["0.5", "0.5"],
        BitsAllocated=16,
        BitsStored=16,
        PixelRepresentation=int(signed),
        WindowCenter=["00036", "00036"],
        WindowWidth=["00080", "00080"],
        RescaleIntercept="-1024.000000",
        RescaleSlope="1",
    )
    about |= tags
    about.setdefault("HighBit", (about["BitsStored"] or 16) - 1)
    with warnings.catch_warnings(action="ignore"), pydicom.config.disable_value_validation():
        for keyword, value in about.items():
            if value is not None:
                setattr(ds, keyword, value)
        if "PixelData" not in tags:
            ds.add_new("PixelData", "OW", np.asarray(stored).tobytes())
    return ds


def to_bytes(ds, implicit=False):
    "The bytes of a DICOM file."
    if implicit:
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    syntax = ds.file_meta.TransferSyntaxUID
    little = syntax != pydicom.uid.ExplicitVRBigEndian
    with pydicom.config.disable_value_validation(), io.BytesIO() as out:
        pydicom.dcmwrite(
            out, ds, enforce_file_format=True, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=little
        )
        return out.getvalue()


def make_file(stored=HEAD, implicit=False, **tags):
    "The bytes of a CT slice."
    return to_bytes(make_dataset(stored, **tags), implicit)


def plain_variants():
    "Named bytes of uncompressed files that differ in encoding, header and values; good ones all."
    low12, high12 = HEAD.astype(np.uint16), (HEAD.astype(np.uint16) | 0xF000)
    sequence = pydicom.Sequence([make_dataset(HEAD[:2, :2])])
    return {
        "explicit": make_file(),
        "implicit": make_file(implicit=True),
        "12 bits unsigned": make_file(low12, BitsStored=12),
        "12 bits unsigned implicit": make_file(low12, implicit=True, BitsStored=12),
        "12 bits signed": make_file(HEAD - 1000, BitsStored=12, RescaleIntercept="0"),
        "12 bits, unused bits set": make_file(high12, BitsStored=12),
        "12 bits signed, unused bits set": make_file(high12.astype(np.int16), BitsStored=12),
        "16 bits unsigned": make_file(RNG.integers(0, 65536, (64, 64), dtype=np.uint16)),
        "extremes": make_file(RNG.integers(-32768, 32768, (64, 64)).astype(np.int16)),
        "8 bits": make_file(HEAD.astype(np.uint8), BitsAllocated=8, BitsStored=8),
        "32 bits": make_file(HEAD.astype(np.int32), BitsAllocated=32, BitsStored=32),
        "odd shape": make_file(HEAD[:33, :17]),
        "one pixel": make_file(HEAD[:1, :1]),
        "wrapped": make_file(low12, BitsStored=12, RescaleIntercept="-1"),
        "slope 2": make_file(RescaleSlope="2"),
        "slope .25": make_file(RescaleSlope="0.25", RescaleIntercept="-1000.125"),
        "slope -1": make_file(RescaleSlope="-1"),
        "big slope": make_file(RescaleSlope="1e6"),
        "several slopes": make_file(RescaleSlope=["1", "1"]),
        "MONOCHROME1": make_file(PhotometricInterpretation="MONOCHROME1"),
        "no geometry": make_file(ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=None),
        "short geometry": make_file(ImagePositionPatient=["1", "2"]),
        "no patient": make_file(PatientID=None),
        "empty patient": make_file(PatientID=""),
        "umlaut": make_file(PatientID="Jürgen", SpecificCharacterSet="ISO_IR 192"),
        "two patients": make_file(PatientID="a\\b"),
        "sequence": make_file(ReferencedImageSequence=sequence),
        "sequence implicit": make_file(implicit=True, ReferencedImageSequence=sequence),
        "frames 1": make_file(NumberOfFrames=1),
        "private": to_bytes(_with_private(make_dataset())),
        "padding after": make_file() + b"\xfc\xff\xfc\xffOB\0\0\2\0\0\0\0\0",
        "pixels as OB": to_bytes(_with_pixel_vr(make_dataset(), "OB")),
        "too long": make_file(PixelData=HEAD.tobytes() + bytes(64)),
    }


def _with_private(ds):
    block = ds.private_block(0x0019, "ICH TEST", create=True)
    block.add_new(0x01, "UN", b"\x01\x02\x03\x04")
    block.add_new(0x02, "UT", "text " * 40)
    return ds


def _with_pixel_vr(ds, vr):
    ds["PixelData"].VR = vr
    return ds
