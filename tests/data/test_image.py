"""Any photograph becomes the same RGB pixels; what cannot be read says why."""

import io
import subprocess
import sys

import numpy as np
import pytest
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
