"""Speed, measured side by side in one run, as a table and as JSON.

python benchmarks/speed.py step      # a training step: ours, stock Flax, PyTorch where installed
python benchmarks/speed.py loop --data=data/ham10000   # feed, augmentation and step together
python benchmarks/speed.py conv      # each form of each convolution: is the rule still right?
python benchmarks/speed.py conv --table=FILE   # the fastest forms, for HAM_JAX_CONV_TABLE=FILE
python benchmarks/speed.py crop      # the random crop: its forms, and a turned one
python benchmarks/speed.py feed --data=data/ham10000   # batches without a model
python benchmarks/speed.py memory    # of a training step, as compiled
python benchmarks/speed.py startup   # seconds from the command to the first step or answer

Absolute times differ from hour to hour on a shared machine. So the contestants take turns, each
round compares them within seconds, and the ratio given is the median of the rounds' ratios.
"""

import contextlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

from absl import app, flags, logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ham_jax import config as configuration  # noqa: E402
from ham_jax import console, files  # noqa: E402

_WORK = flags.DEFINE_multi_string(
    "work",
    None,
    "step, loop, conv: model:pixels:batch, as resnet18:128:32, or model:pixels:batch:frozen, of"
    " which stem, stage 1 and stage 2 are not trained; may be repeated.",
)
flags.register_validator(
    "work",
    lambda works: all(re.fullmatch(r"\w+:\d+:\d+(:frozen)?", work) for work in works or ()),
    "must be model:pixels:batch, such as resnet18:128:32, or model:pixels:batch:frozen.",
)
_AGAINST = flags.DEFINE_list(
    "against",
    ["stock Flax", "PyTorch eager", "PyTorch compile"],
    "step: whom ours is compared with; stock Flax takes half a minute a step where maps are large.",
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each contestant has its turn.", 1)
_SECONDS = flags.DEFINE_float("seconds", 2.0, "How long a turn takes, about.", 0.01)
_TORCH = flags.DEFINE_string(
    "torch_python",
    sys.executable,
    "A Python that has torch, torchvision, efficientnet-lite-pytorch.",
)
_DATA = flags.DEFINE_string(
    "data", None, "loop, feed: photographs and metadata; default: the demonstration's lesions."
)
_ORIGINALS = flags.DEFINE_string(
    "originals", None, "feed, startup: a folder of photographs; default: --data, one drawn."
)
_STARTS = flags.DEFINE_string(
    "starts", "", "startup: a regular expression; only what it finds in a row's name is measured."
)
_TABLE = flags.DEFINE_string(
    "table", None, "conv: a file of the fastest forms to write, for $HAM_JAX_CONV_TABLE."
)
_JSON = flags.DEFINE_string("json", None, "The file to write; default: runs/benchmark/<what>.json.")
_CONTESTANT = flags.DEFINE_string("contestant", None, "Internal: run as a worker.")

_CALLS = [range(n, n + 1) for n in range(100_000)]  # more than a turn takes
_ON_CPU = (
    "resnet18:64:32",
    "efficientnet_lite0:128:32",
    "resnet18:128:32",
    "resnet50:224:8",
    "efficientnet_lite0:224:64:frozen",
    "efficientnet_lite2:224:64:frozen",
)
_ON_ACCELERATOR = ("resnet50:224:256", "efficientnet_lite0:224:256")
_CONFIGS = ("demo:", "resnet:18", "resnet:50", "efficientnet_lite:0")
_CROPS = (((300, 400), 224, 64), ((300, 400), 224, 256))  # canvas, pixels, batch
_EARLY = ("/stem/", "/stage1/", "/stage2/")  # what `frozen` freezes
_PEERS = ROOT / "benchmarks" / "peers"


class Contestant:
    """A process of its own that does work when it is told to, and waits meanwhile.

    Attributes:
      name: of the column.
      about: what it said of itself when it was warm.
    """

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._answer()

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *exception) -> None:
        self._process.communicate()  # closes its input, which ends it

    def work(self, amount: int) -> Any:
        """Has it do so much and returns its answer."""
        assert self._process.stdin
        self._process.stdin.write(f"{amount}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            raise RuntimeError(f"{self.name} ended with {self._process.returncode}; see above.")
        return json.loads(line)


def rounds(turns: Mapping[str, Callable[[], float]], progress) -> dict[str, list[float]]:
    """Lets each contestant have its turn in each round; returns the rates of each, by round."""
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(_ROUNDS.value):
        for name, turn in turns.items():
            rates[name].append(turn())
        progress(number + 1, _ROUNDS.value)
    return rates


def compared(rates: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Returns median, min and max of each contestant, and the first one's ratio to it."""
    first = next(iter(rates.values()))
    return {
        name: {
            "median": statistics.median(own),
            "min": min(own),
            "max": max(own),
            "ratio": statistics.median(a / b for a, b in zip(first, own, strict=True)),
        }
        for name, own in rates.items()
    }


def step() -> dict[str, Any]:
    """Images/s of whole training steps with data on the device, without augmentation."""
    results = {}
    for work in _WORK.value or (_ON_CPU if _platform() == "cpu" else _ON_ACCELERATOR):
        commands = {form: _own_command("step", work, form) for form in ("ours", "stock Flax")}
        if _has_torch():
            for form in ("eager", "compile"):
                commands[f"PyTorch {form}"] = [*_peer_command("torch_step", work), f"--form={form}"]
        commands = {name: c for name, c in commands.items() if name in ("ours", *_AGAINST.value)}
        # While a contestant waited, the system took back memory; its first step asks for it anew.
        results[work] = _contest(work, commands, "a training step", untimed=1)
    return results


def loop() -> dict[str, Any]:
    """Images/s of training on the same photographs: feed, augmentation and step together."""
    results = {}
    config = _with_data(configuration.base())
    for work in _WORK.value or (_ON_CPU[1:2] if _platform() == "cpu" else _ON_ACCELERATOR[:1]):
        commands = {"ours": _own_command("loop", work, "ours")}
        if _has_torch():
            peer = [*_peer_command("torch_loop", work), f"--images={config.data.dir}"]
            commands["PyTorch"] = [*peer, f"--workers={_num_cores()}"]
        untimed = 2 * _num_cores()  # what was loaded ahead while others had their turns
        results[work] = _contest(work, commands, "a training loop", untimed)
    return results


def _own_command(what: str, work: str, form: str) -> list[str]:
    command = [sys.executable, __file__, what, f"--work={work}"]
    return [*command, f"--contestant={form}", *([f"--data={_DATA.value}"] if _DATA.value else [])]


def _peer_command(script: str, work: str) -> list[str]:
    name, px, batch, *frozen = work.split(":")
    command = [_TORCH.value, str(_PEERS / f"{script}.py"), f"--model={name}"]
    return [*command, f"--px={px}", f"--batch={batch}", *(f"--{word}" for word in frozen)]


def _contest(
    work: str, commands: Mapping[str, Sequence[str]], of_what: str, untimed: int
) -> dict[str, Any]:
    """Lets workers that take training steps have their turns; returns and prints their rates."""
    with contextlib.ExitStack() as stack, console.progress(work) as progress:
        contestants = [
            stack.enter_context(Contestant(*item)) for item in commands.items()
        ]  # one after the other: each warms up alone
        if len({(c.about["parameters"], c.about["trained"]) for c in contestants}) > 1:
            raise RuntimeError(f"{work}: the networks differ in their number of parameters.")
        turns = {c.name: _turn(c, int(work.split(":")[2]), untimed) for c in contestants}
        results: dict[str, Any] = compared(rounds(turns, progress))
    for contestant in contestants:
        results[contestant.name] |= contestant.about
    _table(f"{work}: images/s of {of_what}", results)
    return results


def _turn(contestant: Contestant, batch_size: int, untimed: int) -> Callable[[], float]:
    num_steps = max(1, round(_SECONDS.value / contestant.work(1)))

    def turn() -> float:
        contestant.work(untimed)
        return num_steps * batch_size / contestant.work(num_steps)

    return turn


def _worker(what: str, form: str) -> None:
    """The own contestants of `step` and `loop`: obeys until its standard input ends."""
    import jax
    import numpy as np

    from ham_jax import parallel
    from ham_jax.data import feed as feeds
    from ham_jax.data import prepare
    from ham_jax.models import conv
    from ham_jax.training import optim

    parallel.compile_cache()
    mesh = parallel.mesh()
    assert _WORK.value, "a worker is told its work"
    config, batch_size = _config_of(_WORK.value[0])
    if what == "loop":
        config = _with_data(config)
        images = prepare.prepare(config).select("train")
        kind = feeds.choose("auto", len(images) * math.prod(images.records.canvas) * 3, mesh)
        order = feeds.shuffled(images.rows, batch_size, 0)
        batches = feeds.batches(kind, images, order, _CALLS, mesh)
    else:
        config.augment.strength, config.augment.dihedral = 0.0, False
        px = config.augment.crop_px
        image = np.random.default_rng(0).integers(0, 256, (batch_size, px, px, 3))
        label = np.arange(batch_size, dtype=np.int32) % 7
        batch = parallel.shard(mesh, {"image": image.astype(np.uint8), "label": label})
        batches = itertools.repeat(batch)
    stock = conv.stock() if form == "stock Flax" else contextlib.nullcontext()
    with stock:
        take, initial = _train_step(config, mesh)
        state = initial()
        compiled = take.lower(state, next(batches)).compile()
    state, scalars = compiled(state, next(batches))
    jax.block_until_ready(scalars)
    device = jax.devices()[0]
    cost = compiled.cost_analysis() or {}
    paths, sizes = optim.paths(state["params"]), [p.size for p in jax.tree.leaves(state["params"])]
    frozen = "|".join(config.optim.freeze) or "$^"
    about = {
        "parameters": sum(sizes),
        "trained": sum(n for p, n in zip(paths, sizes, strict=True) if not re.search(frozen, p)),
        "gigaflop_per_image": cost.get("flops", 0) / batch_size / 1e9,
        "device": f"{jax.device_count()} x {device.device_kind}",
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            state, scalars = compiled(state, next(batches))
        jax.block_until_ready(scalars)
        print(time.perf_counter() - start, flush=True)


def _train_step(config, mesh):
    """Returns (the compiled step to be, a function that makes its state)."""
    import jax
    import numpy as np

    from ham_jax import models
    from ham_jax.training import losses, optim
    from ham_jax.training import step as training_step

    network = models.build(config.model, 7)
    params = jax.eval_shape(lambda: network.init(0)[0])
    optimizer = optim.make(config.optim, optim.schedule(config.optim, 0, 10**6), params)
    loss = losses.make_loss(config.loss, np.ones(7), config.data.classes)
    take = training_step.make_train_step(network, optimizer, loss, config, mesh)
    return take, lambda: training_step.init_state(network, optimizer, config, mesh)


def memory() -> dict[str, Any]:
    """GB that a training step of each configuration takes, as the compiler plans it; none is taken.

    The state before and after it (the same memory on GPU and TPU, where it is donated), the batch,
    and what lies between forward and backward. Neither the resident photographs nor Python.
    """
    import jax
    import numpy as np

    from ham_jax import parallel

    mesh, results, rows = parallel.mesh(), {}, []
    for name in _CONFIGS:
        config = configuration.load(f"{ROOT}/configs/{name.replace(':', '.py:', 1)}")
        batch_size = config.train.batch_size
        take, initial = _train_step(config, mesh)
        image = jax.ShapeDtypeStruct((batch_size, *config.data.canvas, 3), np.uint8)
        label = jax.ShapeDtypeStruct((batch_size,), np.int32)
        with console.progress(name):
            step = take.lower(jax.eval_shape(initial), {"image": image, "label": label}).compile()
        plan = step.memory_analysis()
        parts = {
            "state and batch": plan.argument_size_in_bytes,
            "new state": plan.output_size_in_bytes - plan.alias_size_in_bytes,
            "between": plan.temp_size_in_bytes,
        }
        results[name] = {"batch_size": batch_size} | parts
        each = [f"{n / 1e9:.2f}" for n in (*parts.values(), sum(parts.values()))]
        rows.append([name, str(batch_size), str(config.augment.crop_px), *each])
    columns = ["config", "batch", "pixels", *parts, "GB in all"]
    console.print_table("GB of a training step, as compiled", columns, rows)
    return results


def _with_data(config):
    """Sets data.dir to --data or to the demonstration's synthetic lesions."""
    config.data.allow_partial = True
    if _DATA.value:
        config.data.dir = _DATA.value
    else:
        config.data.dir, config.data.synthetic_images = "data/demo", 800
    return config


def _config_of(work: str):
    """Returns the configuration of a --work, and the batch size."""
    name, px, batch, *frozen = work.split(":")
    config = configuration.base()
    config.model.name = name
    config.augment.crop_px = int(px)
    config.train.batch_size = int(batch)
    if frozen:
        config.optim.freeze = _EARLY
    configuration.validate(config)
    return config, int(batch)


def conv() -> dict[str, Any]:
    """Milliseconds of each form of each convolution of a network, and what the rule picks."""
    if _platform() != "cpu":
        raise app.UsageError("conv compares the forms on CPU; elsewhere there is only XLA's own.")
    results = {work: _conv_of(work) for work in _WORK.value or _ON_CPU}
    if _TABLE.value:
        _write_table(Path(_TABLE.value), [entry for each in results.values() for entry in each])
    return results


def _write_table(path: Path, measured: Sequence[Mapping[str, Any]]) -> None:
    """Writes the fastest forms as this processor family's table, beside those of other families.

    The rule's form stays where no other is 1.1 times as fast: the order of forms that lie closer
    together changes from run to run. Of a convolution that was measured twice the last one counts.
    """
    from ham_jax.models import conv as room
    from ham_jax.models import processor

    table = files.read_json(path, "Delete it.") if path.exists() else {}
    entries = {}
    for each in measured:
        geometry = room.Geometry(each["stride"], each["pads"], each["groups"])
        given = each["x"], each["kernel"], geometry
        forms = []
        for form, ms in zip(room.rule(*given), each["ms"].values(), strict=True):
            fastest = min(ms, key=ms.__getitem__)
            forms.append(fastest if ms[form] > 1.1 * ms[fastest] else form)
        entries[each["x"][1:], *given[1:]] = room.table_entry(*given, room.Forms(*forms))
    files.write_json(path, table | {processor.family(): list(entries.values())})
    print(f"Written: {path}; {room.TABLE}={path} makes training on this processor follow it.")


def _conv_of(work: str) -> list[dict[str, Any]]:
    """Times the convolutions of model:pixels:batch; returns and prints them."""
    from ham_jax.models import conv as room

    shapes, results, rows = _conv_shapes(work), [], []
    sums: dict[str, float] = dict.fromkeys(("chosen", "fastest", "direct"), 0.0)
    with console.progress(work) as progress:
        for number, ((x, kernel, geometry), count) in enumerate(shapes.items(), 1):
            times = _time_forms(x, kernel, geometry)
            chosen = room.choose(x, kernel, geometry)
            for part, form in zip(("forward", "input", "weight"), chosen, strict=True):
                if number == 1 and part == "input":
                    continue  # nobody asks for the gradient of the photograph
                ms = times[part]
                for name, of_form in (("chosen", form), ("direct", "direct")):
                    sums[name] += count * ms[of_form]
                sums["fastest"] += count * min(ms.values())
                others = ", ".join(f"{name} {t:.2f}" for name, t in ms.items() if name != form)
                late = "<-" if ms[form] > 1.1 * min(ms.values()) else ""
                shape = f"{count} x {_shape_text(x, kernel, geometry)}"
                rows.append([shape, part, f"{form} {ms[form]:.2f}", others, late])
            results.append({"x": x, "kernel": kernel, **geometry._asdict(), "count": count})
            results[-1] |= {"chosen": chosen, "ms": times}
            progress(number, len(shapes))
    console.print_table(
        f"{work}: ms of each form; <- marks a choice that is 1.1 times slower than another",
        ["convolution", "part", "chosen", "others", "late"],
        rows,
    )
    total = ", ".join(f"{name} {ms:.0f} ms" for name, ms in sums.items())
    print(f"All convolutions of a step: {total}.")
    return results


def _conv_shapes(work: str) -> dict[tuple, int]:
    """Returns how often a network has a convolution: {(shape of x, of kernel, geometry): count}."""
    import jax
    import jax.numpy as jnp

    from ham_jax import models
    from ham_jax.models import conv as room

    config, batch_size = _config_of(work)
    network = models.build(config.model, 7)
    shapes: dict[tuple, int] = {}
    choose = room.choose

    def record(*shape):
        shapes[shape] = shapes.get(shape, 0) + 1
        return choose(*shape)

    side = (config.augment.crop_px,) * 2
    image = jax.ShapeDtypeStruct((batch_size, *side, 3), jnp.float32)
    with mock.patch.object(room, "choose", record):
        params, stats = jax.eval_shape(lambda: network.init(0))
        jax.eval_shape(lambda p, s, x: network.apply(p, s, x, True), params, stats, image)
    return shapes


def _shape_text(x, kernel, geometry) -> str:
    kind = "depthwise" if geometry.groups > 1 else f"{kernel[2]}->{kernel[3]}"
    return f"{x[1]}x{x[2]}x{x[3]} {kernel[0]}x{kernel[1]}/{geometry.stride} {kind}"


def _time_forms(x, kernel, geometry) -> dict[str, dict[str, float]]:
    """Returns {part: {form: milliseconds}}, the median over turns in which the forms alternate."""
    import jax
    import jax.numpy as jnp

    from ham_jax.models import conv as room

    keys = jax.random.split(jax.random.key(0))
    x, kernel = (jax.random.normal(k, s) for k, s in zip(keys, (x, kernel), strict=True))
    dy = jnp.ones_like(room.direct(x, kernel, geometry))
    parts = {"forward": room.FORWARD, "input": room.INPUT, "weight": room.WEIGHT}
    times = {}
    fitting = room.fitting(x.shape, kernel.shape, geometry)
    for (part, forms), names in zip(parts.items(), fitting, strict=True):
        compiled, given = {}, (x, kernel) if part == "forward" else (x, kernel, dy)
        for name in names:

            def call(*arrays, form=forms[name]):
                x, kernel, *dy = arrays
                return form(x, kernel, geometry, *dy)

            compiled[name] = jax.jit(call).lower(*given).compile()
            jax.block_until_ready(compiled[name](*given))
        taken: dict[str, list[float]] = {name: [] for name in names}
        start = time.perf_counter()
        while len(taken[names[0]]) < 3 or time.perf_counter() - start < _SECONDS.value / 5:
            for name, function in compiled.items():
                began = time.perf_counter()
                jax.block_until_ready(function(*given))
                taken[name].append(1e3 * (time.perf_counter() - began))
        times[part] = {name: statistics.median(each) for name, each in taken.items()}
    return times


def crop() -> dict[str, Any]:
    """Images/s of training's random crop in each form of `preprocess.resample`, and turned.

    Beside them, how far the forms lie apart, in grey levels.
    """
    import jax

    results = {}
    for canvas, px, batch_size in _CROPS:
        name = f"{batch_size} images, {canvas[0]}x{canvas[1]} -> {px} px"
        given, forms = _crop_forms(canvas, px, batch_size)
        with console.progress(name) as progress:
            turns = {form: _crop_turn(view, given, batch_size) for form, view in forms.items()}
            results[name] = compared(rounds(turns, progress))
        for form, view in forms.items():
            plan = view.lower(*given).compile().memory_analysis()
            results[name][form]["temporary_bytes"] = plan.temp_size_in_bytes
        views = [forms[form](*given) for form in ("products", "gathers")]
        apart = float(abs(views[0] - views[1]).max()) * 255
        results[name]["products"]["grey_levels_apart"] = apart
        _table(f"{name}: images/s of the crop alone", results[name])
        print(f"The forms lie {apart:.1e} grey levels apart at the most.")
    return {
        "rates": results,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib")},
    }


def _crop_forms(canvas: tuple[int, int], px: int, batch_size: int) -> tuple[tuple, dict[str, Any]]:
    """Returns (a random batch, {form: its compiled view})."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ham_jax.data import preprocess
    from ham_jax.training import augment, turn

    image = np.random.default_rng(0).integers(0, 256, (batch_size, *canvas, 3), np.uint8)
    keys = jax.random.split(jax.random.key(0), 3)
    section = configuration.base().augment
    boxes = augment.draw_boxes(keys[0], batch_size, *canvas, section.crop_scale, section.crop_ratio)
    k = jax.random.randint(keys[1], (batch_size,), 0, 8)
    angle = augment.draw_angles(keys[2], batch_size, math.pi / 4)
    most = turn.Most(math.pi / 4, canvas[1] / canvas[0])

    def in_form(form):
        def upright(image, boxes, k, angle):
            with preprocess.in_form(form):
                return preprocess.resample_dihedral(image, boxes, k, px)

        def turned(image, boxes, k, angle):
            with preprocess.in_form(form):
                return turn.resample_turned(image, boxes, angle, k, px, most)

        return {form: jax.jit(upright), f"{form}, turned": jax.jit(turned)}

    return (jnp.asarray(image), boxes, k, angle), in_form("products") | in_form("gathers")


def _crop_turn(view, given: tuple, batch_size: int) -> Callable[[], float]:
    # An accelerator is told of several, so that it is the one that is busy.
    num_calls = 1 if _platform() == "cpu" else 16

    def call() -> None:
        for _ in range(num_calls):
            done = view(*given)
        done.block_until_ready()

    return _feed_turn(call, num_calls * batch_size)


def feed() -> dict[str, Any]:
    """Images/s of batches on the device with random crop and flips: ours, tf.data, PyTorch."""
    import jax

    from ham_jax import parallel
    from ham_jax.data import feed as feeds
    from ham_jax.data import prepare
    from ham_jax.training import augment

    parallel.compile_cache()
    mesh = parallel.mesh()
    config = _with_data(configuration.base())
    config.augment.color = 0.0
    batch_size, px = config.train.batch_size, config.augment.crop_px
    images = prepare.prepare(config).select("train")
    order = feeds.shuffled(images.rows, batch_size, 0)

    @jax.jit
    def view(batch):
        key = jax.random.key(0)
        return augment.augment(key, batch["image"], batch["label"], config.augment, 7)[0]

    def ours(kind: str) -> Callable[[], float]:
        batches = feeds.batches(kind, images, order, _CALLS, mesh)
        return _feed_turn(lambda: view(next(batches)).block_until_ready(), batch_size)

    turns = {kind: ours(kind) for kind in ("resident", "stream", "threads")}
    originals = Path(_ORIGINALS.value or config.data.dir)
    common = [f"--images={originals}", f"--px={px}", f"--batch={batch_size}"]
    peers = {"tf.data decode": [sys.executable, str(_PEERS / "tf_feed.py"), *common]}
    if _has_torch():
        command = [_TORCH.value, str(_PEERS / "torch_feed.py"), *common]
        peers["PyTorch DataLoader"] = [*command, f"--workers={_num_cores()}"]
    with contextlib.ExitStack() as stack, console.progress("feed") as progress:
        contestants = [stack.enter_context(Contestant(*item)) for item in peers.items()]
        turns |= {contestant.name: _peer_turn(contestant) for contestant in contestants}
        results = compared(rounds(turns, progress))
    for contestant in contestants:
        results[contestant.name] |= contestant.about
    _table(f"images/s of {px} px batches without a model", results)
    return {"rates": results, "train_images": len(images), "canvas": images.records.canvas}


def _peer_turn(contestant: Contestant) -> Callable[[], float]:
    def turn() -> float:
        count, seconds = contestant.work(round(150 * _SECONDS.value))
        return count / seconds

    return turn


def _feed_turn(step: Callable[[], Any], batch_size: int) -> Callable[[], float]:
    step()

    def turn() -> float:
        start, done = time.perf_counter(), 0
        while (taken := time.perf_counter() - start) < _SECONDS.value:
            step()
            done += batch_size
        return done / taken

    return turn


def startup() -> dict[str, Any]:
    """Seconds from a command to its first sign of life, or to its end where it answers."""
    results: dict[str, list[float]] = {}
    environment = os.environ | {"HAM_JAX_VENV": sys.prefix, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder, console.progress("startup") as progress:
        photograph = _photograph(folder)
        for number in range(_ROUNDS.value):
            environment["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/cache{number}"
            starts = _starts(folder, photograph)
            for name, (command, sign) in starts.items():
                if "warm" in name and name.replace("warm", "cold") not in starts:
                    _seconds_until(sign, command, environment)  # which fills the cache
                shutil.rmtree(f"{folder}/run", ignore_errors=True)
                taken = _seconds_until(sign, command, environment)
                results.setdefault(name, []).append(taken)
            progress(number + 1, _ROUNDS.value)
    rows = [
        [name, *(f"{f(each):.2f}" for f in (statistics.median, min, max))]
        for name, each in results.items()
    ]
    console.print_table("seconds", ["until", "median", "min", "max"], rows)
    return results


def _starts(folder: str, photograph: str) -> dict[str, tuple[list[str], str | None]]:
    """Returns the commands of `startup` with what they print when they live; None: they end."""
    python = [sys.executable, "-m", "ham_jax.main", f"--workdir={folder}/run"]
    run = [*python, "--config=configs/demo.py", "--config.log.every_steps=1"]
    run += ["--config.train.duration={'steps': 1}", "--config.optim.warmup={'steps': 0}"]
    wrong = [*python, "--config=configs/demo.py", "--config.train.batchsize=8"]
    shell = [str(ROOT / "launch.sh"), "--mode=predict", f"--images={photograph}"]
    answer = ([*shell, f"--output={folder}/answers.csv"], None)
    # As a person does who imports it, loads the model that comes along, and asks.
    code = f"import ham_jax; print(ham_jax.load().predict({photograph!r})[0].prediction)"
    in_python = ([sys.executable, "-c", code], None)
    starts = {
        "--help": ([*python, "--help"], ""),
        "an error in the configuration": (wrong, "batchsize"),
        "first answer in Python, cold compile cache": in_python,
        "first answer in Python, warm compile cache": in_python,
        "one photograph in the shell, warm compile cache": answer,
        "first step, cold compile cache": (run, "step 1/1"),
        "first step, warm compile cache": (run, "step 1/1"),
    }
    return {name: starts[name] for name in starts if re.search(_STARTS.value, name)}


def _photograph(folder: str) -> str:
    """Returns the first of --originals, or else draws one."""
    if _ORIGINALS.value:
        return str(next(path for path in sorted(Path(_ORIGINALS.value).rglob("*.jpg"))))
    from ham_jax.data import image, synthetic

    image.save_jpeg(synthetic.draw("nv", [0], [0]), f"{folder}/lesion.jpg", quality=90)
    return f"{folder}/lesion.jpg"


def _seconds_until(
    sign: str | None, command: Sequence[str], environment: Mapping[str, str]
) -> float:
    """Returns how long a command takes until it prints a text, or ends."""
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout
        if sign is not None:
            next(line for line in iter(process.stdout.readline, "") if sign in line)
            taken = time.perf_counter() - start
        said = process.stdout.read()
    if sign is None:
        taken = time.perf_counter() - start
        if process.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed: {said}")
    return taken


def _has_torch() -> bool:
    try:
        command = [_TORCH.value, "-c", "import torch, torchvision"]
        found = subprocess.run(command, capture_output=True)
    except OSError as error:
        raise app.UsageError(f"--torch_python={_TORCH.value}: {error.strerror}.") from error
    if found.returncode:
        console.log_line(f"{shlex.quote(_TORCH.value)} has no torch and torchvision: left out.")
    return not found.returncode


def _num_cores() -> int:
    return os.cpu_count() or 1


def _platform() -> str:
    import jax

    return jax.default_backend()


def _table(title: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    first = next(iter(results))
    rows = [
        [name, *(f"{r[k]:.1f}" for k in ("median", "min", "max")), f"{r['ratio']:.2f}"]
        for name, r in results.items()
    ]
    console.print_table(title, ["", "median", "min", "max", f"{first} is x times"], rows)


def main(argv: list[str]) -> None:
    """Runs the benchmark that the first argument names."""
    logging.set_verbosity(logging.WARNING)
    if _CONTESTANT.value:
        _worker(argv[1], _CONTESTANT.value)
        return
    what = {f.__name__: f for f in (step, loop, conv, crop, feed, memory, startup)}
    if len(argv) != 2 or argv[1] not in what:
        raise app.UsageError(f"Say one of {', '.join(what)}.")
    from ham_jax.models import processor

    results = what[argv[1]]()
    output = Path(_JSON.value or f"runs/benchmark/{argv[1]}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "command": shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "rounds": _ROUNDS.value,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "processor": processor.describe(),
        "python": platform.python_version(),
    }
    files.write_json(output, {**about, "results": results})
    print(f"Written: {output}")


if __name__ == "__main__":
    app.run(main)
