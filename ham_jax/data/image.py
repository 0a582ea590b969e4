"""THE decoder: any photograph -> RGB uint8 on the canvas. The only room that knows Pillow.

Training records, evaluation and prediction all decode here, so a photograph has the same pixels
everywhere.
"""

import collections
import concurrent.futures
import io
import itertools
import math
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp"})

_FEW = 32  # sources for which starting processes does not pay
_AHEAD_PER_WORKER = 32
_MAX_PIXELS = 200_000_000
_SPARE = 1.5  # times the canvas's pixels along a side, at least, come out of the JPEG decoder


class ImageError(ValueError):
    """A photograph that cannot be decoded; the text says why."""


def load(source, canvas: tuple[int, int]) -> np.ndarray:
    """Decodes a photograph onto the canvas.

    The EXIF turn is applied. A portrait is turned a quarter to the left, for a lesion has no top:
    its pixels would otherwise be cropped away. Then the picture is scaled to cover the canvas,
    with antialiasing, and cropped around its centre. Alpha is laid over white, 16 bits become 8,
    of an animation the first frame counts.

    Args:
      source: a path, bytes, or an object whose `read()` returns bytes.
      canvas: height, width in pixels; a portrait canvas turns landscapes instead.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ImageError: missing, empty, truncated, damaged, too large or not an image.
    """
    try:
        data = _bytes(source)
        if not data:
            raise ImageError("the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd but readable metadata
            with Image.open(io.BytesIO(data)) as image:
                return _on_canvas(image, canvas)
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError("not an image in a known format") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too large: more pixels than any photograph has") from error
    except FileNotFoundError as error:
        raise ImageError("there is no such file") from error
    # What Pillow raises for damaged files depends on the format.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError) as error:
        raise ImageError(f"damaged or unreadable: {error}") from error


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
    context = multiprocessing.get_context("spawn")  # a fork would copy JAX's locked threads
    with concurrent.futures.ProcessPoolExecutor(num_workers, context) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for source in sources:
                waiting.append(pool.submit(_load_or_error, source, canvas))
                if len(waiting) >= num_workers * _AHEAD_PER_WORKER:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def save_jpeg(pixels: np.ndarray, path: str | os.PathLike, quality: int) -> None:
    """Writes uint8 [H, W, 3] as a JPEG."""
    Image.fromarray(pixels).save(path, "JPEG", quality=quality)


def smaller_png(path: str | os.PathLike, side: int) -> bytes:
    """Returns a picture as PNG, its longer side `side` pixels at the most.

    Raises:
      ImageError: as `load`.
    """
    try:
        with Image.open(path) as image:
            picture = _rgb(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"damaged or unreadable: {error}") from error
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _load_or_error(source, canvas: tuple[int, int]) -> np.ndarray | ImageError:
    try:
        return load(source, canvas)
    except ImageError as error:
        return error


def _bytes(source) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | os.PathLike):
        return Path(source).read_bytes()
    return source.read()


def _on_canvas(image: Image.Image, canvas: tuple[int, int]) -> np.ndarray:
    height, width = canvas
    if image.width * image.height > _MAX_PIXELS:
        raise ImageError(f"too large: {image.width} x {image.height} pixels")
    # libjpeg can decode a half, quarter or eighth of each side, the faster the smaller. With so
    # many pixels to spare the result is within a grey level (51 dB) of scaling the whole picture.
    # Long side goes to long side, before and after the turns.
    scale = _SPARE * max(min(canvas) / min(image.size), max(canvas) / max(image.size))
    image.draft(None, tuple(math.ceil(side * scale) for side in image.size))
    image = _rgb(ImageOps.exif_transpose(image))
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


def _rgb(image: Image.Image) -> Image.Image:
    """Converts any mode; Pillow alone would clip 16 bits and paint transparency black."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scales grey values of 16 bits, or floats in [0, 1], to uint8."""
    values = values.astype(np.float64)
    top = 1.0 if values.max(initial=0) <= 1.0 else 255.0 if values.max() <= 255.0 else 65535.0
    return np.round(np.clip(values / top, 0, 1) * 255).astype(np.uint8)
