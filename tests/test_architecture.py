"""The house keeps its shape: who may import whom, and one outside library, one room."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "ham_jax"

# A room may import itself and the rooms below it, never one above.
BELOW = {
    "main": {
        "classes",
        "config",
        "parallel",
        "console",
        "files",
        "escape",
        "reading",
        "data",
        "evaluation",
        "training",
        "inference",
    },
    "inference": {
        "classes",
        "config",
        "parallel",
        "console",
        "files",
        "escape",
        "reading",
        "data",
        "models",
        "evaluation",
        "checkpoints",
    },
    "training": {
        "classes",
        "config",
        "parallel",
        "console",
        "files",
        "reading",
        "data",
        "models",
        "evaluation",
        "checkpoints",
    },
    "evaluation": {
        "classes",
        "config",
        "parallel",
        "console",
        "files",
        "escape",
        "reading",
        "data",
        "models",
        "checkpoints",
    },
    "data": {
        "classes",
        "config",
        "files",
        "reading",
        "escape",
        "parallel",
        "console",
        "local_path",
    },
    "checkpoints": {"classes", "config", "files", "parallel", "local_path"},
    "models": {"classes", "config", "reading"},
    "parallel": {"classes", "config", "console"},
    "console": {"escape"},
    "escape": set(),
    "files": {"classes", "config", "reading"},
    "local_path": set(),
    "reading": set(),
    "classes": set(),
    "config": {"classes"},
}

ONLY_IN = {
    "tensorflow": ["data/feed.py"],
    "tensorflow_datasets": ["data/ham10000.py"],
    "orbax": ["checkpoints.py"],
    "etils": ["local_path.py"],
    "optax": ["training/optim.py", "training/step.py"],
    "flax": ["models/", "training/step.py"],
    "huggingface_hub": ["models/pretrained.py"],
    "safetensors": ["models/pretrained.py"],
    "PIL": ["data/image.py", "data/profiles.py"],
    "pillow_heif": ["data/image.py"],
    "pydicom": ["data/dicom.py"],
    "matplotlib": ["evaluation/explain.py", "evaluation/figures.py", "evaluation/report.py"],
    "jinja2": ["evaluation/report.py"],
    "rich": ["console.py"],
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
        if room == "__init__" or parts[0] != "ham_jax" or len(parts) == 1 or parts[1].isupper():
            continue
        if parts[1] != room and parts[1] not in BELOW[room]:
            up.append(f"{file} imports {module}")
    assert up == []


def test_one_library_one_room():
    strays = [
        f"{file} imports {module}"
        for file, module in imports()
        for library, rooms in ONLY_IN.items()
        if module.split(".")[0] == library and not file.startswith(tuple(rooms))
    ]
    assert strays == []
