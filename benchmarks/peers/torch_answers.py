"""The other side of `python benchmarks/answers.py`: the same network in PyTorch, answering.

A DataLoader decodes with Pillow; the network is in evaluation and `channels_last`. Its weights are
random, which takes no less time. Needs torch, torchvision and efficientnet-lite-pytorch. Prints
JSON when it is warm; for each line with a number it answers so many photographs, or, below 0, so
many one by one, and prints the seconds that they took.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch_step import network
from torchvision.transforms import v2


class Photographs(torch.utils.data.Dataset):
    """Files scaled to the canvas, of which the network sees the central square."""

    def __init__(self, files: list[str], canvas: tuple[int, int], px: int):
        self.files, self.canvas = files, canvas
        self.view = v2.Compose(
            [
                v2.PILToTensor(),
                v2.CenterCrop(min(canvas)),
                v2.Resize(px, antialias=True),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([127 / 255] * 3, [128 / 255] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> torch.Tensor:
        height, width = self.canvas
        with Image.open(self.files[number]) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        return self.view(ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC))


def turned(image: torch.Tensor, k: int) -> torch.Tensor:
    """Returns one of the eight symmetries of squares [B, 3, s, s]."""
    image = image.flip(3) if k & 1 else image
    image = image.flip(2) if k & 2 else image
    return image.transpose(2, 3) if k & 4 else image


def main() -> None:
    """Warms up and obeys."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--canvas", required=True)
    parser.add_argument("--px", type=int, required=True)
    parser.add_argument("--views", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    flags = parser.parse_args()
    canvas = tuple(map(int, flags.canvas.split("x")))
    net = network(flags.model, flags.px).to(memory_format=torch.channels_last).eval()
    found = sorted(map(str, flags.images.rglob("*.jpg")))

    @torch.inference_mode()
    def ask(num: int, workers: int) -> None:
        files = (found * (num // len(found) + 1))[:num]
        photographs = Photographs(files, canvas, flags.px)
        for batch in torch.utils.data.DataLoader(photographs, flags.batch, num_workers=workers):
            image = batch.to(memory_format=torch.channels_last)
            views = [net(turned(image, k)).softmax(-1) for k in range(flags.views)]
            torch.stack(views).mean(0).numpy()

    ask(2 * flags.batch, 0)
    ask(1, 0)
    print(json.dumps({"versions": {"torch": torch.__version__}}), flush=True)
    for line in sys.stdin:
        num = int(line)
        start = time.perf_counter()
        for part in [num] if num > 0 else [1] * -num:
            ask(part, os.cpu_count() if num > 0 else 0)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
