"""Colours are those that the camera meant, in sRGB."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from ham_jax.data import image, profiles

P3 = profiles.display_p3()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
COLOURS = np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)
SKIN = (COLOURS // 6 + np.array([200, 140, 110])).astype(np.uint8)


def saved(pixels, form="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def to_xyz(red, green, blue):
    """The matrix of primaries given as (x, y) to XYZ, for a white of D65."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (red, green, blue)]).T
    white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
    return columns * np.linalg.solve(columns, white)


def p3_in_srgb(pixels):
    """Display P3 to sRGB by SMPTE EG 432-1 and IEC 61966-2-1, without any colour library."""
    p3 = to_xyz((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
    srgb = to_xyz((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
    value = pixels / 255
    light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    light = np.clip(light @ (np.linalg.inv(srgb) @ p3).T, 0, 1)
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_display_p3_becomes_srgb(form):
    options = {"lossless": True} if form == "WEBP" else {}
    for pixels in (COLOURS, SKIN):
        got = image.load(saved(pixels, form, icc_profile=P3, **options), (30, 40))
        np.testing.assert_allclose(got, p3_in_srgb(pixels), atol=1)
    assert np.abs(p3_in_srgb(SKIN) - SKIN).max() > 14  # what ignoring it would cost


def test_primaries_named_by_a_number_count_where_there_is_no_profile():
    flat = np.full((60, 80, 3), (200, 120, 90), np.uint8)
    numbers = {"color_primaries": 12, "transfer_characteristics": 13, "matrix_coefficients": 6}
    options = {"quality": -1, "chroma": 444, "full_range_flag": 1}
    got = image.load(saved(flat, "HEIF", **numbers, **options), (30, 40))
    np.testing.assert_allclose(got, p3_in_srgb(flat[:30, :40]), atol=2)
    got = image.load(saved(flat, "HEIF", icc_profile=P3, **options), (30, 40))
    np.testing.assert_allclose(got, p3_in_srgb(flat[:30, :40]), atol=2)


@pytest.mark.parametrize(
    "profile", [SRGB, P3[:300], b"no profile", b"\0" * 200, P3[:128] + bytes(len(P3) - 128)]
)
def test_srgb_and_damaged_profiles_leave_pixels_alone(profile):
    np.testing.assert_array_equal(
        image.load(saved(COLOURS, icc_profile=profile), (30, 40)), COLOURS
    )


def test_a_profile_of_greys_changes_greys_only():
    grey = P3[:16] + b"GRAY" + P3[20:].replace(b"rTRC", b"kTRC")  # the curve of sRGB
    got = image.load(saved(COLOURS[..., 0], icc_profile=grey), (30, 40))
    np.testing.assert_allclose(got, COLOURS[..., :1].repeat(3, 2), atol=1)
    gamma = grey.index(b"para") + 8
    linear = grey[:gamma] + struct.pack(">Hxxi", 0, 65536) + grey[gamma + 8 :]
    got = image.load(saved(COLOURS[..., 0], icc_profile=linear), (30, 40))
    light = COLOURS[..., 0] / 255
    wanted = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    np.testing.assert_allclose(got, wanted[..., None].repeat(3, 2), atol=1)
    np.testing.assert_array_equal(image.load(saved(COLOURS, icc_profile=linear), (30, 40)), COLOURS)


def test_inks_with_a_profile_of_other_colours_are_read_as_ever():
    inks = Image.fromarray(COLOURS).convert("CMYK")
    files = [io.BytesIO(), io.BytesIO()]
    inks.save(files[0], "TIFF")
    inks.save(files[1], "TIFF", icc_profile=P3[:200])
    plain, damaged = (image.load(file.getvalue(), (30, 40)) for file in files)
    np.testing.assert_array_equal(plain, damaged)
