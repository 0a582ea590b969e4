"""Metadata never costs pixels: whatever EXIF says, only the orientation counts."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ham_jax.data import image

SMOOTH = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8), "RGB").resize(
        (40, 30), 3
    )
)
CANVAS = SMOOTH.shape[:2]
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
TURNED = {1: lambda x: x, 2: np.fliplr, 3: lambda x: x[::-1, ::-1], 4: np.flipud}
CAMERA = {  # what every camera writes: type, count, bytes
    0x10F: (2, 6, b"Appel\0"),
    0x11A: (5, 1, bytes(8)),
    0x128: (4, 1, bytes(4)),
    0x132: (2, 20, b"2024:01:01 00:00:00\0"),
    0x213: (4, 1, bytes(4)),
}


def directory(entries, end, at):
    """A TIFF directory for the place `at`, with its values behind it."""
    table, values = struct.pack(end + "H", len(entries)), b""
    behind = at + 2 + 12 * len(entries) + 4
    for tag, (kind, count, raw) in sorted(entries.items()):
        field = raw if len(raw) <= 4 else struct.pack(end + "I", behind + len(values))
        values += raw if len(raw) > 4 else b""
        table += struct.pack(end + "HHI", tag, kind, count % 2**32) + field.ljust(4, b"\0")
    return table + bytes(4) + values


def tiff(entries, end="<", pixels=b""):
    head = b"II*\0" if end == "<" else b"MM\0*"
    at = 8 + len(pixels)
    return head + struct.pack(end + "I", at) + pixels + directory(entries, end, at)


def saved(form, **options):
    buffer = io.BytesIO()
    Image.fromarray(SMOOTH).save(buffer, form, **options)
    return buffer.getvalue()


def jpeg_with(exif):
    segment = b"Exif\0\0" + exif
    data = saved("JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def png_with(exif):
    chunk = b"eXIf" + exif
    chunk = struct.pack(">I", len(exif)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = saved("PNG")
    return data[:33] + chunk + data[33:]


def webp_with(exif):
    head = b"VP8X" + struct.pack("<I4xI", 10, 0)[:4] + bytes([8, 0, 0, 0, 39, 0, 0, 29, 0, 0])
    exif = b"EXIF" + struct.pack("<I", len(exif)) + exif + bytes(len(exif) % 2)
    body = b"WEBP" + head + saved("WEBP", lossless=True)[12:] + exif
    return b"RIFF" + struct.pack("<I", len(body)) + body


def heif_with(form, exif):
    good = b"II*\0\x08\0\0\0".ljust(len(exif), b"\0")  # of its length, in whose place it comes
    data = saved(form, exif=b"Exif\0\0" + good)
    assert data.count(good) == 1
    return data.replace(good, exif)


def tiff_with(entries, end):
    short, long = (lambda *v: struct.pack(f"{end}{len(v)}H", *v)), struct.Struct(end + "I").pack
    values = {256: 40, 257: 30, 259: 1, 262: 2, 277: 3, 278: 30}
    pixels = {tag: (3, 1, short(value)) for tag, value in values.items()}
    pixels[258] = (3, 3, short(8, 8, 8))
    pixels |= {273: (4, 1, long(8)), 279: (4, 1, long(SMOOTH.size))}
    return tiff({**entries, **pixels}, end, SMOOTH.tobytes())


@st.composite
def altered(draw):
    """EXIF of a camera in which one tag but the orientation has become anything."""
    end = draw(st.sampled_from("<>"))
    turn = draw(st.sampled_from(list(TURNED)))
    tag = draw(st.sampled_from(list(CAMERA)) | st.integers(0, 0xFFFF).filter(lambda x: x != 0x112))
    kind = draw(st.sampled_from([*SIZES, 0, 14, 99]))
    raw = draw(st.binary(max_size=4)) * SIZES.get(kind, 1)
    count = draw(st.just(len(raw) // SIZES.get(kind, 1)) | st.integers(-2, 2**32 - 1))
    entries = CAMERA | {0x112: (3, 1, struct.pack(end + "H", turn)), tag: (kind, count, raw)}
    return entries, end, turn


MAKERS = {
    "JPEG": lambda entries, end: jpeg_with(tiff(entries, end)),
    "PNG": lambda entries, end: png_with(tiff(entries, end)),
    "WEBP": lambda entries, end: webp_with(tiff(entries, end)),
    "TIFF": tiff_with,
    "AVIF": lambda entries, end: heif_with("AVIF", tiff(entries, end)),
    "HEIF": lambda entries, end: heif_with("HEIF", tiff(entries, end)),
}


@pytest.mark.parametrize("form", MAKERS)
def test_no_tag_but_the_orientation_changes_pixels(form):
    options = {"lossless": True} if form == "WEBP" else {}
    plain = image.load(saved(form, **options), CANVAS)

    @settings(max_examples=60, deadline=None, database=None)
    @given(altered())
    def check(exif):
        entries, end, turn = exif
        # HEIF and AVIF say how they are turned in a box of their own; EXIF must not turn them.
        wanted = plain if form in ("AVIF", "HEIF") else TURNED[turn](plain)
        np.testing.assert_array_equal(image.load(MAKERS[form](entries, end), CANVAS), wanted)

    check()


@pytest.mark.parametrize("form", ["JPEG", "TIFF", "PNG"])
@pytest.mark.parametrize(
    ("kind", "layout", "value", "turn"),
    [
        (3, "H", 3, 3),
        (4, "I", 3, 3),
        (11, "f", 3.0, 3),
        (3, "H", 0, 1),
        (3, "H", 9, 1),
        (8, "h", -3, 1),
        (12, "d", float("nan"), 1),
        (2, "4s", b"3\0\0\0", 1),
    ],
)
def test_an_orientation_is_a_number_from_1_to_8_or_there_is_none(form, kind, layout, value, turn):
    raw = struct.pack("<" + layout, value)
    entries = {0x10F: (2, 2**31, b"out of the file"), 0x112: (kind, 1, raw)}
    plain = image.load(MAKERS[form]({}, "<"), CANVAS)
    np.testing.assert_array_equal(
        image.load(MAKERS[form](entries, "<"), CANVAS), TURNED[turn](plain)
    )


@pytest.mark.parametrize("form", ["AVIF", "HEIF"])
def test_a_turned_heif_is_turned_once(form):
    wide = Image.fromarray(SMOOTH).resize((160, 120))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    wide.transpose(Image.Transpose.ROTATE_90).save(buffer, form, exif=exif.tobytes())
    got = image.load(buffer.getvalue(), (120, 160)).astype(int)
    assert np.abs(got - np.asarray(wide)).mean() < 6


def test_xmp_turns_where_exif_does_not():
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="3"/>'
    data = saved("JPEG")
    turned = data[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + data[2:]
    np.testing.assert_array_equal(image.load(turned, CANVAS), TURNED[3](image.load(data, CANVAS)))


@pytest.mark.parametrize(("tag", "value"), [(256, 40), (257, 30), (259, 1), (277, 3), (278, 30)])
@pytest.mark.parametrize(("kind", "layout"), [(5, "II"), (8, "h"), (11, "f"), (12, "d")])
def test_a_tiff_may_note_its_width_as_any_kind_of_number(tag, value, kind, layout):
    raw = struct.pack("<" + layout, value, *[1] * (len(layout) - 1))
    data = tiff_with({}, "<")
    count = struct.unpack_from("<H", data, 8 + SMOOTH.size)[0]
    place = next(
        at
        for at in range(10 + SMOOTH.size, 10 + SMOOTH.size + 12 * count, 12)
        if struct.unpack_from("<H", data, at)[0] == tag
    )
    field = raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack("<I", len(data))
    entry = struct.pack("<HHI", tag, kind, 1) + field
    data = data[:place] + entry + data[place + 12 :] + raw
    np.testing.assert_array_equal(image.load(data, CANVAS), SMOOTH)
