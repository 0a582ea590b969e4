"""What XLA makes of the train and the predict step for TPUs and GPUs, none of which is needed.

python benchmarks/compile_ahead.py                        # all targets that are installed
python benchmarks/compile_ahead.py --target=v5e:2x2 --network=resnet50:224:120 --program=augment

TPU targets need the package libtpu of the version that `jax[tpu]` names; the H100 needs
jax-cuda12-plugin, jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12. Without a GPU XLA cannot try
algorithms, so that cuDNN's are left open and products are Triton's by rule. Nothing is run: times
are XLA's estimates (TPU alone) and sizes are what it plans.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any
from unittest import mock

from absl import app, flags, logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ham_jax import config as configuration  # noqa: E402
from ham_jax import console, files  # noqa: E402

TPU = ("v5e:2x2", "v5e:4x4", "v6e:2x2")
H100 = "h100x"  # and the number of GPUs
PROGRAMS = ("augment", "augment all", "train", "predict")
# Batches of a width that no layer has, so that a map is told from a kernel by it.
_WORKS = ("resnet50:224:72", "efficientnet_lite0:224:72")

_TARGET = flags.DEFINE_multi_string(
    "target",
    None,
    f"Of {', '.join(TPU)}, {H100}N with N GPUs; default: those and {H100}1, {H100}8.",
)
flags.register_validator(
    "target",
    lambda targets: all(re.fullmatch(rf"v\w+:\d+x\d+|{H100}[1-9]\d*", t) for t in targets or ()),
    f"must be a TPU topology such as v5e:2x2, or {H100}8.",
)
_WORK = flags.DEFINE_multi_string(
    "network", _WORKS, "model:pixels:images a device; may be repeated."
)
flags.register_validator(
    "network",
    lambda works: all(re.fullmatch(r"\w+:\d+:\d+", work) for work in works),
    "must be model:pixels:images, such as resnet50:224:72.",
)
_PROGRAM = flags.DEFINE_multi_enum("program", PROGRAMS, PROGRAMS, "What is compiled.")
_SET = flags.DEFINE_multi_string("set", [], "key=value of the configuration.")
_FORM = flags.DEFINE_enum(
    "form", None, ["gathers", "products"], "Of the crop; default: what suits the target."
)
_JSON = flags.DEFINE_string("write", "runs/benchmark/compile_ahead.json", "The file to write.")
_DUMP = flags.DEFINE_string("dump", None, "A folder for the compiled programs' text.")

_DEVICE = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# ---------------------------------------------------------------------------------------------
# The text of a compiled program


class Array(tuple):
    """(dtype, dimensions, whether it lies in HBM) of an array in a program's text."""

    dtype = property(lambda self: self[0])
    dims = property(lambda self: self[1])
    in_hbm = property(lambda self: self[2])

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Without padding."""
        bits = re.search(r"\d+", self.dtype)
        width = int(bits[0]) if bits else 8 if self.dtype == "pred" else 0
        return math.ceil(self.size * width / 8)


@dataclasses.dataclass(frozen=True)
class Op:
    """An instruction.

    Attributes:
      name: in the program.
      opcode: such as fusion.
      results: its arrays; several where it is a tuple.
      operands: names.
      text: what follows the operands.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str

    def calls(self) -> tuple[str, ...]:
        """Returns the names of the computations that it runs, without those that reduce pairs."""
        called = re.findall(r"(?:calls|body|condition|computation)=%?([\w.\-]+)", self.text)
        called += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.text)
        for names in re.findall(r"(?:branch|called)_computations=\{([^}]*)\}", self.text):
            called += [name.strip(" %") for name in names.split(",")]
        return tuple(called)


Program = dict[str, list[Op]]
"""The instructions of each computation; the entry's name is ''."""

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
# Neither computed nor moved.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "optimization-barrier"}


def parse(text: str) -> Program:
    """Returns the program that `compiled.as_text()` describes."""
    program: Program = {}
    ops: list[Op] = []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            ops = program.setdefault("" if header[1] else header[2], [])
        elif named := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line):
            ops.append(_op(named[1], named[2]))
    return program


def _op(name: str, text: str) -> Op:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode = rest[: rest.index("(")]
    close = _closing(rest, len(opcode))
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[len(opcode) : close]))
    return Op(name, opcode, _arrays(shape), operands, rest[close:])


def _closing(text: str, start: int) -> int:
    """Returns where the pair of brackets that opens at `start` has ended."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    raise ValueError(f"unbalanced brackets: {text[start : start + 80]!r}")


def _arrays(shape: str) -> tuple[Array, ...]:
    return tuple(
        Array((dtype, tuple(map(int, filter(None, dims.split(",")))), "S(" not in (layout or "")))
        for dtype, dims, layout in _ARRAY.findall(shape)
    )


def launched(program: Program, computation: str = "") -> Iterator[tuple[Op, int]]:
    """Yields what is run, one after the other, and how often: loops are gone into, fusions not."""
    for op in program[computation]:
        if op.opcode in ("while", "call", "conditional"):
            times = re.search(r'known_trip_count":\{"n":"(\d+)"', op.text)
            for called in op.calls():
                for inner, count in launched(program, called):
                    yield inner, count * int(times[1] if times else 1)
        elif op.opcode not in _FREE:
            yield op, 1


def inside(program: Program, op: Op) -> Iterator[Op]:
    """Yields an instruction and all that it is a fusion of."""
    yield op
    for called in op.calls():
        for inner in program[called]:
            yield from inside(program, inner)


def facts(text: str, batch_size: int, image_size: int) -> dict[str, Any]:
    """Returns what a compiled program does, counted in its text.

    `passes` are instructions that read or write an array as large as all images; `copies` do
    nothing but copy or transpose a map: an array of three dimensions and more with the batch's
    width among them. `hbm_bytes` counts what each instruction reads and writes in the main memory
    as a whole, also where it needs only a part.

    Args:
      text: of one device.
      batch_size: of one device.
      image_size: numbers of an image of the network.
    """
    program = parse(text)
    arrays = {op.name: op.results for ops in program.values() for op in ops}
    count: collections.Counter[str] = collections.Counter()
    targets: collections.Counter[str] = collections.Counter()
    for op, times in launched(program):
        if op.opcode.endswith("-done"):
            continue
        read = [array for name in op.operands for array in arrays.get(name, ())]
        within = list(inside(program, op))
        for name, number in _counts(op, read, within, batch_size, image_size).items():
            count[name] += times * number
        for name in filter(None, map(_target, within)):
            targets[name] += times
    aliased = re.search(r"input_output_alias=\{(.*?\)) \}", text)
    return {
        **{name: count[name] for name in _COUNTED},
        "loops": sum(op.opcode == "while" for ops in program.values() for op in ops),
        "targets": dict(targets.most_common()),
        "donated": len(re.findall(r"\{[\d, ]*\}: \(", aliased[1])) if aliased else 0,
    }


_BETWEEN_DEVICES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_COUNTED = (
    *(name for kind in _BETWEEN_DEVICES for name in (kind, f"{kind} bytes")),
    *("hbm_bytes", "passes", "gathers", "copies"),
)


def _counts(
    op: Op, read: Sequence[Array], within: Sequence[Op], batch_size: int, image_size: int
) -> dict[str, int]:
    """Returns what one launched instruction adds to `facts`.

    Args:
      op: the instruction.
      read: its operands.
      within: from `inside`.
      batch_size: see `facts`.
      image_size: likewise.
    """
    made = list(op.results)
    if op.opcode.endswith("-start") and op.opcode != "all-reduce-start":
        for array in filter(made.__contains__, read):  # a tuple of operands and results
            made.remove(array)
    moved = [*made, *read]
    kinds = {inner.opcode.removesuffix("-start") for inner in within} - {"fusion"}
    gathers = [inner.results[0].size for inner in within if inner.opcode == "gather"]
    maps = [a for a in op.results if len(a.dims) >= 3 and batch_size in a.dims]
    only_moves = kinds & {"copy", "transpose"} and kinds <= {*_FREE, "copy", "transpose", "convert"}
    counts = {
        "hbm_bytes": sum(array.num_bytes for array in moved if array.in_hbm),
        "passes": any(array.size >= batch_size * image_size for array in moved),
        "gathers": sum(size >= batch_size * image_size // 3 for size in gathers),
        # The first act of a copy between the memories is no change of layout.
        "copies": bool(only_moves and maps and op.opcode != "copy-start"),
    }
    for kind in kinds & set(_BETWEEN_DEVICES):
        counts |= {kind: 1, f"{kind} bytes": sum(array.num_bytes for array in made)}
    return counts


def _target(op: Op) -> str | None:
    """Returns what runs a convolution or foreign call, and the order of a convolution's axes."""
    called = re.search(r'custom_call_target="([^"]*)"', op.text)
    labels = re.search(r"dim_labels=(\w+_\w+->\w+)", op.text)
    if labels and re.search(r"\d", labels[1]):  # TPUs have products as convolutions without places
        return f"{called[1] if called else op.opcode} {labels[1]}"
    return called and called[1]


# ---------------------------------------------------------------------------------------------
# Compiling

# Keeps the compilers from looking for devices; set before JAX is imported.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
}


def devices_of(target: str) -> Sequence[Any]:
    """Returns the devices of a target, which compile but do not run.

    Raises:
      ImportError: its compiler is not installed; the text says what is missing.
    """
    from jax.experimental import topologies

    if not target.startswith(H100):
        if not util.find_spec("libtpu"):
            raise ImportError(f"{target}: the package libtpu is not installed")
        return topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    if not util.find_spec("jax_plugins.xla_cuda12"):
        raise ImportError(f"{target}: the packages jax-cuda12-plugin and -pjrt are not installed")
    shape = f"1x1x{target.removeprefix(H100)}"
    return topologies.get_topology_desc(
        platform="cuda", target_config=_DEVICE, topology=shape
    ).devices


def lowered(program: str, config, mesh) -> tuple[Any, int]:
    """Returns (a program, lowered for the devices of a mesh; the number of leaves of its state).

    Args:
      program: of PROGRAMS.
      config: the whole configuration; `train.batch_size` is over all devices.
      mesh: the devices.
    """
    import jax
    import numpy as np

    from ham_jax import classes, parallel
    from ham_jax.model import Model
    from ham_jax.training import augment, losses, optim
    from ham_jax.training import step as training_step

    def placed(tree, sharding):
        place = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
        return jax.tree.map(lambda x: place(x.shape, x.dtype), tree)

    size = config.train.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((size, *config.data.canvas, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((size,), np.int32),
    }
    batch = placed(batch, parallel.batch_sharding(mesh))
    replicated = parallel.replicated(mesh)
    # What is decided while tracing is decided for the target.
    platform = mesh.devices.flat[0].platform
    backend = {"cuda": "gpu"}.get(platform, platform)
    with mock.patch.object(jax, "default_backend", return_value=backend):
        if program.startswith("augment"):
            section = config.augment.copy_and_resolve_references()
            if program == "augment all":
                section.update(rotation=20.0, cutout=0.2, mixup=0.4, shades_of_gray=6.0)

            def view(seed, image, label):
                return augment.augment(jax.random.key(seed), image, label, section, 7)[:2]

            seed = placed(jax.ShapeDtypeStruct((), np.int32), replicated)
            rows = parallel.batch_sharding(mesh)
            return jax.jit(view, out_shardings=rows).lower(seed, batch["image"], batch["label"]), 0
        model = Model.of(Path(), config, classes.of_config(config.data), mesh)
        network = model.forward.network
        params, batch_stats = jax.eval_shape(lambda: network.init(0))
        if program == "predict":
            variables = placed({"params": params, "batch_stats": batch_stats}, replicated)
            return jax.jit(model.forward.probabilities).lower(variables, batch["image"]), 0
        optimizer = optim.make(config.optim, optim.schedule(config.optim, 0, 10**6), params)
        loss = losses.make_loss(config.loss, np.ones(7), config.data.classes)
        here = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("data",))
        initial = training_step.init_state
        state = jax.eval_shape(lambda: initial(network, optimizer, config, here))
        take = training_step.make_train_step(network, optimizer, loss, config, mesh)
        return take.lower(placed(state, replicated), batch), len(jax.tree.leaves(state))


def compiled(target: str, program: str, config) -> dict[str, Any]:
    """Compiles a program for a target; returns what is known of it.

    Args:
      target: see --target.
      program: of PROGRAMS.
      config: the whole configuration; `train.batch_size` is of one device.
    """
    import jax
    import numpy as np

    from ham_jax.data import preprocess

    devices = devices_of(target)
    per_device = config.train.batch_size
    config = config.copy_and_resolve_references()
    config.train.batch_size = per_device * len(devices)
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    start = time.perf_counter()
    form = preprocess.in_form(_FORM.value) if _FORM.value else contextlib.nullcontext()
    with form:
        given, num_leaves = lowered(program, config, mesh)
    done = given.compile()
    seconds = time.perf_counter() - start
    text = done.as_text()
    if _DUMP.value:
        name = re.sub(r"\W+", "-", f"{target} {config.model.name} {program}")
        files.write_text(Path(_DUMP.value) / f"{name}.txt", text)
    plan = done.memory_analysis()
    parts = ("argument", "output", "temp", "alias")
    planned = {part: getattr(plan, f"{part}_size_in_bytes") for part in parts}
    costs = done.cost_analysis() or {}
    seconds_on_tpu = costs.get("optimal_seconds", -1)  # below 0: of some instruction it has none
    px = config.augment.crop_px
    return {
        "devices": len(devices),
        "images_per_device": per_device,
        "peak_hbm_bytes": sum(planned.values()) - 2 * planned["alias"],
        "planned_bytes": planned,
        # XLA counts for TPUs alone.
        "flop": costs.get("flops"),
        "xla_bytes": costs.get("bytes accessed"),
        "estimate_ms": 1e3 * seconds_on_tpu if seconds_on_tpu > 0 else None,
        "state_leaves": num_leaves,
        "compile_s": round(seconds, 1),
        **facts(text, per_device, 3 * px * px),
    }


_FACTS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "peak GB": lambda r: f"{r['peak_hbm_bytes'] / 1e9:.2f}",
    "TFLOP": lambda r: f"{r['flop'] / 1e12:.2f}" if r["flop"] else "",
    "HBM GB": lambda r: f"{r['hbm_bytes'] / 1e9:.2f}",
    "ms": lambda r: f"{r['estimate_ms']:.2f}" if r["estimate_ms"] else "",
    "all-reduces": lambda r: f"{r['all-reduce']}: {r['all-reduce bytes'] / 1e6:.1f} MB",
    **{
        name + "s": lambda r, name=name: str(r[name])
        for name in ("all-gather", "collective-permute")
    },
    **{
        name: lambda r, name=name: str(r[name]) for name in ("gathers", "loops", "copies", "passes")
    },
    "donated": lambda r: f"{r['donated']} of {r['state_leaves']}",
}


def _works(target: str) -> Iterator[tuple[str, str, Any]]:
    """Yields (what is compiled for whom, the program, its configuration)."""
    done = set()
    for work in _WORK.value:
        name, px, batch_size = work.split(":")
        config = configuration.base()
        config.model.name, config.augment.crop_px = name, int(px)
        config.train.batch_size, config.data.canvas = int(batch_size), (300, 400)
        changes = [(key, value) for key, _, value in (entry.partition("=") for entry in _SET.value)]
        if faults := configuration.override(config, changes):
            raise app.UsageError(" ".join(faults))
        for program in _PROGRAM.value:
            # Augmentation is the same for all networks.
            what = f"{px}:{batch_size}" if program.startswith("augment") else work
            if (what, program) not in done:
                done.add((what, program))
                yield f"{target} {what} {program}", program, config


def main(argv: list[str]) -> None:
    """Compiles what the flags say and shows and writes what came of it."""
    if argv[1:]:
        raise app.UsageError(f"Nothing is to follow the flags: {argv[1]}.")
    logging.set_verbosity(logging.WARNING)
    os.environ |= ENVIRONMENT
    results = {}
    for target in _TARGET.value or (*TPU, f"{H100}1", f"{H100}8"):
        try:
            devices_of(target)
        except ImportError as error:
            console.log_line(f"{error}: left out.")
            continue
        for name, program, config in _works(target):
            with console.progress(name):
                results[name] = compiled(target, program, config)
    for name, result in results.items():
        rows = [[what, show(result)] for what, show in _FACTS.items()]
        rows += [[f"{count} x", target] for target, count in result["targets"].items()]
        console.print_table(name, ["", ""], rows)
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib")}
    Path(_JSON.value).parent.mkdir(parents=True, exist_ok=True)
    files.write_json(_JSON.value, {"versions": versions, "programs": results})


if __name__ == "__main__":
    app.run(main)
