"""The other side of `python benchmarks/speed.py loop`: a training loop fed by a torch DataLoader.

The network and optimiser of torch_step.py and the DataLoader of torch_feed.py, with turns and
colour changes as ham_jax makes them. Needs what these two need.
"""

import argparse
from pathlib import Path

import torch
from torch_feed import Photographs
from torch_step import Step
from torchvision.transforms import v2


class QuarterTurn(torch.nn.Module):
    """Exchanges rows and columns of every other image."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[3, px, px] -> the same."""
        return image.mT if torch.rand(()) < 0.5 else image


def main() -> None:
    """Obeys with batches of photographs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--px", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--frozen", action="store_true", help="train from stage 3 on")
    flags = parser.parse_args()
    step = Step(flags.model, flags.px, "eager", flags.frozen)
    more = [QuarterTurn(), v2.ColorJitter(0.2, 0.2, 0.2, 0.025)]
    loader = torch.utils.data.DataLoader(
        Photographs(flags.images, flags.px, 10_000, more),
        flags.batch,
        shuffle=True,
        num_workers=flags.workers,
        persistent_workers=flags.workers > 0,
        pin_memory=step.gpu,
    )
    label = torch.arange(flags.batch, device=step.device) % 7

    def batches():
        for image in loader:
            image = image.to(step.device, non_blocking=True)
            yield image.contiguous(memory_format=torch.channels_last), label

    step.obey(batches())


if __name__ == "__main__":
    main()
