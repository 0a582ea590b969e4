"""The other side of `python benchmarks/speed.py step`: the same network and batch in PyTorch.

Needs torch, torchvision and efficientnet-lite-pytorch, in this environment or in one of its own
(`--torch_python`). The benchmark starts it and talks to it as to its own workers: it prints one
line of JSON when it is warm; for each line with a number of steps it takes them and prints the
seconds that they took.
"""

import argparse
import itertools
import json
import sys
import time

import torch


def network(name: str, px: int) -> torch.nn.Module:
    """Returns the network that ham_jax names so, with seven classes."""
    if name.startswith("efficientnet_lite"):
        from efficientnet_lite_pytorch import EfficientNet

        # Ours has neither of the two.
        without = {"dropout_rate": 0.0, "drop_connect_rate": 0.0}
        return EfficientNet.from_name(
            name.replace("_", "-"), image_size=px, num_classes=7, **without
        )
    import torchvision

    return getattr(torchvision.models, name)(num_classes=7, zero_init_residual=True)


def freeze(net: torch.nn.Module) -> None:
    """Stops training stem, stage 1 and stage 2, as ham_jax's `optim.freeze` does.

    Their BatchNorms, as ours, go on normalising by the batch and keeping its averages.
    """
    if hasattr(net, "_blocks"):  # EfficientNet-Lite, whose third stage is the first of 5x5 kernels
        stage3 = [b._block_args.kernel_size for b in net._blocks].index(5)
        early = [net._conv_stem, net._bn0, *net._blocks[:stage3]]
    else:
        early = [net.conv1, net.bn1, net.layer1, net.layer2]
    for module in early:
        module.requires_grad_(False)


class Step:
    """A training step of a network on the device there is, forward `eager` or `compile`d."""

    def __init__(self, name: str, px: int, form: str, frozen: bool = False):
        torch.manual_seed(0)
        self.gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.gpu else "cpu")
        torch.backends.cudnn.benchmark = True
        self.net = network(name, px).to(self.device, memory_format=torch.channels_last).train()
        if frozen:
            freeze(self.net)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.loss = torch.compile(self._loss) if form == "compile" else self._loss

    def _loss(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.gpu):
            return torch.nn.functional.cross_entropy(self.net(image), label)

    def __call__(self, image: torch.Tensor, label: torch.Tensor) -> None:
        """Takes a step with float images [B, 3, px, px] and labels [B] on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(image, label).backward()
        self.optimizer.step()

    def finish(self) -> None:
        """Waits for the device."""
        if self.gpu:
            torch.cuda.synchronize()

    def obey(self, batches) -> None:
        """Warms up, says so, and takes as many steps as it is told to, again and again."""
        for _ in range(3):
            self(*next(batches))
        self.finish()
        about = {
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "trained": sum(p.numel() for p in self.net.parameters() if p.requires_grad),
            "device": torch.cuda.get_device_name() if self.gpu else "cpu",
            "versions": {"torch": torch.__version__},
        }
        print(json.dumps(about), flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            for _ in range(int(line)):
                self(*next(batches))
            self.finish()
            print(time.perf_counter() - start, flush=True)


def main() -> None:
    """Obeys with one batch, which lies on the device."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--px", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--form", choices=["eager", "compile"], required=True)
    parser.add_argument("--frozen", action="store_true", help="train from stage 3 on")
    flags = parser.parse_args()
    step = Step(flags.model, flags.px, flags.form, flags.frozen)
    image = torch.rand(flags.batch, 3, flags.px, flags.px, device=step.device)
    image = image.contiguous(memory_format=torch.channels_last)
    label = torch.arange(flags.batch, device=step.device) % 7
    step.obey(itertools.repeat((image, label)))


if __name__ == "__main__":
    main()
