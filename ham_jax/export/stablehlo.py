"""`model.stablehlo`: the same for JAX alone, on CPU, CUDA and TPU, without this package.

`jax.export.deserialize(bytes).call(image)` answers; see `program` for what goes in and comes out.
"""

from pathlib import Path

import jax
import numpy as np
from jax import export

from ham_jax import files
from ham_jax.export import program
from ham_jax.model import Model

_PLATFORMS = ("cpu", "cuda", "tpu")
_BATCH = 8


def write(model: Model, path: Path) -> None:
    """Writes the file, whole or not at all."""
    call = jax.jit(program.Program(model).__call__)
    with program.portable():
        exported = export.export(call, platforms=_PLATFORMS)(*program.arguments(model).values())
    files.write_bytes(path, bytes(exported.serialize()))


def answer(path: Path, images: np.ndarray, metadata: np.ndarray | None = None) -> program.Outputs:
    """Returns what the file says, as arrays; see `onnx.answer`."""
    call = jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
    given = (images,) if metadata is None else (images, metadata)
    parts = [
        call(*(values[start : start + _BATCH] for values in given))
        for start in range(0, len(images), _BATCH)
    ]
    return jax.tree.map(lambda *of: np.concatenate(of), *parts)
