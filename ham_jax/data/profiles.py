"""Colour profiles: the colours that a camera meant, in sRGB."""

import functools
import struct

import numpy as np
from PIL import Image, ImageCms

_SAME_COLOUR = 2  # levels of 255 by which a profile may differ from sRGB and still be taken for it


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts any mode to RGB, and its colours from those of an ICC profile to sRGB.

    A profile that is damaged, or for other colours than the picture's, counts as none.
    """
    mode, transform = _transform(profile) if profile else (None, None)
    if transform and mode == "CMYK" == image.mode:
        return transform.apply(image)
    grey = image.mode in ("1", "L", "LA", "La")
    image = _rgb(image)
    if transform and mode == "RGB":
        return transform.apply(image)
    if transform and mode == "L" and grey:
        return transform.apply(image.convert("L"))
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """Converts any mode; Pillow alone would paint transparency black."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[str | None, ImageCms.ImageCmsTransform | None]:
    """Returns the mode that a profile is for and what takes it to sRGB.

    Neither where it is sRGB itself or cannot be used. Relative colorimetric with black point
    compensation: colours that sRGB holds, as all skin's, stay exactly what they are, where the
    perceptual intent would shift them all in a way that is each profile maker's own.
    """
    try:
        source = ImageCms.core.profile_frombytes(profile)
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.xcolor_space.strip()]
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            # LittleCMS's tables for greys are too coarse for dark ones.
            ImageCms.Flags.BLACKPOINTCOMPENSATION
            | (ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE),
        )
        colours = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), -1)
        probe = Image.fromarray(colours.reshape(1, -1, 3)).convert(mode)
        after = transform.apply(probe)
    # The profile of a good picture may be damaged, or be for no picture: as if there were none.
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError):
        return None, None
    change = np.asarray(after, np.int16) - np.asarray(probe.convert("RGB"))
    return (mode, transform) if np.abs(change).max() > _SAME_COLOUR else (None, None)


@functools.cache
def display_p3() -> bytes:
    """Returns an ICC profile of Display P3, for files that name their primaries by a number."""

    def numbers(kind: bytes, *values: float) -> bytes:
        return (
            kind + bytes(4) + struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))
        )

    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0)
    curve += numbers(b"", 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)[4:]
    text = b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 4, 28)
    tags = {
        b"desc": text + "P3".encode("utf-16-be"),
        b"wtpt": numbers(b"XYZ ", 0.96420, 1, 0.82491),
        b"rXYZ": numbers(b"XYZ ", 0.51512, 0.24120, -0.00105),
        b"gXYZ": numbers(b"XYZ ", 0.29198, 0.69225, 0.04189),
        b"bXYZ": numbers(b"XYZ ", 0.15710, 0.06657, 0.78407),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(value))
        body += value
    head = struct.pack(">I4xI4s4s4s", start + len(body), 0x04300000, b"mntr", b"RGB ", b"XYZ ")
    head = (head + bytes(12) + b"acsp").ljust(68, b"\0")
    return head + numbers(b"", 0.96420, 1, 0.82491)[4:] + bytes(48) + table + body
