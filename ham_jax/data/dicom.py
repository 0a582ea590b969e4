"""DICOM photographs, through pydicom, which is installed only where they are read."""

import dataclasses
import io

import numpy as np

_DEFLATED = b"1.2.840.10008.1.2.1.99"  # a transfer syntax that unpacks to any size
_NEEDS = (
    'a DICOM file, which needs pydicom: python -m pip install "pydicom>=3,<4" or "ham-jax[dicom]"'
)


class UnreadableError(ValueError):
    """A DICOM file of a kind that is not read; the text says which."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """The first frame of a DICOM file.

    Attributes:
      values: [H, W], or [H, W, 3] in RGB.
      bits: how many of each value count.
      window: the values of black and white; None where those of `bits` are.
      inverted: the least value is white.
      profile: an ICC profile, or None.
    """

    values: np.ndarray
    bits: int
    window: tuple[float, float] | None
    inverted: bool
    profile: bytes | None


def is_dicom(data: bytes) -> bool:
    """Whether a file is DICOM, by its magic number."""
    return data[128:132] == b"DICM"


def read(data: bytes, max_pixels: int) -> Samples:
    """Reads a file's first frame.

    Raises:
      UnreadableError: pydicom is not installed, too many pixels, or a kind that is not read.
      Exception: whatever pydicom raises for a damaged file.
    """
    try:
        import pydicom
        from pydicom import pixels
    except ModuleNotFoundError as error:
        raise UnreadableError(_NEEDS) from error
    if _DEFLATED in data[:4096]:
        raise UnreadableError("a deflated DICOM file; save it in another transfer syntax")
    file = pydicom.dcmread(io.BytesIO(data))
    if "PixelData" not in file:
        raise UnreadableError("a DICOM file without a picture")
    shape = (file.Columns, file.Rows, file.SamplesPerPixel)
    if file.Rows * file.Columns > max_pixels or file.SamplesPerPixel not in (1, 3):
        raise UnreadableError("too large, or not grey or RGB: {} x {} x {}".format(*shape))
    values, bits, window = pixels.pixel_array(file, index=0), file.BitsStored, None
    kind = file.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        values = pixels.apply_color_lut(values, file)[..., :3]
        bits = file.RedPaletteColorLookupTableDescriptor[2]
    elif kind.startswith("MONOCHROME"):
        values, window = _window(file, values)
    return Samples(values, bits, window, kind == "MONOCHROME1", file.get("ICCProfile"))


def _window(file, values: np.ndarray) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Returns grey values as a screen would be given them, and which are black and white."""
    from pydicom import pixels

    least = -(1 << file.BitsStored - 1) if file.PixelRepresentation else 0
    stored = np.array([least, least + (1 << file.BitsStored) - 1], np.float64)
    ends = stored
    if "ModalityLUTSequence" in file:
        values = pixels.apply_modality_lut(values, file)
        ends = np.array([0.0, (1 << file.ModalityLUTSequence[0].LUTDescriptor[2]) - 1])
    elif "RescaleSlope" in file:
        ends = pixels.apply_modality_lut(stored, file)
        if (ends != stored).any():
            values = pixels.apply_modality_lut(values, file)
    if "VOILUTSequence" in file:
        values = pixels.apply_voi_lut(values, file)
        return values, (0.0, float((1 << file.VOILUTSequence[0].LUTDescriptor[2]) - 1))
    centre, width = (_first(file.get(key)) for key in ("WindowCenter", "WindowWidth"))
    if centre is not None and width is not None and width > 1:
        # DICOM PS3.3, C.11.2.1.2.1: the linear window.
        return values, (centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2)
    return values, (min(ends), max(ends)) if least or (ends != stored).any() else None


def _first(value) -> float | None:
    """Of several windows the first counts."""
    if value is None:
        return None
    return float(value[0] if hasattr(value, "__getitem__") and len(value) else value)
