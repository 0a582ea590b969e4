"""Every malformed photograph of the suite, as a file, for what takes uploads."""

import runpy
from pathlib import Path

import numpy as np

_HERE = Path(__file__).parent


def _cases(made, test):
    """Returns what the first argument of a parametrized test is in each of its cases."""
    (mark,) = (mark for mark in made[test].pytestmark if mark.name == "parametrize")
    return [case[0] if isinstance(case, tuple) else case for case in mark.args[1]]


def files() -> dict[str, bytes]:
    """Returns them by name: the same each time."""
    made = {
        name: runpy.run_path(str(_HERE / "data" / f"test_{name}.py"))
        for name in ("image", "exif", "dicom", "profiles")
    }
    image, exif, dicom, profiles = made.values()
    found = {
        "many_scans.jpg": image["many_scans"](),
        "huge.heic": image["huge_heic"](),
        "zip_bomb.jpg": runpy.run_path(str(_HERE / "attacks.py"))["zeros"](1 << 30),
        "exif_out_of_file.jpg": exif["jpeg_with"](
            exif["tiff"]({0x10F: (2, 2**31, b"out of the file"), 0x112: (12, 1, b"\xff" * 8)})
        ),
    }
    smooth = dicom["SMOOTH"]
    whole = dicom["dicom"](smooth, "RGB")
    found["huge.dcm"] = dicom["dicom"](smooth, "RGB", Rows=60000, Columns=60000)
    deflated = dicom["uid"].DeflatedExplicitVRLittleEndian
    found["deflated.dcm"] = dicom["dicom"](smooth, "RGB", syntax=deflated)
    for test in ("what_cannot_be_read_says_why", "a_range_that_nothing_tells_is_an_error"):
        for number, data in enumerate(_cases(image, f"test_{test}")):
            found[f"{test}_{number}"] = data
    for number, profile in enumerate(
        _cases(profiles, "test_srgb_and_damaged_profiles_leave_pixels_alone")
    ):
        found[f"profile_{number}.png"] = profiles["saved"](profiles["COLOURS"], icc_profile=profile)
    for form in ("DDS", "EPS", "TGA", "PDF"):
        found[f"no_photograph.{form.lower()}"] = image["encode"](image["SMOOTH"], form)
    rng = np.random.default_rng(0)
    for number, seed in enumerate([*image["SEEDS"], whole]):
        for how in range(6):
            data = bytearray(seed)
            place = int(rng.integers(len(data)))
            if how == 0:
                del data[place:]
            elif how == 1:
                other = image["SEEDS"][int(rng.integers(len(image["SEEDS"])))]
                data[place:place] = other[: place % 200]
            else:
                for at in rng.integers(min(900 if seed is whole else 300, len(data)), size=how):
                    data[at] ^= int(rng.integers(1, 256))
            found[f"damaged_{number}_{how}"] = bytes(data)
    return found
