"""Draws the picture at the top of the README: `python benchmarks/readme_picture.py`."""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from ham_jax.classes import HAM10000  # noqa: E402
from ham_jax.data import image, synthetic  # noqa: E402

if __name__ == "__main__":
    rows = [
        np.hstack([synthetic.draw(dx, [0, number], [1, number]) for dx in HAM10000])
        for number in (0, 3)
    ]
    image.save_jpeg(np.vstack(rows), HERE / "readme.jpg", quality=88)
