"""The other side of `python -m ham_jax.benchmark step`: the same network and batch in PyTorch.

Needs torch, torchvision and efficientnet-lite-pytorch, in this environment or in one of its own
(`--torch_python`). The benchmark starts it and talks to it as to its own workers: it prints one
line of JSON when it is warm; for each line with a number of steps it takes them and prints the
seconds that they took.
"""

import argparse
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


def main() -> None:
    """Warms up and obeys."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--px", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--form", choices=["eager", "compile"], required=True)
    flags = parser.parse_args()
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    torch.backends.cudnn.benchmark = True

    net = network(flags.model, flags.px).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    image = torch.rand(flags.batch, 3, flags.px, flags.px, device=device)
    image = image.contiguous(memory_format=torch.channels_last)
    label = torch.arange(flags.batch, device=device) % 7

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            return torch.nn.functional.cross_entropy(net(image), label)

    if flags.form == "compile":
        forward = torch.compile(forward)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward().backward()
        optimizer.step()

    def finish() -> None:
        if gpu:
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    finish()
    about = {
        "parameters": sum(p.numel() for p in net.parameters()),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "versions": {"torch": torch.__version__},
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        finish()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
