"""Any photograph becomes the same RGB pixels; what cannot be read says why."""

import contextlib
import io
import multiprocessing
import os
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ham_jax.data import image
from ham_jax.data.image import ImageError

RNG = np.random.default_rng(0)
SMOOTH = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (6, 8, 3), np.uint8)).resize((40, 30), 3), np.uint8
)


def encode(pixels, form, mode=None, **options):
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "WEBP"])
def test_lossless_formats_come_back_as_they_were(form):
    options = {"lossless": True} if form == "WEBP" else {}
    np.testing.assert_array_equal(image.load(encode(SMOOTH, form, **options), (30, 40)), SMOOTH)


def test_jpeg_in_rgb_grey_and_cmyk():
    got = image.load(encode(SMOOTH, "JPEG", quality=95, subsampling=0), (30, 40))
    assert np.abs(got.astype(int) - SMOOTH).mean() < 4
    grey = image.load(encode(SMOOTH, "JPEG", "L", quality=95), (30, 40))
    assert (grey == grey[..., :1]).all()
    cmyk = image.load(encode(SMOOTH, "JPEG", "CMYK", quality=95, subsampling=0), (30, 40))
    assert np.abs(cmyk.astype(int) - SMOOTH).mean() < 6


def test_all_exif_turns_show_the_same_picture():
    turn_back = {  # what a camera that notes this orientation has stored
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }
    for orientation, stored in turn_back.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(np.ascontiguousarray(stored(SMOOTH)), "PNG", exif=exif)
        np.testing.assert_array_equal(image.load(data, (30, 40)), SMOOTH, err_msg=str(orientation))


def test_alpha_lies_over_white_and_palettes_are_colours():
    clear = np.dstack([SMOOTH, np.zeros((30, 40), np.uint8)])
    assert (image.load(encode(clear, "PNG"), (30, 40)) == 255).all()
    half = np.dstack([np.zeros_like(SMOOTH), np.full((30, 40), 128, np.uint8)])
    np.testing.assert_allclose(image.load(encode(half, "PNG"), (30, 40)), 127, atol=1)
    flat = Image.fromarray(np.full((30, 40, 3), (200, 10, 90), np.uint8)).quantize(4)
    assert (image.load(encode(flat, "PNG"), (30, 40)) == (200, 10, 90)).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight_by_scaling(form):
    deep = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
    got = image.load(encode(deep, form), (30, 40))
    np.testing.assert_allclose(got[..., 0], deep / 257, atol=1)


RAMP = np.linspace(0, 1, 1200).reshape(30, 40)
GREY = np.round(RAMP * 255)[..., None].repeat(3, 2)


def scaled(top, kind="u2"):
    return np.round(RAMP * top).astype(kind)


def tiff(values, form="minisblack", **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, photometric=form, **options)
    return buffer.getvalue()


def png16(values, *, sbit=b""):
    kind = {2: 0, 3: 2}[values.ndim]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"sBIT", sbit), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
        if body or name == b"IEND"
    )


def tagged(*tags):
    return {"extratags": [(tag, kind, 1, value, True) for tag, kind, value in tags]}


COLOURS = np.dstack([scaled(4095), scaled(4095)[::-1], scaled(4095)[:, ::-1]])


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("values", "options"),
    [
        (scaled(4095), {}),
        (scaled(1023), {}),
        (scaled(16383), tagged((281, 3, 16383))),  # MaxSampleValue
        (scaled(4095, "i2"), {}),
        (scaled(32767, "i2"), {}),
        (scaled(4095, "i4"), {}),
        (scaled(65535, "i4"), {}),
        (scaled(2**31 - 1, "i4"), {}),
        (scaled(4095, "i2") - 2048, tagged((340, 8, -2048), (341, 8, 2047))),  # SMin-, SMaxSample
        (RAMP.astype("f4"), {}),
        ((RAMP * 255).astype("f4"), tagged((341, 11, 255.0))),
    ],
)
def test_white_is_the_files_own_maximum(values, options, order):
    got = image.load(tiff(values, byteorder=order, **options), (30, 40))
    np.testing.assert_allclose(got, GREY, atol=1)


def test_white_of_other_formats_and_of_colours():
    for data in (
        tiff(scaled(2**32 - 1, "u4")),
        png16(scaled(4095)),
        png16(scaled(65535), sbit=b"\x0c"),
        b"P5 40 30 4095\n" + scaled(4095, ">u2").tobytes(),
        encode(scaled(4095), "JPEG2000", irreversible=False),
    ):
        np.testing.assert_allclose(image.load(data, (30, 40)), GREY, atol=1)
    dark = image.load(png16(scaled(511), sbit=b"\x0c"), (30, 40))  # 12 bits, as it says
    np.testing.assert_allclose(dark, GREY / 8, atol=1)
    white_is_zero = image.load(tiff(scaled(65535), "miniswhite"), (30, 40))
    np.testing.assert_allclose(white_is_zero, 255 - GREY, atol=1)
    wanted = np.round(COLOURS / 4095 * 255)
    whole = {"extratags": [(281, 3, 3, (16383,) * 3, True)]}
    for data in (
        png16(COLOURS),
        tiff(COLOURS, "rgb"),
        tiff(COLOURS, "rgb", byteorder=">", compression="zlib"),
        tiff(COLOURS * 4, "rgb", **whole),
        tiff(COLOURS.transpose(2, 0, 1) * 16, "rgb", planarconfig="separate"),
    ):
        np.testing.assert_allclose(image.load(data, (30, 40)), wanted, atol=1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(scaled(1_000_000, "i4")), "which is white"),
        (tiff(scaled(4095, "i2") - 2048), "which is white"),
        (tiff((RAMP * 255).astype("f4")), "which is white"),
        (tiff(np.where(RAMP > 0.9, np.nan, RAMP).astype("f4")), "NaN"),
        (tiff(np.where(RAMP > 0.9, np.inf, RAMP).astype("f4")), "infinity"),
        (tiff(RAMP), "kind of TIFF"),
        (tiff(COLOURS.transpose(2, 0, 1), "rgb", planarconfig="separate"), "fewer bits"),
        (b"P6 40 30 65535\n" + COLOURS.astype(">u2").tobytes(), "fewer bits"),
    ],
)
def test_a_range_that_nothing_tells_is_an_error(data, reason):
    with pytest.raises(ImageError, match=reason):
        image.load(data, (30, 40))


def test_geometry_covers_the_canvas_around_the_centre():
    wide = np.zeros((30, 80, 3), np.uint8)
    wide[:, 20:60] = SMOOTH
    np.testing.assert_array_equal(image.load(encode(wide, "PNG"), (30, 40)), SMOOTH)
    portrait = np.ascontiguousarray(np.rot90(SMOOTH, -1))
    np.testing.assert_array_equal(image.load(encode(portrait, "PNG"), (30, 40)), SMOOTH)
    big = np.asarray(Image.fromarray(SMOOTH).resize((400, 300), Image.Resampling.BICUBIC))
    assert np.abs(image.load(encode(big, "PNG"), (30, 40)).astype(int) - SMOOTH).mean() < 3


@pytest.mark.parametrize("size", [(193, 145), (145, 193)])
def test_a_size_whose_box_rounds_beyond_the_picture_is_read(size):
    pixels = image.load(encode(np.zeros((*size, 3), np.uint8), "PNG"), (150, 200))
    assert pixels.shape == (150, 200, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"this is a text", "not an image"),
        (encode(SMOOTH, "JPEG")[:400], "damaged"),
        (encode(SMOOTH, "PNG")[:300], "damaged"),
    ],
)
def test_what_cannot_be_read_says_why(data, reason, tmp_path):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ImageError, match=reason):
        image.load(tmp_path / "a.jpg", (30, 40))
    with pytest.raises(ImageError, match="no such file"):
        image.load(tmp_path / "b.jpg", (30, 40))


def test_every_suffix_of_the_formats_counts():
    Image.init()
    registered = Image.registered_extensions()
    for form, suffixes in image._FORMATS.items():
        known = {suffix for suffix, name in registered.items() if name == form}
        assert known <= set(suffixes), form
        assert form in Image.OPEN


@pytest.mark.parametrize("form", ["JPEG", "MPO", "GIF", "AVIF", "JPEG2000", "HEIF", "PPM"])
def test_formats_that_phones_and_tools_write_are_read(form):
    options = {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]}
    data = encode(SMOOTH, form, **(options if form in ("MPO", "GIF") else {}))
    assert np.abs(image.load(data, (30, 40)).astype(int) - SMOOTH).mean() < 12


SEEDS = [
    *(encode(SMOOTH, form) for form in ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "AVIF")),
    *(encode(SMOOTH, form) for form in ("JPEG2000", "MPO", "HEIF", "PPM", "DDS", "EPS", "TGA")),
    encode(SMOOTH, "JPEG", progressive=True),
    encode(SMOOTH, "TIFF", compression="tiff_lzw"),
    tiff(COLOURS, "rgb", compression="zlib"),
    bytes(128) + b"DICM" + bytes(200),
]


@settings(max_examples=400, deadline=None, database=None)
@given(st.data())
def test_whatever_a_file_holds_it_gives_pixels_or_an_image_error(data):
    file = bytearray(data.draw(st.sampled_from(SEEDS)))
    places = st.integers(0, len(file) - 1)
    how = data.draw(st.sampled_from(["cut", "flip", "splice"]))
    if how == "cut":
        del file[data.draw(places) :]
    elif how == "flip":
        near = st.integers(0, min(300, len(file) - 1))  # headers
        for place in data.draw(st.lists(near | places, min_size=1, max_size=8)):
            file[place] ^= data.draw(st.integers(1, 255))
    else:
        other = data.draw(st.sampled_from(SEEDS))
        start, since = data.draw(places), data.draw(st.integers(0, len(other)))
        file[start : data.draw(st.integers(start, len(file)))] = other[since : since + 200]
    try:
        pixels = image.load(bytes(file), (30, 40))
    except ImageError as error:
        assert str(error)  # noqa: PT017  (pixels are as good an answer)
    else:
        assert pixels.shape == (30, 40, 3)
        assert pixels.dtype == np.uint8


@pytest.mark.parametrize("form", ["DDS", "EPS", "TGA", "PDF"])
def test_what_is_no_photograph_is_not_opened_whatever_its_suffix(form):
    with pytest.raises(ImageError, match="not an image"):
        image.load(encode(SMOOTH, form), (30, 40))


@pytest.mark.parametrize(
    "opener", [lambda x: image.load(x, (6, 8)), lambda x: image.smaller_png(x, 9)]
)
def test_only_regular_files_of_a_sane_size_are_opened(opener, tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(1 << 31)
    for name, reason in {
        "fifo.jpg": "pipe",
        "/dev/zero": "device",
        "folder.jpg": "folder",
        "link.jpg": "a link to a file",
        "loop.jpg": "cannot be opened",
        "huge.jpg": "too large",
        "x" * 300: "cannot be opened",
        "null\0byte": "damaged",
    }.items():
        with pytest.raises(ImageError, match=reason):
            opener(tmp_path / name)


def many_scans():
    scans = encode(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
    last = scans[scans.rindex(b"\xff\xda") : -2]
    return scans[:-2] + last * 300 + scans[-2:]


def huge_heic():
    heic = encode(SMOOTH, "HEIF")
    size = heic.index(b"ispe") + 8
    return heic[:size] + b"\0\1\0\0" * 2 + heic[size + 8 :]


def test_pictures_that_would_take_for_ever_are_refused():
    with pytest.raises(ImageError, match="too large"):
        image.load(many_scans(), (30, 40))
    with pytest.raises(ImageError):
        image.load(huge_heic(), (30, 40))
    with pytest.raises(ImageError, match="too large: 40 x 30 pixels"):
        image.load(encode(SMOOTH, "PNG"), (30, 40), max_pixels=1199)


class Deadly:
    """A photograph that ends the process that receives it, as a crash or the kernel would."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_photograph_that_kills_its_process_is_named_and_the_others_are_read():
    good = encode(SMOOTH, "PNG")
    files = [good] * 90  # more than are under way at once
    files[3] = files[4] = Deadly()
    for number, got in enumerate(image.load_many(files, (30, 40), 2)):
        if number in (3, 4):
            assert isinstance(got, ImageError)
            assert "killed" in str(got)
        else:
            np.testing.assert_array_equal(got, SMOOTH)
    assert number == 89


class Endless:
    """A photograph at which the process that receives it stalls."""

    def __reduce__(self):
        return time.sleep, (60,)


def test_a_decoder_outlives_whatever_it_is_given():
    good = encode(SMOOTH, "PNG")
    with contextlib.closing(image.Decoder(1.0, max_pixels=1200)) as decoder:
        for source, reason in (
            (Endless(), "not decoded in 1 s"),
            (Deadly(), "killed"),
            (encode(np.zeros((40, 40, 3), np.uint8), "PNG"), "too large: 40 x 40"),
        ):
            assert reason in str(decoder.load(source, (30, 40)))
            np.testing.assert_array_equal(decoder.load(good, (30, 40)), SMOOTH)
    assert not multiprocessing.active_children()


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    picture = Image.fromarray(SMOOTH).resize((640, 480), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored as a portrait
    data = encode(picture.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)
    whole = encode(Image.open(io.BytesIO(data)), "PNG", exif=exif)
    difference = image.load(data, (96, 128)) - image.load(whole, (96, 128)).astype(float)
    assert 0 < np.sqrt((difference**2).mean()) < 1  # grey levels; 0 would mean: not decoded small
    spared = image.load(data, (240, 320)) - image.load(whole, (240, 320)).astype(float)
    assert not spared.any()  # half the size would leave nothing to spare


def test_many_keep_their_order_and_their_errors_over_processes(tmp_path):
    files = []
    for number in range(40):
        files.append(tmp_path / f"{number}.png")
        files[-1].write_bytes(encode(np.full((6, 8, 3), number, np.uint8), "PNG"))
    files[7].write_bytes(b"")
    for num_workers in (1, 2):
        got = list(image.load_many(files, (6, 8), num_workers))
        assert isinstance(got[7], ImageError)
        assert [x[0, 0, 0] for k, x in enumerate(got) if k != 7] == [*range(7), *range(8, 40)]


def test_a_decoding_process_starts_light():
    program = "import ham_jax.data.image, sys; print({'jax', 'tensorflow'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.strip() == "set()"


def test_a_smaller_picture_keeps_its_shape(tmp_path):
    path = tmp_path / "panel.png"
    path.write_bytes(encode(np.tile(SMOOTH, (4, 1, 1)), "PNG"))  # 120 x 40
    with Image.open(io.BytesIO(image.smaller_png(path, 60))) as picture:
        assert (picture.format, picture.size) == ("PNG", (20, 60))
    with Image.open(io.BytesIO(image.smaller_png(path, 500))) as picture:
        assert picture.size == (40, 120)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ImageError, match="damaged"):
        image.smaller_png(path, 60)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_a_pillow_image_and_its_file_are_the_same_photograph(mode, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    picture = Image.fromarray(pixels).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(path, exif=exif)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(image.load(opened, (30, 40)), image.load(path, (30, 40)))
    np.testing.assert_array_equal(image.load(pixels, (30, 40)), pixels)
    for odd in (pixels[..., 0], pixels.astype(np.float32), pixels[..., :2]):
        with pytest.raises(image.ImageError, match=r"uint8 \[H, W, 3\]"):
            image.load(odd, (30, 40))


def test_a_script_without_a_guard_decodes_many(tmp_path):
    """Python's own way would run it anew in each process, without end."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""\
            import numpy as np
            from ham_jax.data import image
            many = [np.full((30, 40, 3), number, np.uint8) for number in range(image._FEW)]
            print([int(pixels[0, 0, 0]) for pixels in image.load_many(many, (15, 20), 2)])
        """)
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert ended.stdout == f"{list(range(image._FEW))}\n", ended.stderr
