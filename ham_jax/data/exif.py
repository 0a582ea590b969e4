"""What a photograph's file says beside its pixels: which side is up, and what its samples mean.

Decoders interpret all of it as they open a file, and then one odd tag costs good pixels. So the
little that pixels need is read here, number by number, and the decoder gets a file without the
rest. Nothing here raises: what cannot be read is not there.
"""

import contextlib
import dataclasses
import math
import re
import struct
from typing import NamedTuple

_CUT_OFF = (struct.error, IndexError, OverflowError)
_ORIENTATION, _XMP, _NUM_NUMBERS = 274, 700, 16
# TIFF's types of numbers as struct's letters; a rational is two.
_LETTERS = dict(
    zip(
        (1, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 16, 17, 18),
        ("B", "H", "I", "II", "b", "h", "i", "ii", "f", "d", "I", "Q", "q", "Q"),
        strict=True,
    )
)
_SIZES = {2: 1, 7: 1} | {kind: struct.calcsize("=" + item) for kind, item in _LETTERS.items()}
# The tags of TIFF that say where and what pixels are, and the colour profile.
_TIFF_PIXELS = {
    *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324),
    *(325, 338, 339, 347, *range(512, 522), 529, 530, 532, 34675, 48129, 50674),
}
_TIFF_SCALARS = {256, 257, 259, 262, 266, 277, 278, 284, 317, 322, 323}
_TIFF_SAMPLES = {258, 262, 277, 280, 281, 284, 339, 340, 341}
# Of JPEG's application segments those that libjpeg or a profile needs: their beginning and least
# length; it ignores shorter ones, where Pillow raises.
_JPEG_LEAST = {0xE0: (b"JFIF\0", 14), 0xE2: (b"ICC_PROFILE\0", 14), 0xEE: (b"Adobe", 12)}

DISPLAY_P3 = 12
"""The number of its primaries in ITU-T H.273."""


@dataclasses.dataclass(frozen=True)
class Photograph:
    """A file's bytes, and what was read of them.

    Attributes:
      data: the file without the metadata that decoders would interpret.
      orientation: EXIF's or XMP's, 1 to 8; None where the decoder hands them over: `orientation`.
      samples: TIFF's tags about samples (258 BitsPerSample, 281 MaxSampleValue, ...); of a PNG
        with sBIT, its BitsPerSample.
      primaries: the number of ITU-T H.273 for the colours of a PNG, HEIF or AVIF.
    """

    data: bytes
    orientation: int | None = None
    samples: dict[int, tuple] = dataclasses.field(default_factory=dict)
    primaries: int | None = None


def read(data: bytes) -> Photograph:
    """Takes a file's metadata apart; the pixels stay as they are."""
    try:
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data)
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _tiff(data)
        if data.startswith(b"\x89PNG"):
            return _png(data)
        if data[4:8] == b"ftyp":
            return _heif(data)
    except _CUT_OFF:
        return Photograph(data)  # the decoder will say so
    return Photograph(data)


def orientation(exif: bytes | None, xmp: bytes | str | None) -> int:
    """Returns EXIF's orientation, 1 to 8, or else XMP's; 1 where neither can be read."""
    found = None
    exif = (exif or b"").removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    with contextlib.suppress(*_CUT_OFF):
        found = _orientation(_Directory.of(exif), exif)
    return found or _xmp_orientation(xmp) or 1


def _xmp_orientation(xmp: bytes | str | None) -> int | None:
    text = xmp if isinstance(xmp, str) else bytes(xmp or b"").decode("latin-1")
    match = re.search(r'tiff:Orientation(?:="|>)([1-8])', text)
    return int(match[1]) if match else None


class _Entry(NamedTuple):
    """An entry of a TIFF directory; `field` is the place of what is or points to its values."""

    tag: int
    kind: int
    count: int
    field: int
    own: bytes


@dataclasses.dataclass(frozen=True)
class _Directory:
    """TIFF's first directory, which EXIF is, too."""

    end: str  # "<" or ">", as in struct
    big: bool  # BigTIFF
    start: int
    entries: list[_Entry]

    @classmethod
    def of(cls, data: bytes) -> "_Directory":
        end = "<" if data[:2] == b"II" else ">"
        big = struct.unpack_from(end + "H", data, 2)[0] == 43
        (start,) = struct.unpack_from(end + ("Q" if big else "I"), data, 8 if big else 4)
        (count,) = struct.unpack_from(end + ("Q" if big else "H"), data, start)
        size, first = (20, start + 8) if big else (12, start + 2)
        entries = []
        for place in range(first, first + min(count, 0xFFFF) * size, size):
            own = data[place : place + size]
            if len(own) < size:
                break
            tag, kind, number = struct.unpack_from(end + ("HHQ" if big else "HHI"), own)
            entries.append(_Entry(tag, kind, number, place + size - (8 if big else 4), own))
        return cls(end, big, start, entries)

    def values(self, data: bytes, tag: int) -> tuple[int, bytes]:
        """Returns type and bytes of a tag's values, as far as they lie in the file."""
        entry = next((entry for entry in self.entries if entry.tag == tag), None)
        if entry is None or entry.kind not in _SIZES:
            return 7, b""
        num_bytes, place = entry.count * _SIZES[entry.kind], entry.field
        if num_bytes > (8 if self.big else 4):
            (place,) = struct.unpack_from(self.end + ("Q" if self.big else "I"), data, place)
        return entry.kind, data[place : place + num_bytes]

    def numbers(self, data: bytes, tag: int) -> tuple:
        """Returns the first values of a tag as numbers; none where they are none."""
        kind, raw = self.values(data, tag)
        whole = min(len(raw) // _SIZES[kind], _NUM_NUMBERS) * _SIZES[kind]
        if kind not in _LETTERS:
            return ()
        rows = struct.iter_unpack(self.end + _LETTERS[kind], raw[:whole])
        return tuple(row[0] / (row[1] or math.inf) if row[1:] else row[0] for row in rows)


def _orientation(found: _Directory, data: bytes) -> int | None:
    value = next(iter(found.numbers(data, _ORIENTATION)), 0)
    return int(value) if value in range(1, 9) else None


def _tiff(data: bytes) -> Photograph:
    """Leaves of the first directory what pixels need, and of all directories only that one."""
    found = _Directory.of(data)
    kept = [_whole(found, data, entry) for entry in found.entries if entry.tag in _TIFF_PIXELS]
    directory = struct.pack(found.end + ("Q" if found.big else "H"), len(kept)) + b"".join(kept)
    directory += bytes(8 if found.big else 4)  # no further directory
    return Photograph(
        data[: found.start] + directory + data[found.start + len(directory) :],
        _orientation(found, data) or _xmp_orientation(found.values(data, _XMP)[1]) or 1,
        {tag: found.numbers(data, tag) for tag in _TIFF_SAMPLES},
    )


def _whole(found: _Directory, data: bytes, entry: _Entry) -> bytes:
    """Returns an entry's bytes; a width of 40.0 or 40/1 becomes the whole number it has to be."""
    value = next(iter(found.numbers(data, entry.tag)), None)
    usual = entry.kind in (3, 4) or entry.tag not in _TIFF_SCALARS
    if usual or value is None or not (0 <= value < 1 << 32 and value == int(value)):
        return entry.own
    layout = found.end + ("HHQI4x" if found.big else "HHII")  # as one LONG
    return struct.pack(layout, entry.tag, 4, 1, int(value))


def _jpeg(data: bytes) -> Photograph:
    """Leaves out all application segments but those that colours depend on."""
    exif, xmp, kept, place, since = b"", None, [], 2, 0
    while data[place] == 0xFF:
        marker = data[place + 1]
        if marker in (0xFF, 0x01, *range(0xD0, 0xD9)):  # fill bytes, and segments of no length
            place += 1 if marker == 0xFF else 2
            continue
        if marker in (0xD9, 0xDA):
            break
        behind = place + 2 + struct.unpack_from(">H", data, place + 2)[0]
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            segment = data[place + 4 : behind]
            if segment.startswith(b"Exif\0\0"):
                exif += segment[6:]
            elif segment.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                xmp = segment
            name, least = _JPEG_LEAST.get(marker, (b"", 1 << 16))
            if not (segment.startswith(name) and len(segment) >= least):
                kept.append(data[since:place])
                since = behind
        place = behind
    data = b"".join([*kept, data[since:]]) if kept else data
    return Photograph(data, orientation(exif, xmp))


def _png(data: bytes) -> Photograph:
    head = data[: max(0, data.find(b"IDAT"))]
    bits, primaries = head.find(b"sBIT") + 4, head.find(b"cICP") + 4
    return Photograph(
        data,
        samples={258: (head[bits],)} if bits > 3 and head[bits] in range(1, 17) else {},
        primaries=head[primaries] if primaries > 3 else None,
    )


def _heif(data: bytes) -> Photograph:
    """Hides EXIF and XMP of HEIF and AVIF, whose own boxes say how their pixels are turned."""
    place, primaries = 0, None
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        size = struct.unpack_from(">Q", data, place + 8)[0] if size == 1 else size or len(data)
        if kind == b"meta":
            boxes = data[place : place + size]
            at = boxes.find(b"colrnclx") + 8
            primaries = struct.unpack_from(">H", boxes, at)[0] if at > 7 else None
            boxes = boxes.replace(b"Exif", b"free").replace(b"mime", b"free")
            data = data[:place] + boxes + data[place + size :]
        place += max(size, 8)
    return Photograph(data, primaries=primaries)
