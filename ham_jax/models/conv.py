"""Convolution and pooling that are fast on every backend.

On GPU and TPU they are XLA's own. XLA's CPU backend has cliffs, where the same sum written as a
matrix product or as shifted slices is many times faster. There a convolution, its input gradient
and its weight gradient each take the form that `choose` picks by the static shape.
`python benchmarks/speed.py conv` times every form, shows where the choice is not the fastest, and
with `--table` writes the fastest ones to a file, which `choose` follows where $HAM_JAX_CONV_TABLE
names it. The same processor, table and shape always get the same form.
Every form computes the same sums.

Images are [B, H, W, C], kernels [kh, kw, C_in / groups, C_out].
"""

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from ham_jax import reading
from ham_jax.config import InputError
from ham_jax.models import processor

TABLE = "HAM_JAX_CONV_TABLE"
"""The environment variable that names a table of forms measured on the processor at hand."""

Pads = tuple[tuple[int, int], tuple[int, int]]

_stock = False


class Geometry(NamedTuple):
    """How a kernel moves over a map.

    Attributes:
      stride: in both directions.
      pads: zeros (above, below), (left, right).
      groups: of channels, each convolved by itself.
    """

    stride: int
    pads: Pads
    groups: int = 1


class Forms(NamedTuple):
    """The forms of a convolution and its gradients: keys of FORWARD, INPUT and WEIGHT."""

    forward: str
    input: str
    weight: str


def choose(x: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry) -> Forms:
    """Returns the forms on CPU for shapes x [B, H, W, C_in] and kernel.

    Those that $HAM_JAX_CONV_TABLE has for this map, kernel and geometry, whatever the batch, else
    those of `rule`.

    Raises:
      InputError: the table cannot be used.
    """
    table = _table(os.environ.get(TABLE, ""), processor.family())
    return table.get((x[1:], kernel, geometry)) or rule(x, kernel, geometry)


def rule(x: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry) -> Forms:
    """Returns the forms that were the fastest on an AMD EPYC, two cores, AVX2.

    Every processor gets them: none with AVX-512, and none that is not x86, was measured.
    """
    stride, pads, groups = geometry
    kh, kw, _, num_out = kernel
    depthwise = groups == x[-1] == num_out
    if groups > 1 and not depthwise:
        return Forms("direct", "direct", "direct")
    if depthwise:
        # 49 sums in one loop compile for 1.3 to 2.0 s of CPU time, 7 at a time for 0.4 to 0.6 s.
        return Forms("shifted", "shifted", "scanned" if kh * kw <= 25 else "scanned_rows")
    if kh == kw == 1 and pads == ((0, 0), (0, 0)):
        return Forms("product", "product", "product")
    pixels = math.prod(_output_size(x, kernel, geometry))
    num_products = x[0] * pixels * x[-1] * num_out  # for each of the kernel's taps
    narrow = min(x[-1], num_out)
    if kh == kw == 3 and stride == 1 and pixels >= 16 and narrow >= 64 and num_products >= 2**26:
        # It takes seconds to compile, which less work does not pay back. Of 64 channels the forward
        # products are so short that their time is that of reading and writing tiles.
        form = "winograd" if narrow >= 128 else "direct"
        return Forms(form, form, "winograd")
    if pixels <= 49:
        return Forms("inside", "inside", "inside")
    return Forms(
        "direct",
        "phases" if stride > 1 and x[-1] >= 16 else "direct",
        "direct" if x[-1] <= 128 and pixels >= 196 else "rows" if stride == 1 else "inside",
    )


def table_entry(x: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry, forms: Forms):
    """Returns forms as an entry of a table: JSON, {processor family: [entry, ...]}."""
    return {"x": x[1:], "kernel": kernel, **geometry._asdict(), **forms._asdict()}


def faults() -> list[str]:
    """Returns a sentence for each reason why $HAM_JAX_CONV_TABLE cannot be used."""
    try:
        _table(os.environ.get(TABLE, ""), processor.family())
    except InputError as error:
        return error.faults
    return []


@functools.cache
def _table(path: str, family: str) -> dict[tuple, Forms]:
    """Returns {(map, kernel, geometry): forms} of a processor family; {} without a path."""
    if not path:
        return {}
    remedy = f"Write it with `python benchmarks/speed.py conv --table={path}`, or unset {TABLE}."
    try:
        entries = reading.read_json(path).get(family)
    except (OSError, ValueError) as error:
        raise InputError(f"{TABLE}={path} cannot be read: {error}. {remedy}") from error
    if entries is None:
        raise InputError(f"{TABLE}={path} has no entry for {family}, this processor. {remedy}")
    table = {}
    try:
        for entry in entries:
            map_shape, kernel = tuple(entry["x"]), tuple(entry["kernel"])
            above, beside = entry["pads"]
            pads = (tuple(above), tuple(beside))
            geometry = Geometry(entry["stride"], pads, entry["groups"])
            forms = Forms(entry["forward"], entry["input"], entry["weight"])
            allowed = fitting((1, *map_shape), kernel, geometry)
            if any(form not in names for form, names in zip(forms, allowed, strict=True)):
                raise ValueError(f"{forms} do not all fit {map_shape}, {kernel}, {geometry}")
            table[map_shape, kernel, geometry] = forms
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{TABLE}={path} is no table of forms: {error!r}. {remedy}") from error
    return table


def conv(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads, groups: int = 1) -> jax.Array:
    """Convolves, in the form that suits the backend.

    Args:
      x: [B, H, W, C_in].
      kernel: [kh, kw, C_in / groups, C_out].
      stride: in both directions.
      pads: zeros (above, below), (left, right).
      groups: of channels, each convolved by itself.
    """
    geometry = Geometry(stride, pads, groups)
    if not _on_cpu():
        return direct(x, kernel, geometry)
    return in_forms(x, kernel, geometry, choose(x.shape, kernel.shape, geometry))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def in_forms(x: jax.Array, kernel: jax.Array, geometry: Geometry, forms: Forms) -> jax.Array:
    """Convolves and differentiates in the given forms."""
    return FORWARD[forms.forward](x, kernel, geometry)


def _forward(x, kernel, geometry, forms):
    return in_forms(x, kernel, geometry, forms), (x, kernel)


def _backward(geometry, forms, saved, dy):
    x, kernel = saved
    dx = INPUT[forms.input](x, kernel, geometry, dy)
    dk = WEIGHT[forms.weight](x, kernel, geometry, dy)
    return dx, dk


in_forms.defvjp(_forward, _backward)


@contextlib.contextmanager
def stock() -> Iterator[None]:
    """Within it, what is traced uses XLA's own forms on CPU too: the other side of a benchmark."""
    global _stock
    _stock = True
    try:
        yield
    finally:
        _stock = False


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu" and not _stock


# Forms of the forward pass: (x, kernel, geometry) -> y.


def direct(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """XLA's convolution."""
    stride, pads, groups = geometry
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def product(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """A 1x1 convolution as one matrix product."""
    x = x[:, :: geometry.stride, :: geometry.stride]
    y = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def inside(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """A matrix product a tap of the kernel, over the pixels that it finds inside the map.

    On a small map many taps fall on padding, which here is neither laid out nor multiplied: with
    3x3 on 2x2 pixels 5 of 9 products are spared, on 4x4 pixels 3 of 10, on 7x7 2 of 11.
    """
    size = _output_size(x.shape, kernel.shape, geometry)
    y = jnp.zeros((len(x), *size, kernel.shape[-1]), x.dtype)
    for at, (rows, columns) in _inside(x.shape, kernel.shape, geometry):
        part = x[:, rows.of_x, columns.of_x]
        part = (part.reshape(-1, part.shape[-1]) @ kernel[at]).reshape(*part.shape[:-1], -1)
        y = y + _surrounded(part, rows.of_y, columns.of_y, size)
    return y


def shifted(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """A depthwise convolution as a sum of shifted slices, one loop over the output."""
    weights = kernel.reshape(-1, kernel.shape[-1])
    taps = _taps(x, kernel.shape, geometry)
    return functools.reduce(jnp.add, [t * w for t, w in zip(taps, weights, strict=True)])


def winograd(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """A 3x3 convolution without stride by 16 products for each 2x2 outputs, not 36.

    F(2x2, 3x3) of Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016. It
    adds other terms than the other forms do; in float32 both lie about as far from the exact sums.
    """
    before = [low for low, _ in geometry.pads]
    return _winograd(x, kernel, before, _output_size(x.shape, kernel.shape, geometry), jnp.matmul)


def _winograd(x, kernel, before, size, multiply):
    """Convolves x, `before` which zeros lie, to outputs of this size; multiplies (tile, kernel)."""
    dtype = x.dtype
    x, kernel = _summable(x, kernel)
    tiles = _winograd_tiles(x, before, size)
    of_kernel = _on_both_axes(_kernel_to_tile, [[kernel[i, j] for j in range(3)] for i in range(3)])
    products = [
        [multiply(t.reshape(-1, t.shape[-1]), k) for t, k in zip(*rows, strict=True)]
        for rows in zip(tiles, of_kernel, strict=True)
    ]
    quarters = _on_both_axes(_tile_to_output, products)
    side = *tiles[0][0].shape[:3], -1
    y = jnp.stack([jnp.stack([q.reshape(side) for q in row], 3) for row in quarters], 2)
    y = y.reshape(len(x), *(2 * n for n in side[1:3]), -1)  # from [B, H' / 2, 2, W' / 2, 2, C]
    return y[:, : size[0], : size[1]].astype(dtype)


def _on_both_axes(transform, square):
    """Applies a map from n to m arrays along the columns and the rows of an n x n list of them."""
    columns = [transform(*column) for column in zip(*square, strict=True)]
    return [transform(*row) for row in zip(*columns, strict=True)]


def _input_to_tile(d0, d1, d2, d3):
    return d0 - d2, d1 + d2, d2 - d1, d1 - d3


def _kernel_to_tile(k0, k1, k2):
    return k0, (k0 + k1 + k2) / 2, (k0 - k1 + k2) / 2, k2


def _tile_to_output(m0, m1, m2, m3):
    return m0 + m1 + m2, m1 - m2 - m3


def _output_to_tile(y0, y1):  # the transpose of _tile_to_output
    return y0, y0 + y1, y0 - y1, -y1


def _tile_to_kernel(m0, m1, m2, m3):  # the transpose of _kernel_to_tile
    return m0 + (m1 + m2) / 2, (m1 - m2) / 2, (m1 + m2) / 2 + m3


def _winograd_tiles(x, before, size):
    """Returns the 4x4 transformed pixels behind each 2x2 outputs, each [B, H' / 2, W' / 2, C]."""
    high, wide = (-(-length // 2) for length in size)
    edges = [
        (low, 2 * n + 2 - low - length, 0)
        for low, n, length in zip(before, (high, wide), x.shape[1:3], strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    pixels = [
        [x[:, i : i + 2 * high : 2, j : j + 2 * wide : 2] for j in range(4)] for i in range(4)
    ]
    return _on_both_axes(_input_to_tile, pixels)


# Forms of the gradients: (x, kernel, geometry, dy) -> dx or dk.


def _input_by(form, x, kernel, geometry, dy):
    """By XLA's differentiation of a forward form."""
    return jax.vjp(lambda x: form(x, kernel, geometry), x)[1](dy)[0]


def _weight_by(form, x, kernel, geometry, dy):
    return jax.vjp(lambda kernel: form(x, kernel, geometry), kernel)[1](dy)[0]


def _input_by_phase(form, x, kernel, geometry, dy):
    """The pixels of x that lie alike to the stride: each kind is a convolution of dy, no stride.

    Pixel stride * q + a of x meets tap i of the kernel in output (stride * q + a + low - i) /
    stride, so a phase sees every stride-th tap, in reverse.
    """
    stride, pads = geometry.stride, geometry.pads
    kernel = kernel if geometry.groups > 1 else kernel.swapaxes(2, 3)
    size = [-(-length // stride) for length in x.shape[1:3]]

    def phase(*at):
        taps, around = [], []
        for axis, a in enumerate(at):
            first = (a + pads[axis][0]) % stride
            num_taps = len(range(first, kernel.shape[axis], stride))
            if not num_taps:
                return jnp.zeros((len(x), *size, x.shape[-1]), dy.dtype)
            before = num_taps - 1 - (a + pads[axis][0]) // stride
            after = size[axis] + num_taps - 1 - dy.shape[axis + 1] - before
            taps.append(slice(first, None, stride))
            around.append((before, after))
        part = kernel[taps[0], taps[1]][::-1, ::-1]
        padded = lax.pad(
            dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *((*pair, 0) for pair in around), (0, 0, 0)]
        )
        return form(padded, part, Geometry(1, ((0, 0), (0, 0)), geometry.groups))

    if stride == 1:
        return phase(0, 0)
    rows = [jnp.stack([phase(a, b) for b in range(stride)], 3) for a in range(stride)]
    whole = jnp.stack(rows, 2)  # [B, H', stride, W', stride, C]
    whole = whole.reshape(len(x), size[0] * stride, size[1] * stride, x.shape[-1])
    return whole[:, : x.shape[1], : x.shape[2]]


def _input_by_inside(x, kernel, geometry, dy):
    dx = jnp.zeros(x.shape, dy.dtype)
    for at, (rows, columns) in _inside(x.shape, kernel.shape, geometry):
        part = dy[:, rows.of_y, columns.of_y]
        part = (part.reshape(-1, part.shape[-1]) @ kernel[at].T).reshape(*part.shape[:-1], -1)
        dx = dx + _surrounded(part, rows.of_x, columns.of_x, x.shape[1:3])
    return dx


def _input_by_winograd(x, kernel, geometry, dy):
    def across(tile, kernel):  # faster than to transpose the kernel before it is transformed
        return tile @ kernel.T

    before = [2 - low for low, _ in geometry.pads]
    return _winograd(dy, kernel[::-1, ::-1], before, x.shape[1:3], across)


def _weight_by_inside(x, kernel, geometry, dy):
    dk = {}
    for at, (rows, columns) in _inside(x.shape, kernel.shape, geometry):
        of_x, of_y = x[:, rows.of_x, columns.of_x], dy[:, rows.of_y, columns.of_y]
        dk[at] = of_x.reshape(-1, x.shape[-1]).T @ of_y.reshape(-1, dy.shape[-1])
    never = jnp.zeros(kernel.shape[2:], dy.dtype)
    return jnp.stack([dk.get(at, never) for at in np.ndindex(kernel.shape[:2])]).reshape(
        kernel.shape
    )


def _weight_by_rows(x, kernel, geometry, dy):
    """A matrix product a row of the kernel, without stride.

    The first factor is transposed by hand: the product then reads both along their rows.
    """
    kh, kw, num_in, num_out = kernel.shape
    (above, _), (before, after) = geometry.pads
    height, width = x.shape[1], dy.shape[2]
    x = jnp.pad(jnp.moveaxis(x, -1, 0), ((0, 0), (0, 0), (0, 0), (before, after)))
    beside = jnp.concatenate([x[..., left : left + width] for left in range(kw)])
    beside = lax.optimization_barrier(beside.reshape(kw * num_in, -1))
    rows = []
    for number in range(kh):
        top = number - above  # row h of x meets row h - top of dy
        edges = (top, height - dy.shape[1] - top, 0)
        moved = lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), edges, (0, 0, 0), (0, 0, 0)))
        rows.append(beside @ moved.reshape(-1, num_out))
    return jnp.stack(rows).reshape(kernel.shape)


def _weight_by_winograd(x, kernel, geometry, dy):
    """The gradient of `winograd`; the first factor is transposed by hand, as by rows."""
    dtype, (height, width) = dy.dtype, dy.shape[1:3]
    x, dy = _summable(x, dy)
    tiles = _winograd_tiles(x, [low for low, _ in geometry.pads], (height, width))
    edges = [(0, 0, 0), (0, height % 2, 0), (0, width % 2, 0), (0, 0, 0)]
    dy = lax.pad(dy, jnp.zeros((), dy.dtype), edges)
    of_dy = _on_both_axes(_output_to_tile, [[dy[:, i::2, j::2] for j in (0, 1)] for i in (0, 1)])

    def product(tile, of_dy):
        across = lax.optimization_barrier(tile.reshape(-1, tile.shape[-1]).T)
        return across @ of_dy.reshape(-1, of_dy.shape[-1])

    products = [
        [product(*pair) for pair in zip(*rows, strict=True)]
        for rows in zip(tiles, of_dy, strict=True)
    ]
    dk = _on_both_axes(_tile_to_kernel, products)
    return jnp.stack([jnp.stack(row) for row in dk]).astype(dtype)


def _weight_scanned(x, kernel, geometry, dy):
    """Of a depthwise convolution: image by image, so that nine passes over it find it in cache."""
    x, dy, dtype = *_summable(x, dy), dy.dtype

    def add(total, image_and_dy):
        image, dy = image_and_dy
        taps = _taps(image[None], kernel.shape, geometry)
        return total + jnp.stack([(t[0] * dy).sum((0, 1)) for t in taps]), None

    start = jnp.zeros((kernel.shape[0] * kernel.shape[1], kernel.shape[-1]), dy.dtype)
    return lax.scan(add, start, (x, dy))[0].reshape(kernel.shape).astype(dtype)


def _weight_scanned_by_rows(x, kernel, geometry, dy):
    """Of a depthwise convolution: the same, a row of the kernel after the other."""
    kh, kw = kernel.shape[:2]
    stride = geometry.stride
    x, dy, dtype = *_summable(x, dy), dy.dtype
    x = jnp.pad(x, ((0, 0), *geometry.pads, (0, 0)))
    height, width = ((length - 1) * stride + 1 for length in dy.shape[1:3])

    def add(total, image_and_dy):
        image, dy = image_and_dy

        def row(top):
            rows = lax.dynamic_slice_in_dim(image, top, height)[::stride]
            taps = [rows[:, left : left + width : stride] for left in range(kw)]
            return jnp.stack([(t * dy).sum((0, 1)) for t in taps])

        return total + lax.map(row, jnp.arange(kh)), None

    start = jnp.zeros((kh, kw, kernel.shape[-1]), dy.dtype)
    return lax.scan(add, start, (x, dy))[0].reshape(kernel.shape).astype(dtype)


def _summable(*values: jax.Array) -> list[jax.Array]:
    """Returns values in float32 or finer: a sum over a batch in bfloat16 would lose its digits."""
    return [v.astype(jnp.promote_types(v.dtype, jnp.float32)) for v in values]


Forward = Callable[[jax.Array, jax.Array, Geometry], jax.Array]
Gradient = Callable[[jax.Array, jax.Array, Geometry, jax.Array], jax.Array]

FORWARD: dict[str, Forward] = {
    "direct": direct,
    "product": product,
    "inside": inside,
    "shifted": shifted,
    "winograd": winograd,
}
INPUT: dict[str, Gradient] = {
    "direct": functools.partial(_input_by, direct),
    "product": functools.partial(_input_by, product),
    "inside": _input_by_inside,
    "phases": functools.partial(_input_by_phase, direct),
    "shifted": functools.partial(_input_by_phase, shifted),
    "winograd": _input_by_winograd,
}
WEIGHT: dict[str, Gradient] = {
    "direct": functools.partial(_weight_by, direct),
    "product": functools.partial(_weight_by, product),
    "inside": _weight_by_inside,
    "rows": _weight_by_rows,
    "winograd": _weight_by_winograd,
    "scanned": _weight_scanned,
    "scanned_rows": _weight_scanned_by_rows,
}


def fitting(
    x: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry
) -> tuple[list[str], list[str], list[str]]:
    """Returns the names of all forms that compute a convolution and its two gradients."""
    stride, pads, groups = geometry
    if groups > 1 and not groups == x[-1] == kernel[-1]:
        return ["direct"], ["direct"], ["direct"]
    if groups > 1:
        return ["direct", "shifted"], ["direct", "shifted"], ["direct", "scanned", "scanned_rows"]
    if kernel[:2] == (1, 1) and pads == ((0, 0), (0, 0)):
        return ["direct", "product"], ["direct", "product"], ["direct", "product"]
    by_input = ["direct", "inside"] + (["phases"] if stride > 1 else [])
    weight = ["direct", "inside"] + (["rows"] if stride == 1 else [])
    tiled = ["winograd"] if stride == 1 and kernel[:2] == (3, 3) else []
    return ["direct", "inside", *tiled], by_input + tiled, weight + tiled


class _Span(NamedTuple):
    """Where along one axis a tap of the kernel finds pixels of x, and the outputs it adds to."""

    of_x: slice
    of_y: slice


def _inside(
    x: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry
) -> Iterator[tuple[tuple[int, int], tuple[_Span, _Span]]]:
    """Yields each tap (row, column) of the kernel that ever finds pixels of x, and where."""
    size = _output_size(x, kernel, geometry)
    spans = []
    for axis in (0, 1):
        length, stride, pad = x[axis + 1], geometry.stride, geometry.pads[axis][0]
        of_axis = {}
        for tap in range(kernel[axis]):  # output o sees pixel o * stride + tap - pad
            first = max(0, -(-(pad - tap) // stride))
            last = min(size[axis] - 1, (length - 1 + pad - tap) // stride)
            if first <= last:
                start, stop = (o * stride + tap - pad for o in (first, last))
                of_axis[tap] = _Span(slice(start, stop + 1, stride), slice(first, last + 1))
        spans.append(of_axis)
    for at in itertools.product(*spans):
        yield at, (spans[0][at[0]], spans[1][at[1]])


def _surrounded(part: jax.Array, rows: slice, columns: slice, size: tuple[int, int]) -> jax.Array:
    """Returns zeros [B, *size, C] that hold `part` at these rows and columns."""
    pads = [
        (s.start, n - s.stop, (s.step or 1) - 1) for s, n in zip((rows, columns), size, strict=True)
    ]
    return lax.pad(part, jnp.zeros((), part.dtype), [(0, 0, 0), *pads, (0, 0, 0)])


def _output_size(
    x: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry
) -> tuple[int, int]:
    height, width = (
        (x[axis + 1] + sum(geometry.pads[axis]) - kernel[axis]) // geometry.stride + 1
        for axis in (0, 1)
    )
    return height, width


def _taps(x: jax.Array, kernel: tuple[int, ...], geometry: Geometry) -> list[jax.Array]:
    """Returns each output pixel's inputs, kh * kw times [B, H', W', C], in the kernel's order."""
    kh, kw = kernel[:2]
    stride = geometry.stride
    x = jnp.pad(x, ((0, 0), *geometry.pads, (0, 0)))
    height = (x.shape[1] - kh) // stride * stride + 1
    width = (x.shape[2] - kw) // stride * stride + 1
    return [
        x[:, top : top + height : stride, left : left + width : stride]
        for top in range(kh)
        for left in range(kw)
    ]


def max_pool(x: jax.Array, size: int, stride: int, padding: int) -> jax.Array:
    """Takes the maximum of each window, [B, H, W, C] -> [B, H', W', C].

    On CPU as the maximum of shifted slices, rows first, then columns: the gradient of XLA's
    windowed maximum is slow there. Where values tie, the gradient is shared out between them on
    CPU, and goes to one of them elsewhere.
    """
    if not _on_cpu():
        pads = ((padding, padding), (padding, padding))
        # Flax does not annotate it; its default is a string.
        return nnx.max_pool(x, (size, size), (stride, stride), pads)  # pyright: ignore[reportArgumentType]
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    x = jnp.pad(x, pads, constant_values=-jnp.inf)
    for axis in (1, 2):
        length = (x.shape[axis] - size) // stride * stride + 1
        slices = [lax.slice_in_dim(x, start, start + length, stride, axis) for start in range(size)]
        x = functools.reduce(jnp.maximum, slices)
    return x


class Kernel(NamedTuple):
    """A square kernel and how it moves, for `Conv`.

    Attributes:
      size: of its side.
      stride: in both directions.
      depthwise: each channel is convolved by itself.
      same: pad as TensorFlow does, the odd zero below and to the right, so that a strided kernel
        over an even side starts at its first pixel; else by half the kernel on each side, and an
        even kernel, which cuts a map into patches, not at all.
      init: of its values; None: He's (fan out, as for ResNets: He et al., ICCV 2015).
    """

    size: int
    stride: int = 1
    depthwise: bool = False
    same: bool = False
    init: jax.nn.initializers.Initializer | None = None


class Conv(nnx.Module):
    """A convolution.

    Args:
      num_in: channels in.
      num_out: channels out; as many if the kernel is depthwise.
      kernel: its shape.
      bias: add one number a channel, at first 0.
      dtype: to compute in; the parameters are kept in float32.
      rngs: for the initial kernel.
    """

    def __init__(
        self,
        num_in: int,
        num_out: int,
        kernel: Kernel,
        *,
        bias: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        size, self.stride, depthwise, self.same, init = kernel
        if init is None:
            # Each depthwise channel feeds one channel only.
            axes = {"in_axis": -2, "out_axis": -2, "batch_axis": -1} if depthwise else {}
            init = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal", **axes)
        shape = (size, size, 1 if depthwise else num_in, num_out)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(num_out)) if bias else None
        self.size, self.dtype = size, dtype
        self.groups = num_in if depthwise else 1

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, num_in] -> [B, H / stride, W / stride, num_out].

        Rounded up; down for an even kernel that is not `same`.
        """
        window, strides = (self.size, self.size), (self.stride, self.stride)
        if self.same:
            of_rows, of_columns = lax.padtype_to_pads(x.shape[1:3], window, strides, "SAME")
        else:
            half = self.size // 2 * (self.size % 2)
            of_rows = of_columns = (half, half)
        kernel = self.kernel[...].astype(self.dtype)
        y = conv(x.astype(self.dtype), kernel, self.stride, (of_rows, of_columns), self.groups)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)
