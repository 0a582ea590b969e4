"""How well a run tells pictures that are no lesions from its validation images.

python benchmarks/ood.py --workdir=runs/lite

The photographs are scikit-image's (requirements-test.txt); the run needs its ood.npz, which
--mode=eval --split=val makes. Prints a row a kind: pictures, the area under the ROC curve against
the validation images, and how many of the pictures are marked.
"""

import argparse
import io
import string
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont
from skimage import data as photographs
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).parents[1]))

from ham_jax import console, model, parallel
from ham_jax.data import image as image_files
from ham_jax.data import prepare

PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "cat", "chelsea", "clock", "coffee", "coins", "grass"),
    *("gravel", "hubble_deep_field", "moon", "rocket"),
)
CROPS = 10  # of each photograph
DRAWN = 120  # of each kind that is made up
SKIN = ("#ffe0c4", "#f1c2a5", "#e0ac69", "#c68642", "#8d5524", "#5c381e")


def crops(rng, names, count):
    """Yields uint8 [h, w, 3] of 3:4, 40 to 100 % of what fits into each picture."""
    for name in names:
        whole = Image.fromarray(getattr(photographs, name)()).convert("RGB")
        for share in rng.uniform(0.4, 1, count):
            height = int(share * min(whole.height, whole.width * 3 / 4))
            width = height * 4 // 3
            left = rng.integers(whole.width - width + 1)
            top = rng.integers(whole.height - height + 1)
            yield np.asarray(whole.crop((left, top, left + width, top + height)))


def noise(rng, size):
    """Yields uniform and Gaussian noise, in colour and grey."""
    for number in range(DRAWN):
        values = rng.random((*size, 3)) if number % 2 else rng.normal(0.5, 0.2, (*size, 3))
        values = values if number % 4 < 2 else np.repeat(values[..., :1], 3, -1)
        yield (values.clip(0, 1) * 255).astype(np.uint8)


def blank(rng, size):
    """Yields pictures of one colour: any, and every second one that of a skin."""
    for number in range(DRAWN):
        color = rng.integers(0, 256, 3)
        if number % 2:
            tone = ImageColor.getrgb(SKIN[number // 2 % len(SKIN)])
            color = (tone + rng.integers(-12, 13, 3)).clip(0, 255)
        yield np.full((*size, 3), color, np.uint8)


def text(rng):
    """Yields pages of letters, and parts of two photographed ones."""
    for _ in range(DRAWN):
        page = Image.new("RGB", (800, 600), tuple(rng.integers(200, 256, 3).tolist()))
        size, ink = int(rng.integers(16, 60)), tuple(rng.integers(0, 90, 3).tolist())
        letters = rng.choice([*string.ascii_letters, " ", " "], (600 // size, 60))
        ImageDraw.Draw(page).text(
            (10, 10),
            "\n".join("".join(line) for line in letters),
            fill=ink,
            font=ImageFont.load_default(size),
        )
        yield np.asarray(page)
    yield from crops(rng, ("page", "text"), CROPS)


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parallel.compile_cache()
    mesh = parallel.mesh()
    run = model.restore(parser.parse_args().workdir, [], mesh).with_detector()
    detector = run.detector
    if detector is None:
        return

    def score(pictures):
        files = []
        for pixels in pictures:
            files.append(io.BytesIO())
            Image.fromarray(pixels).save(files[-1], "PNG")
        decoded = [image_files.load(file.getvalue(), run.canvas) for file in files]
        return detector.score(run.features(np.stack(decoded)))

    images = prepare.prepare(run.config).select("val")
    lesions = detector.score(run.features(images))
    rng = np.random.default_rng(0)
    kinds = {
        "photographs": score(crops(rng, PHOTOGRAPHS, CROPS)),
        "noise": score(noise(rng, run.canvas)),
        "one colour": score(blank(rng, run.canvas)),
        "text": score(text(rng)),
    }
    kinds["all"] = np.concatenate(list(kinds.values()))
    table = [["validation", f"{len(lesions)}", "", f"{(lesions > 1).mean():.3f}"]]
    for kind, scores in kinds.items():
        truth = np.repeat([0, 1], [len(lesions), len(scores)])
        area = roc_auc_score(truth, np.concatenate([lesions, scores]))
        table.append([kind, f"{len(scores)}", f"{area:.4f}", f"{(scores > 1).mean():.3f}"])
    console.print_table(run.name, ["pictures", "n", "AUROC", "marked"], table)


if __name__ == "__main__":
    main()
