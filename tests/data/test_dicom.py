"""DICOM photographs are read by their window, bits and colours."""

import io
import sys

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate

from ham_jax.data import image
from ham_jax.data.image import ImageError

RAMP = np.linspace(0, 1, 1200).reshape(30, 40)
GREY = np.round(RAMP * 255)[..., None].repeat(3, 2)
SMOOTH = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)).resize((40, 30))
)


def dicom(pixels, kind="MONOCHROME2", bits=8, *, syntax=uid.ExplicitVRLittleEndian, **fields):
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = syntax
    file = pydicom.dataset.FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    file.Rows, file.Columns = pixels.shape[:2]
    file.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    if pixels.ndim == 3:
        file.PlanarConfiguration = 0
    file.PhotometricInterpretation = kind
    file.BitsAllocated, file.BitsStored, file.HighBit = pixels.itemsize * 8, bits, bits - 1
    file.PixelRepresentation = int(pixels.dtype.kind == "i")
    file.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(file, name, value)
    buffer = io.BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def scaled(top, kind="<u2"):
    return np.round(RAMP * top).astype(kind)


def encoded(form, **options):
    buffer = io.BytesIO()
    Image.fromarray(SMOOTH).save(buffer, form, **options)
    return encapsulate([buffer.getvalue()])


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (dicom(scaled(255, "u1")), GREY),
        (dicom(scaled(255, "u1"), "MONOCHROME1"), 255 - GREY),
        (dicom(scaled(4095), bits=12), GREY),
        (dicom(scaled(4095), bits=16, RescaleSlope="1", RescaleIntercept="0"), GREY),
        (dicom(scaled(4095), bits=12, RescaleSlope="-1", RescaleIntercept="4095"), 255 - GREY),
        (dicom(scaled(4095, "<i2") - np.int16(2048), bits=12), GREY),
        (dicom(scaled(999), bits=12, WindowCenter=["500", "7"], WindowWidth=["1000", "7"]), GREY),
        (dicom(scaled(4095), bits=12, WindowCenter="0", WindowWidth="0"), GREY),
        (dicom(SMOOTH, "RGB"), SMOOTH),
        (dicom(SMOOTH, "RGB", NumberOfFrames=2, PixelData=SMOOTH.tobytes() + bytes(3600)), SMOOTH),
        (
            dicom(
                SMOOTH,
                "RGB",
                syntax=uid.JPEG2000Lossless,
                PixelData=encoded("JPEG2000", no_jp2=True),
            ),
            SMOOTH,
        ),
    ],
)
def test_values_become_those_of_a_screen(data, wanted):
    np.testing.assert_allclose(image.load(data, (30, 40)), wanted, atol=1)


def test_other_colours_become_rgb():
    data = dicom(np.asarray(Image.fromarray(SMOOTH).convert("YCbCr")), "YBR_FULL")
    np.testing.assert_allclose(image.load(data, (30, 40)), SMOOTH, atol=3)
    data = encoded("JPEG", quality=98, subsampling=0)
    data = dicom(SMOOTH, "YBR_FULL_422", syntax=uid.JPEGBaseline8Bit, PixelData=data)
    np.testing.assert_allclose(image.load(data, (30, 40)), SMOOTH, atol=12)
    tables = [np.arange(256, dtype="<u2") * 257, np.arange(256, dtype="<u2")[::-1] * 257]
    fields = {}
    for name, table in zip(
        ("Red", "Green", "Blue"), (tables[0], tables[1], tables[0]), strict=True
    ):
        fields[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        fields[f"{name}PaletteColorLookupTableData"] = table.tobytes()
    got = image.load(dicom(scaled(255, "u1"), "PALETTE COLOR", **fields), (30, 40))
    np.testing.assert_array_equal(got, np.dstack([GREY[..., 0], 255 - GREY[..., 0], GREY[..., 0]]))


def test_what_cannot_be_read_says_why(monkeypatch):
    whole = dicom(SMOOTH, "RGB")
    with pytest.raises(ImageError, match="too large"):
        image.load(dicom(SMOOTH, "RGB", Rows=60000, Columns=60000), (30, 40))
    with pytest.raises(ImageError, match="deflated"):
        image.load(dicom(SMOOTH, "RGB", syntax=uid.DeflatedExplicitVRLittleEndian), (30, 40))
    with pytest.raises(ImageError, match="damaged"):
        image.load(whole[:-100], (30, 40))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImageError, match="pip install"):
        image.load(whole, (30, 40))


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(128, 900), st.integers(1, 255)), min_size=1, max_size=6))
def test_a_damaged_file_gives_pixels_or_an_image_error(flips):
    file = bytearray(dicom(SMOOTH, "RGB"))
    for place, bits in flips:
        file[place] ^= bits
    try:
        assert image.load(bytes(file), (30, 40)).shape == (30, 40, 3)
    except ImageError as error:
        assert str(error)  # noqa: PT017  (pixels are as good an answer)
