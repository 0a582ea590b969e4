"""THE decoder: any photograph -> RGB uint8 on the canvas. Only it and profiles.py know Pillow.

Training records, evaluation and prediction all decode here, so a photograph has the same pixels
everywhere.
"""

import collections
import concurrent.futures
import contextlib
import io
import itertools
import math
import os
import signal
import stat
import sys
import types
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

import numpy as np
import pillow_heif
from PIL import (
    AvifImagePlugin,  # noqa: F401  (importing a format's plugin makes it known to Image.open)
    Image,
    ImageFile,
    Jpeg2KImagePlugin,  # noqa: F401
    TiffImagePlugin,
    WebPImagePlugin,  # noqa: F401
)

from ham_jax.data import dicom, exif, profiles

# Pillow's formats of still photographs that a magic number tells, and their suffixes. Not those
# that start programs (EPS) or describe drawings, nor those without a magic number (TGA), as which
# a damaged file of another format would be read.
_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".hif", ".heics", ".heifs"),
}
SUFFIXES = frozenset({".dcm", ".dicom"}.union(*_FORMATS.values()))
"""Of the files that `load` reads, in small letters; it goes by their content."""

MAX_BYTES = 1 << 30
"""A larger file is no photograph, and is not read."""

pillow_heif.register_heif_opener(thumbnails=False)


class _Process(SpawnProcess):
    """Does not import the script that was started: one without `__name__ == "__main__"` goes on.

    Python runs the script anew in each process, so that what is pickled by its names is found. What
    decodes needs nothing of it.
    """

    def start(self) -> None:
        """Starts it with an empty script."""
        script = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = script


class _Context(SpawnContext):
    Process = _Process


_SPAWN = _Context()  # a fork would copy JAX's locked threads
_FEW = 32  # sources for which starting processes does not pay
_AHEAD_PER_WORKER = 32
_MAX_PIXELS = 200_000_000
_MAX_SCANS = 20  # of so many pixels: a progressive JPEG takes its time again for each scan
_SPARE = 1.5  # times the canvas's pixels along a side, at least, come out of the JPEG decoder
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FEW_BITS = "its 16-bit colours use fewer bits, and how many cannot be told; save it with 8 bits"
_UNREACHED = 4  # leading bits that no pixel of a picture uses tell that it has fewer


class ImageError(ValueError):
    """A photograph that cannot be decoded; the text says why."""


def load(source, canvas: tuple[int, int], max_pixels: int = _MAX_PIXELS) -> np.ndarray:
    """Decodes a photograph onto the canvas.

    The EXIF turn is applied. A portrait is turned a quarter to the left, for a lesion has no top:
    its pixels would otherwise be cropped away. Then the picture is scaled to cover the canvas,
    with antialiasing, and cropped around its centre. Colours of an embedded profile become sRGB.
    Alpha is laid over white; of an animation or a file of many pictures the first counts.

    More than 8 bits become 8 by scaling with the file's own maximum: MaxSampleValue or
    BitsPerSample of a TIFF, the window or BitsStored of a DICOM, sBIT of a PNG. Where nothing but
    the 16 or 32 bits of its storage is told and no pixel reaches the upper 4 of them, as in a
    microscope's 12 bits in 16, the fewest of 8, 10, 12 or 16 bits that hold all pixels are taken,
    for otherwise the picture would be nearly black. Floats must lie in [0, 1] or in a range that
    the file declares.

    Args:
      source: a path, a file's bytes, an object whose `read()` returns them, a Pillow image, or an
        array uint8 [H, W, 3] in sRGB.
      canvas: height, width in pixels; a portrait canvas turns landscapes instead.
      max_pixels: of more, a photograph is too large.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ImageError: missing, empty, truncated, damaged, too large, not an image, no regular file, or
        of a range of values that nothing tells.
    """
    with _faults_named():
        return _on_canvas(_decoded(_bytes(source), canvas, max_pixels), canvas)


def load_many(
    sources: Iterable, canvas: tuple[int, int], num_workers: int = 0
) -> Iterator[np.ndarray | ImageError]:
    """Decodes photographs in their order, on several processes where they are many.

    Args:
      sources: see `load`.
      canvas: height, width in pixels.
      num_workers: processes; 0: one a core; 1: none but this one.

    Yields:
      For each source its pixels, or the ImageError that says why there are none.
    """
    sources = list(sources)
    num_workers = num_workers or os.cpu_count() or 1
    if num_workers == 1 or len(sources) < _FEW:
        yield from map(_load_or_error, sources, itertools.repeat(canvas))
        return
    rest = iter(sources)
    while lost := (yield from _load_in_pool(rest, canvas, num_workers)):
        yield from _load_alone(lost, canvas)


def _load_in_pool(sources: Iterator, canvas: tuple[int, int], num_workers: int):
    """Yields as `load_many`; returns the sources that it has taken and lost with a process."""
    waiting: collections.deque[tuple] = collections.deque()
    with _pool(num_workers) as pool:
        try:
            for source in sources:
                waiting.append((source, None))
                waiting[-1] = (source, pool.submit(_load_or_error, source, canvas))
                if len(waiting) >= num_workers * _AHEAD_PER_WORKER:
                    yield waiting[0][1].result()
                    waiting.popleft()
            while waiting:
                yield waiting[0][1].result()
                waiting.popleft()
        except BrokenProcessPool:
            pass
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [source for source, _ in waiting]


def _load_alone(sources: list, canvas: tuple[int, int]) -> Iterator[np.ndarray | ImageError]:
    """Decodes one at a time in a process, so that one that ends it is known by that."""
    with contextlib.closing(Decoder()) as decoder:
        for source in sources:
            yield decoder.load(source, canvas)


class Decoder:
    """A process that decodes one photograph at a time; one that ends or stalls it is an ImageError.

    It starts with the first photograph, and anew after one that it did not survive.

    Args:
      time_limit_s: for a photograph; None: as long as it takes.
      max_pixels: see `load`.
    """

    def __init__(self, time_limit_s: float | None = None, max_pixels: int = _MAX_PIXELS):
        self._time_limit_s, self._max_pixels = time_limit_s, max_pixels
        self._process: SpawnProcess | None = None

    def start(self) -> None:
        """Starts the process, and waits until it is ready; EOFError where none lives here."""
        self._pipe, its_end = _SPAWN.Pipe()
        self._process = _SPAWN.Process(
            target=_decode, args=(its_end, self._max_pixels), daemon=True
        )
        self._process.start()
        its_end.close()  # so that the pipe ends with the process
        self._pipe.recv()

    def load(self, source, canvas: tuple[int, int]) -> np.ndarray | ImageError:
        """Returns a photograph's pixels, or the ImageError that says why there are none."""
        if self._process is None or not self._process.is_alive():
            self.close()
            self.start()
        try:
            self._pipe.send((source, canvas))
            if self._pipe.poll(self._time_limit_s):
                return self._pipe.recv()
            error = ImageError(f"damaged or too large: not decoded in {self._time_limit_s:g} s")
        except (EOFError, ConnectionError):
            error = ImageError("damaged or too large: the process that decoded it was killed")
        self.close()
        return error

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
            self._pipe.close()


def _decode(pipe: Connection, max_pixels: int) -> None:
    """Decodes what comes through the pipe until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, for the process that started it
    pipe.send(None)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            source, canvas = pipe.recv()
            pipe.send(_load_or_error(source, canvas, max_pixels))


def _pool(num_workers: int) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(num_workers, _SPAWN)


def save_jpeg(pixels: np.ndarray, path: str | os.PathLike, quality: int) -> None:
    """Writes uint8 [H, W, 3] as a JPEG."""
    Image.fromarray(pixels).save(path, "JPEG", quality=quality)


def png(pixels: np.ndarray) -> bytes:
    """Returns uint8 [H, W, 3] as a PNG."""
    return _png(Image.fromarray(pixels))


def smaller_png(path: str | os.PathLike, side: int) -> bytes:
    """Returns a picture as PNG, its longer side `side` pixels at the most.

    Raises:
      ImageError: as `load`.
    """
    with _faults_named():
        picture = _decoded(_bytes(path))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _load_or_error(
    source, canvas: tuple[int, int], max_pixels: int = _MAX_PIXELS
) -> np.ndarray | ImageError:
    try:
        return load(source, canvas, max_pixels)
    except ImageError as error:
        return error


@contextlib.contextmanager
def _faults_named() -> Iterator[None]:
    """Turns whatever is raised about one file into that file's ImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd but readable metadata
            yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ImageError("too large: more pixels than any photograph has") from error
    # Pillow's plugins, libheif and pydicom raise anything for damaged files: RuntimeError,
    # struct.error, AttributeError, NotImplementedError, ... One file must not end a batch.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(f"damaged or unreadable: {reason}") from error


def is_one(photographs: Any) -> bool:
    """Returns whether this is one photograph, as `load` takes it, and not several."""
    if isinstance(photographs, np.ndarray):
        return photographs.ndim < 4
    one = (str, os.PathLike, bytes, Image.Image)
    return isinstance(photographs, one) or hasattr(photographs, "read")


def _bytes(source) -> bytes:
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ImageError(
                f"an array must be uint8 [H, W, 3], not {source.dtype} {list(source.shape)}"
            )
        source = Image.fromarray(source)
    if isinstance(source, str | os.PathLike):
        data = _file_bytes(source)
    elif isinstance(source, Image.Image):
        data = _png(source)
    else:
        data = source if isinstance(source, bytes) else source.read()
    if not data:
        raise ImageError("the file is empty")
    return data


def _png(picture: Image.Image) -> bytes:
    """Returns a picture as a file without loss, so that all are decoded on the same road."""
    if picture.mode not in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"):
        picture = picture.convert("RGB")
    buffer = io.BytesIO()
    about = {name: picture.info[name] for name in ("icc_profile", "exif") if name in picture.info}
    picture.save(buffer, "PNG", compress_level=1, **about)
    return buffer.getvalue()


def _file_bytes(path: str | os.PathLike) -> bytes:
    """Reads a regular file; anything else might never end, or wait for ever."""
    try:
        # Not blocking, or opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                kind = "folder" if stat.S_ISDIR(status.st_mode) else "device, pipe or socket"
                raise ImageError(f"a {kind}, not a file")
            if status.st_size > MAX_BYTES:
                raise ImageError(f"too large: {status.st_size / 1e9:.1f} GB in one file")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(status.st_size)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        link = os.path.islink(path)
        raise ImageError(
            "a link to a file that is not there" if link else "there is no such file"
        ) from error
    except OSError as error:
        raise ImageError(f"cannot be opened: {error.strerror or error}") from error


def _decoded(
    data: bytes, canvas: tuple[int, int] | None = None, max_pixels: int = _MAX_PIXELS
) -> Image.Image:
    """Returns a file's picture, turned as its EXIF says, in sRGB.

    Args:
      data: the file.
      canvas: height, width that it will be scaled to; a JPEG may then be decoded smaller.
      max_pixels: see `load`.
    """
    if dicom.is_dicom(data):
        return _dicom(data, max_pixels)
    file = exif.read(data)
    # Uncompressed planes of 16 bits come out as noise unless libtiff takes them apart.
    TiffImagePlugin.READ_LIBTIFF = _in_planes(file)
    with _opened(file.data) as image:
        num_scans = file.data.count(b"\xff\xda") if image.format == "JPEG" else 1
        if image.width * image.height * max(1, num_scans / _MAX_SCANS) > max_pixels:
            raise ImageError(
                f"too large: {image.width} x {image.height} pixels; at most"
                f" {max_pixels / 1e6:g} million are read"
            )
        if canvas and image.format == "JPEG":
            # libjpeg can decode a half, quarter or eighth of each side, the faster the smaller.
            # With so many pixels to spare the result is within a grey level (51 dB) of scaling
            # the whole picture. Long side goes to long side, before and after the turns.
            scale = max(min(canvas) / min(image.size), max(canvas) / max(image.size))
            width, height = (math.ceil(side * scale * _SPARE) for side in image.size)
            image.draft(None, (width, height))
        turn = file.orientation or _orientation(image.info)
        profile = image.info.get("icc_profile")
        if not profile and file.primaries == exif.DISPLAY_P3:
            profile = profiles.display_p3()
        picture = profiles.to_srgb(_eight_bit_image(image, file), profile)
    return picture.transpose(_TURNS[turn]) if turn in _TURNS else picture


def _opened(data: bytes) -> ImageFile.ImageFile:
    try:
        return Image.open(io.BytesIO(data), formats=tuple(_FORMATS))
    except Image.UnidentifiedImageError as error:
        if data[:2] in (b"II", b"MM"):
            raise ImageError(
                "damaged, or a kind of TIFF that is not read; save it with 8 bits"
            ) from error
        raise ImageError("not an image in a known format, or damaged at its beginning") from error


def _in_planes(file: exif.Photograph) -> bool:
    """Whether a TIFF holds 16-bit samples in one plane after the other."""
    return file.samples.get(284, ())[:1] == (2,) and 16 in file.samples.get(258, ())


def _on_canvas(image: Image.Image, canvas: tuple[int, int]) -> np.ndarray:
    height, width = canvas
    if (image.height > image.width and height < width) or (
        image.height < image.width and height > width
    ):
        image = image.transpose(Image.Transpose.ROTATE_90)
    scale = max(height / image.height, width / image.width)
    # Rounded, the box could be wider than the picture by the last digit, which Pillow refuses.
    box_height, box_width = min(height / scale, image.height), min(width / scale, image.width)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def _orientation(info: dict) -> int:
    raw = info.get("exif")
    if raw is None and (text := info.get("Raw profile type exif")):  # ImageMagick's PNGs
        with contextlib.suppress(ValueError):
            raw = bytes.fromhex("".join(text.split("\n")[3:]))
    return exif.orientation(raw, info.get("XML:com.adobe.xmp") or info.get("xmp"))


def _dicom(data: bytes, max_pixels: int) -> Image.Image:
    try:
        found = dicom.read(data, max_pixels)
    except dicom.UnreadableError as error:
        raise ImageError(str(error)) from error
    pixels = _eight_bits(found.values, found.bits, found.window)
    return profiles.to_srgb(
        Image.fromarray(255 - pixels if found.inverted else pixels), found.profile
    )


def _eight_bit_image(image: ImageFile.ImageFile, file: exif.Photograph) -> Image.Image:
    """Scales what has more than 8 bits; Pillow alone would clip greys and cut colours off."""
    samples, ends = file.samples, None
    signed = samples.get(339, ())[:1] == (2,)  # SampleFormat
    bits = next(iter(samples.get(258, ())), 16) - signed
    low, high = (
        next((samples[tag][0] for tag in tags if samples.get(tag)), None)
        for tags in ((340, 280), (341, 281))  # (S)MinSampleValue, (S)MaxSampleValue
    )
    if high is not None and high != (1 << bits) - 1:  # that is its default
        ends = (low or 0, high)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if bits == 32 and values.dtype == np.int32:
            values = values.view(np.uint32)  # Pillow knows signed ones only
        pixels = _eight_bits(values, bits, _held(ends, values))
        white_is_zero = samples.get(262, ())[:1] == (0,)
        return Image.fromarray(255 - pixels if white_is_zero else pixels)
    # What Pillow's decoder is told: the order of bits, and of a PPM the maximum.
    told = str(image.tile[0][3] if image.tile else "")
    if image.mode in ("RGB", "RGBA") and (";16" in told or "65535" in told):
        return _eight_bit_colours(image, file, ends)
    return image


def _eight_bit_colours(
    image: ImageFile.ImageFile, file: exif.Photograph, ends: tuple[float, float] | None
) -> Image.Image:
    """Scales colours of 16 bits, of which Pillow reads the upper 8 or, told so, the lower."""
    tiles = list(image.tile)
    image.load()
    upper = np.asarray(image)
    if ends is None and upper[..., :3].max() > 1 << (8 - _UNREACHED):
        return image
    if _in_planes(file):  # Pillow takes the upper bytes, whatever it is told
        raise ImageError(_FEW_BITS)
    with _opened(file.data) as again:
        again.tile = [_other_byte(tile) for tile in tiles]
        values = upper.astype(np.uint16) * 256 + np.asarray(again)
    colours, alpha = values[..., :3], values[..., 3:]
    parts = [_eight_bits(colours, 16, _held(ends, colours))]
    return Image.fromarray(np.dstack([*parts, _eight_bits(alpha, 16)] if alpha.size else parts))


def _other_byte(tile: ImageFile._Tile) -> ImageFile._Tile:
    """Returns a tile of Pillow's with the order of its samples' two bytes reversed."""
    told = tile.args
    args = told if isinstance(told, tuple) else (str(told),)
    coding, order = args[0][:-1], args[0][-1]
    if coding not in ("RGB;16", "RGBA;16", "RGBX;16"):
        raise ImageError(_FEW_BITS)
    little = order == "L" or (order == "N" and sys.byteorder == "little")
    args = (coding + ("B" if little else "L"), *args[1:])
    return tile._replace(args=args if isinstance(told, tuple) else args[0])


def _held(ends: tuple[float, float] | None, values: np.ndarray) -> tuple[float, float] | None:
    """Returns a declared range unless values leave it."""
    if ends and ends[0] < ends[1] and ends[0] <= values.min() and values.max() <= ends[1]:
        return ends
    return None


def _eight_bits(
    values: np.ndarray, bits: int, ends: tuple[float, float] | None = None
) -> np.ndarray:
    """Scales values to uint8.

    Args:
      values: grey or colour values, whole or floating.
      bits: how many of a whole number may be used.
      ends: the values of black and white, if they are known.

    Raises:
      ImageError: nothing tells which value is white.
    """
    if values.dtype == np.uint8 and bits == 8 and ends is None:
        return values
    floating = values.dtype.kind == "f"
    if floating and not np.isfinite(values).all():
        raise ImageError("its pixels hold NaN or infinity")
    low, high = ends or (0.0, 1.0 if floating else _white(int(values.max()), bits))
    if low >= high or (not ends and (values.min() < 0 or values.max() > high)):
        raise ImageError(
            f"its values reach from {values.min():g} to {values.max():g}, and nothing in the file"
            " tells which is white; save it with 8 or 16 bits, or as floats from 0 to 1"
        )
    scaled = (values.astype(np.float64) - low) / (high - low)
    return np.round(np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def _white(largest: int, bits: int) -> int:
    """Returns the value of white, see `load`; one below `largest` where nothing tells it."""
    storage = bits + bits % 2  # with the sign
    if storage in (16, 32) and not largest >> (storage - _UNREACHED):
        bits = next((few for few in (8, 10, 12, 16) if few < bits and not largest >> few), 0)
    elif largest >> bits:
        bits = 16  # declared too small
    return (1 << bits) - 1
