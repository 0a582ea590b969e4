"""The house keeps its shape: who may import whom, and one outside library, one room."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / "ham_jax"

# A room may import itself and what its line names, never a room above it.
_FLOOR = {
    "classes",
    "config",
    "console",
    "escape",
    "files",
    "hub",
    "local_path",
    "parallel",
    "reading",
}
_MODEL = _FLOOR | {"checkpoints", "programs", "data", "inference", "models"}
BELOW = {
    "main": _MODEL | {"commands", "evaluation", "export", "model", "training"},
    "commands": _MODEL | {"model"},
    "export": _MODEL | {"model"},
    "training": _MODEL | {"evaluation", "model"},
    "evaluation": _MODEL | {"model"},
    "model": _MODEL,
    "inference": {"classes", "config", "files", "reading"},
    "data": _FLOOR,
    "models": {"config", "hub", "reading"},
    "checkpoints": {"config", "files", "hub", "local_path", "parallel"},
    "hub": {"config", "files", "reading"},
    "parallel": {"config", "console"},
    "programs": {"files"},
    "console": {"escape"},
    "files": {"config", "reading"},
    "config": {"classes"},
    "classes": set(),
    "escape": set(),
    "local_path": set(),
    "reading": set(),
}

ONLY_IN = {
    "tensorflow": ["data/feed.py"],
    "tensorflow_datasets": ["data/builder.py"],
    "orbax": ["checkpoints.py"],
    "etils": ["local_path.py"],
    "optax": ["training/optim.py", "training/step.py"],
    "flax": ["models/", "training/step.py"],
    "huggingface_hub": ["hub.py"],
    "safetensors": ["hub.py", "models/pretrained.py"],
    "PIL": ["data/image.py", "data/profiles.py"],
    "pillow_heif": ["data/image.py"],
    "pydicom": ["data/dicom.py"],
    "matplotlib": ["evaluation/explain.py", "evaluation/figures.py", "evaluation/report.py"],
    "jinja2": ["commands/serve.py", "evaluation/report.py", "export/"],
    "starlette": ["commands/serve.py"],
    "uvicorn": ["commands/serve.py"],
    "markdown_it": ["commands/service.py"],
    "rich": ["console.py"],
    "onnx": ["export/graph.py"],
    "onnxruntime": ["export/onnx.py"],
    "tensorboardX": ["training/telemetry.py"],
}


def imports():
    """Yields (file relative to ham_jax, module imported with its first two names)."""
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module
                inside = base == "ham_jax"
                modules = [f"{base}.{a.name}" for a in node.names] if inside else [base]
            else:
                continue
            for module in modules:
                yield file.relative_to(ROOT).as_posix(), module


def test_arrows_point_down():
    up = []
    for file, module in imports():
        room = file.split("/")[0].removesuffix(".py")
        parts = module.split(".")
        if room == "__init__" or parts[0] != "ham_jax" or len(parts) == 1:
            continue
        if parts[1] in ("DISCLAIMER", "__version__"):
            continue
        if parts[1] != room and parts[1] not in BELOW[room]:
            up.append(f"{file} imports {module}")
    assert up == []


def test_what_applies_to_probabilities_needs_numpy_alone():
    outside = {
        module.split(".")[0] for file, module in imports() if file.startswith("inference/")
    } - {"ham_jax", *sys.stdlib_module_names}
    assert outside == {"numpy"}


def test_one_library_one_room():
    strays = [
        f"{file} imports {module}"
        for file, module in imports()
        for library, rooms in ONLY_IN.items()
        if module.split(".")[0] == library and not file.startswith(tuple(rooms))
    ]
    assert strays == []
