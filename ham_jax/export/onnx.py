"""`model.onnx`: photographs on the canvas -> what `Model.predict` says of them, for ONNX Runtime.

Resampling, colours, all views, calibration and the out-of-distribution score are in the graph.
Inputs and outputs are those of `program`. What a program in any language needs beside them stands
in the model's metadata_props, as JSON: see `_properties`.
"""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np

from ham_jax import DISCLAIMER, files
from ham_jax.config import InputError
from ham_jax.data import metadata as codes
from ham_jax.export import program
from ham_jax.model import Model

_BATCH = 8  # of `answer`: 64 views of 224 x 224 pixels need a gigabyte at the most


def faults() -> list[str]:
    """Returns a sentence if the packages of the extra `export` are not installed."""
    missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    if not missing:
        return []
    return [
        f"model.onnx needs {' and '.join(missing)}, which {'are' if missing[1:] else 'is'} not"
        " installed: pip install 'ham-jax[export]', or pip install onnx onnxruntime."
    ]


def write(model: Model, path: Path) -> None:
    """Writes the file, whole or not at all.

    Raises:
      InputError: the packages are not installed.
    """
    if missing := faults():
        raise InputError(missing)
    from ham_jax.export import graph

    inputs = program.arguments(model)
    call = program.Program(model)
    outputs = program.output_names(model)

    def in_order(*arrays):
        said = call(*arrays)
        return [said[name] for name in outputs]

    with program.portable():
        traced = jax.jit(in_order).trace(*inputs.values()).jaxpr
    made = graph.model(traced, list(inputs), outputs)
    made.producer_name, made.doc_string = "ham_jax", DISCLAIMER
    for key, value in _properties(model).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        made.metadata_props.add(key=key, value=text)
    files.write_bytes(path, made.SerializeToString())


def _properties(model: Model) -> dict[str, object]:
    """Returns what stands in metadata_props: texts, and what is written as JSON.

    `thresholds`, where there is a calibration: a photograph is flagged where the probabilities of
    the malignant classes sum up to `malignant` or more, and a diagnosis is in its set where its
    probability is its number of `shown` or more; the other kinds of set stand beside it.
    `metadata`, of a network that takes it: the places of the input's codes, see
    `data.metadata.encode`. A photograph is unlike those of training where `ood_score` is above 1.
    """
    said: dict[str, object] = {
        "classes": list(model.classes.names),
        "titles": list(model.classes.titles),
        "malignant": list(model.classes.malignant),
        "canvas": list(model.canvas),
        "provenance": {"name": model.workdir.name, **model.provenance},
        "disclaimer": DISCLAIMER,
    }
    if model.calibrator is not None:
        method = model.config.eval.calibration
        said["calibration"] = method
        of_any = model.calibrator.apply(method, np.ones((1, len(model.classes)))).thresholds
        said["thresholds"] = {kind: least[0].tolist() for kind, least in of_any.items()}
    if model.takes_metadata:
        said["metadata"] = {
            "age": codes.AGES.tolist(),
            "sex": list(codes.SEXES),
            "localization": list(codes.SITES),
            "missing": codes.MISSING.tolist(),
        }
    return said


def answer(path: Path, images: np.ndarray, metadata: np.ndarray | None = None) -> program.Outputs:
    """Returns what the file says, as arrays, computed by ONNX Runtime on CPU.

    Args:
      path: of the file.
      images: on the canvas, uint8 [n, H, W, 3].
      metadata: `Model.encode`d, float32 [n, M].
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    given = {"image": images} | ({} if metadata is None else {"metadata": metadata})
    parts = [
        session.run(names, {name: x[start : start + _BATCH] for name, x in given.items()})
        for start in range(0, len(images), _BATCH)
    ]
    return {name: np.concatenate([part[at] for part in parts]) for at, name in enumerate(names)}
