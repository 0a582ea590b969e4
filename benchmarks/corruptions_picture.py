"""Draws one lesion under every corruption: `python benchmarks/corruptions_picture.py`.

A row a corruption, in the order of `corruptions.NAMES`: the clean lesion, then mild to severe.
"""

import sys
from pathlib import Path

import jax
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from ham_jax.data import image, synthetic  # noqa: E402
from ham_jax.evaluation import corruptions  # noqa: E402

if __name__ == "__main__":
    clean = synthetic.draw("mel", [0, 11], [1, 6])[None].astype(np.float32) / 255
    number = corruptions.image_numbers(["ISIC_0024306"])
    corrupt = jax.jit(corruptions.corrupt)
    severities = range(1, corruptions.NUM_SEVERITIES + 1)
    rows = [
        np.hstack([clean[0], *(corrupt(clean, number, kind, s)[0] for s in severities)])
        for kind in range(len(corruptions.NAMES))
    ]
    pixels = np.round(np.vstack(rows) * 255).astype(np.uint8)
    image.save_jpeg(pixels, HERE / "corruptions.jpg", quality=70)
