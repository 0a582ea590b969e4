"""The other side of `python benchmarks/speed.py feed`: a torch DataLoader over the photographs.

Decoding with Pillow, a random resized crop and flips, as most PyTorch training code has it. Needs
torch and torchvision. Prints JSON when it is warm; for each line with a number of images it loads
at least as many and prints [images, seconds].
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2


class Photographs(torch.utils.data.Dataset):
    """A folder of JPEG files, seen `repeats` times; `more` transforms follow crop and flips."""

    def __init__(self, folder: Path, px: int, repeats: int, more=()):
        self.files = sorted(folder.rglob("*.jpg")) * repeats
        self.view = v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomResizedCrop(px, (0.4, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(),
                *more,
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self.files[number]) as image:
            return self.view(image.convert("RGB"))


def main() -> None:
    """Warms up and obeys."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--px", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    flags = parser.parse_args()
    loader = torch.utils.data.DataLoader(
        Photographs(flags.images, flags.px, 10_000),
        flags.batch,
        shuffle=True,
        num_workers=flags.workers,
        persistent_workers=flags.workers > 0,
    )
    batches = iter(loader)
    next(batches)
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        # What was loaded ahead while this process had to wait is not part of the measurement.
        for _ in range(2 * flags.workers):
            next(batches)
        start, done = time.perf_counter(), 0
        while done < int(line):
            done += len(next(batches))
        print(json.dumps([done, time.perf_counter() - start]), flush=True)


if __name__ == "__main__":
    main()
