"""A function that JAX has traced -> a graph of ONNX operators; knows nothing of networks.

Each primitive has its rule. Three things keep the graph small and fast in any runtime:
- What depends on no input is computed here and becomes a constant.
- Axes are exchanged on paper: a `Tensor` says in which order its axes are stored, and only an
  operator that needs another order gets a Transpose. So maps stay as the first convolution wants
  them, channels before pixels, through all that follows.
- What is broadcast stays small: ONNX broadcasts by itself where both sides meet.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend import core
from onnx import helper, numpy_helper

OPSET = 18
"""Of ONNX 1.13, December 2022."""
_IR_VERSION = 9

Shape = tuple[Any, ...]
"""Of ints, and of JAX's symbolic dimensions."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a node computes.

    Attributes:
      name: in the graph.
      shape: of its axes in JAX's order; 1 where it is yet to be broadcast.
      order: which of these axes is stored first, second, ...
    """

    name: str
    shape: Shape
    order: tuple[int, ...]

    def stored_at(self, axis: int) -> int:
        """Returns the place of one of JAX's axes."""
        return self.order.index(axis)


Value = Tensor | np.ndarray
"""An array is a constant, in JAX's order of axes; with 1 where it is yet to be broadcast."""


class UntranslatableError(NotImplementedError):
    """There is no rule for what a traced function does."""


def model(
    traced: core.ClosedJaxpr, inputs: Sequence[str], outputs: Sequence[str], batch: str = "N"
) -> onnx.ModelProto:
    """Returns a traced function as a model of ONNX.

    Args:
      traced: with a symbolic first axis at most.
      inputs: names of its arguments.
      outputs: names of its results.
      batch: what the symbolic axis is called.

    Raises:
      UntranslatableError: it does what there is no rule for.
    """
    graph = _Graph()
    arguments = [
        Tensor(name, _aval(var).shape, tuple(range(_aval(var).ndim)))
        for name, var in zip(inputs, traced.jaxpr.invars, strict=True)
    ]
    consts = [np.asarray(const) for const in traced.consts]
    results = graph.run(traced.jaxpr, consts, arguments)
    for name, result, var in zip(outputs, results, traced.jaxpr.outvars, strict=True):
        stored = graph.whole(graph.tensor(result), _aval(var).shape)
        graph.nodes.append(helper.make_node("Identity", [stored.name], [name]))

    def info(name, var):
        shape = [dim if isinstance(dim, int) else batch for dim in _aval(var).shape]
        return helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(np.dtype(_aval(var).dtype)), shape
        )

    nodes = _needed(graph.nodes, outputs)
    used = {name for node in nodes for name in node.input}
    made = helper.make_graph(
        nodes,
        "ham_jax",
        [info(*pair) for pair in zip(inputs, traced.jaxpr.invars, strict=True)],
        [info(*pair) for pair in zip(outputs, traced.jaxpr.outvars, strict=True)],
        [constant for constant in graph.constants.values() if constant.name in used],
    )
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(made, opset_imports=opset, ir_version=_IR_VERSION)


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """Returns the nodes that an output depends on."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _aval(var: Any) -> Any:
    """Returns what is known of a variable: shape and dtype, which its declared type lacks."""
    return var.aval


class _Graph:
    """The nodes and constants of a graph in the making."""

    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple, onnx.TensorProto] = {}
        self.made: dict[str, onnx.NodeProto] = {}  # by the name of what they compute

    def run(
        self, jaxpr: core.Jaxpr, consts: Sequence[Value], arguments: Sequence[Value]
    ) -> list[Value]:
        """Adds what a jaxpr does to its arguments, and returns its results."""
        known: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, arguments, strict=True))

        def value(var) -> Value:
            if isinstance(var, core.Literal):
                return np.asarray(var.val, _aval(var).dtype)
            return known[var]

        for eqn in jaxpr.eqns:
            results = self._apply(eqn, [value(var) for var in eqn.invars])
            known.update(zip(eqn.outvars, results, strict=True))
        return [value(var) for var in jaxpr.outvars]

    def _apply(self, eqn: core.JaxprEqn, operands: list[Value]) -> list[Value]:
        name, params = eqn.primitive.name, eqn.params
        if name in _INLINED:
            inner = params[_INLINED[name]]
            return self.run(inner.jaxpr, [np.asarray(c) for c in inner.consts], operands)
        if name in _SAME:
            return operands
        is_constant = all(isinstance(operand, np.ndarray) for operand in operands)
        if is_constant and name != "broadcast_in_dim":
            return _computed(eqn, operands)
        if name not in _RULES:
            raise UntranslatableError(f"there is no rule for what JAX calls {name}")
        return [_RULES[name](self, eqn, *operands)]

    def node(self, kind: str, inputs: Sequence[str], **attributes) -> str:
        """Adds a node of one result and returns the result's name."""
        name = f"{kind}_{len(self.nodes)}"
        self.made[name] = helper.make_node(kind, inputs, [name], **attributes)
        self.nodes.append(self.made[name])
        return name

    def constant(self, value: np.ndarray) -> str:
        """Returns the name of a constant; equal ones are kept once."""
        value = np.ascontiguousarray(value).reshape(value.shape)  # which a scalar would lose
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self.constants:
            name = f"constant_{len(self.constants)}"
            self.constants[key] = numpy_helper.from_array(value, name)
        return self.constants[key].name

    def tensor(self, value: Value) -> Tensor:
        """Returns a value as a result of the graph."""
        if isinstance(value, Tensor):
            return value
        return Tensor(self.constant(value), value.shape, tuple(range(value.ndim)))

    def ordered(self, value: Value, order: tuple[int, ...]) -> Tensor:
        """Returns a value whose axes are stored in this order."""
        if isinstance(value, np.ndarray):
            return Tensor(self.constant(value.transpose(order)), value.shape, order)
        if value.order == order:
            return value
        perm = [value.stored_at(axis) for axis in order]
        return Tensor(self.node("Transpose", [value.name], perm=perm), value.shape, order)

    def whole(self, value: Value, shape: Shape) -> Tensor:
        """Returns a value in JAX's order of axes, broadcast to its shape."""
        tensor = self.ordered(value, tuple(range(len(shape))))
        if tensor.shape == tuple(shape):
            return tensor
        if not all(isinstance(dim, int) for dim in shape):
            raise UntranslatableError(f"what is broadcast to {shape} is used as a whole")
        target = self.constant(np.array(shape, np.int64))
        return Tensor(self.node("Expand", [tensor.name, target]), tuple(shape), tensor.order)


def _computed(eqn: core.JaxprEqn, operands: list[Any]) -> list[Value]:
    """Computes what depends on no input."""
    if eqn.primitive.name in _POINTWISE:  # shapes need to agree, and none need be the final one
        operands = list(np.broadcast_arrays(*operands))
    else:
        shapes = [_aval(var).shape for var in eqn.invars]
        if not all(isinstance(dim, int) for shape in shapes for dim in shape):
            raise UntranslatableError(f"{eqn.primitive.name} of a constant as long as the batch")
        operands = [np.broadcast_to(*pair) for pair in zip(operands, shapes, strict=True)]
    results = eqn.primitive.bind(*map(jnp.asarray, operands), **eqn.params)
    return [np.asarray(x) for x in (results if eqn.primitive.multiple_results else [results])]


def _elementwise(kind: str, graph: _Graph, eqn: core.JaxprEqn, *operands: Value) -> Value:
    return _meet(graph, functools.partial(graph.node, kind), operands)


def _meet(graph: _Graph, make: Callable[[list[str]], str], operands: Sequence[Value]) -> Tensor:
    """Adds a node whose operands broadcast, in the order of the largest one that is no constant."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    first = max(tensors, key=lambda t: (sum(dim != 1 for dim in t.shape), len(t.shape)))
    names = [
        graph.ordered(operand, first.order).name
        if len(operand.shape)
        else graph.tensor(operand).name
        for operand in operands
    ]
    shapes = [operand.shape for operand in operands if len(operand.shape)]
    shape = tuple(next((d for d in dims if d != 1), 1) for dims in zip(*shapes, strict=True))
    return Tensor(make(names), shape, first.order)


def _scalar(value: Value) -> np.ndarray | None:
    """Returns the one number that a constant consists of."""
    if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():
        return value.flat[0:1].reshape(())
    return None


def _bounded(kind: str, graph: _Graph, eqn: core.JaxprEqn, x: Value, y: Value) -> Value:
    """Max or Min; with a number as Relu or Clip, which runtimes join to the convolution before."""
    if isinstance(x, np.ndarray):
        x, y = y, x
    bound = _scalar(y)
    if bound is None or not isinstance(x, Tensor):
        return _elementwise(kind, graph, eqn, x, y)
    if kind == "Max" and bound == 0:
        return dataclasses.replace(x, name=graph.node("Relu", [x.name]))
    source, limits = x.name, [graph.constant(bound), ""]
    if kind == "Min":
        limits = ["", graph.constant(bound)]
        before = graph.made.get(x.name)
        if before is not None and before.op_type == "Relu" and bound > 0:
            source, limits[0] = before.input[0], graph.constant(np.zeros_like(bound))
    return dataclasses.replace(x, name=graph.node("Clip", [source, *limits]))


def _clamp(graph: _Graph, eqn: core.JaxprEqn, low: Value, x: Value, high: Value) -> Value:
    least, most = _scalar(low), _scalar(high)
    if not isinstance(x, Tensor) or least is None or most is None:
        raise UntranslatableError("a clamp by what is no number")
    name = graph.node("Clip", [x.name, graph.constant(least), graph.constant(most)])
    return dataclasses.replace(x, name=name)


def _composed(
    graph: _Graph, eqn: core.JaxprEqn, *operands: Value, of: Callable[..., jax.Array]
) -> Value:
    """Adds what a primitive is made of, written in other primitives."""
    specs = [jax.ShapeDtypeStruct(_aval(var).shape, _aval(var).dtype) for var in eqn.invars]
    traced = jax.make_jaxpr(functools.partial(of, **eqn.params))(*specs)
    return graph.run(traced.jaxpr, [np.asarray(c) for c in traced.consts], operands)[0]


def _power(graph: _Graph, eqn: core.JaxprEqn, x: Tensor) -> Value:
    exponent = np.asarray(eqn.params["y"], _aval(eqn.invars[0]).dtype)
    return _elementwise("Pow", graph, eqn, x, exponent)


def _cast(graph: _Graph, eqn: core.JaxprEqn, x: Tensor) -> Value:
    if _aval(eqn.invars[0]).dtype == (dtype := np.dtype(eqn.params["new_dtype"])):
        return x
    to = helper.np_dtype_to_tensor_dtype(dtype)
    return dataclasses.replace(x, name=graph.node("Cast", [x.name], to=to))


def _select(graph: _Graph, eqn: core.JaxprEqn, which: Value, *cases: Value) -> Value:
    known = _scalar(which)
    if known is None:
        raise UntranslatableError("a choice that depends on the input or on the place")
    return cases[int(known)]


def _transpose(graph: _Graph, eqn: core.JaxprEqn, x: Tensor) -> Value:
    permutation = eqn.params["permutation"]
    order = tuple(permutation.index(axis) for axis in x.order)
    return Tensor(x.name, tuple(x.shape[axis] for axis in permutation), order)


def _broadcast(graph: _Graph, eqn: core.JaxprEqn, x: Value) -> Value:
    rank, places = len(eqn.params["shape"]), tuple(map(int, eqn.params["broadcast_dimensions"]))
    dims = dict(zip(places, x.shape, strict=True))
    shape = tuple(dims.get(axis, 1) for axis in range(rank))
    if isinstance(x, np.ndarray):
        return x.reshape(shape)
    order = [places[axis] for axis in x.order]
    if len(order) == rank:
        return Tensor(x.name, shape, tuple(order))
    # A new axis goes right behind the one that it follows: maps keep their order.
    added = [axis for axis in range(rank) if axis not in dims]
    for axis in added:
        order.insert(order.index(axis - 1) + 1 if axis else 0, axis)
    at = graph.constant(np.array(sorted(order.index(axis) for axis in added), np.int64))
    return Tensor(graph.node("Unsqueeze", [x.name, at]), shape, tuple(order))


def _squeeze(graph: _Graph, eqn: core.JaxprEqn, x: Tensor) -> Value:
    dropped = [int(axis) for axis in eqn.params["dimensions"]]
    kept = [axis for axis in range(len(x.shape)) if axis not in dropped]
    at = graph.constant(np.array(sorted(x.stored_at(axis) for axis in dropped), np.int64))
    order = tuple(kept.index(axis) for axis in x.order if axis in kept)
    shape = tuple(x.shape[axis] for axis in kept)
    return Tensor(graph.node("Squeeze", [x.name, at]), shape, order)


def _reshape(graph: _Graph, eqn: core.JaxprEqn, x: Tensor) -> Value:
    before, after = _aval(eqn.invars[0]).shape, eqn.params["new_sizes"]
    if before == after:
        return x
    if sum(not isinstance(dim, int) for dim in after) > 1:
        raise UntranslatableError(f"a reshape to {after}")
    target = np.array([dim if isinstance(dim, int) else -1 for dim in after], np.int64)
    name = graph.node("Reshape", [graph.whole(x, before).name, graph.constant(target)])
    return Tensor(name, tuple(after), tuple(range(len(after))))


def _reduce(kind: str, graph: _Graph, eqn: core.JaxprEqn, x: Tensor) -> Value:
    axes = eqn.params["axes"]
    if any(x.shape[axis] != _aval(eqn.invars[0]).shape[axis] for axis in axes):
        x = graph.whole(x, _aval(eqn.invars[0]).shape)
    at = graph.constant(np.array(sorted(x.stored_at(axis) for axis in axes), np.int64))
    kept = [axis for axis in range(len(x.shape)) if axis not in axes]
    order = tuple(kept.index(axis) for axis in x.order if axis in kept)
    name = graph.node(kind, [x.name, at], keepdims=0)
    return Tensor(name, tuple(x.shape[axis] for axis in kept), order)


def _slice(graph: _Graph, eqn: core.JaxprEqn, x: Tensor) -> Value:
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(starts)
    whole = _aval(eqn.invars[0]).shape
    cut = [a for a in range(len(whole)) if (starts[a], stops[a], steps[a]) != (0, whole[a], 1)]
    if not cut:
        return x
    if any(x.shape[axis] != whole[axis] for axis in cut):
        x = graph.whole(x, whole)
    return _sliced(graph, x, eqn, cut, [starts, stops, steps])


def _rev(graph: _Graph, eqn: core.JaxprEqn, x: Tensor) -> Value:
    axes = [axis for axis in eqn.params["dimensions"] if x.shape[axis] != 1]
    minus, first = [-1] * len(x.shape), [np.iinfo(np.int64).min] * len(x.shape)
    return _sliced(graph, x, eqn, axes, [minus, first, minus])


def _sliced(
    graph: _Graph, x: Tensor, eqn: core.JaxprEqn, axes: list[int], bounds: Sequence[Sequence[int]]
) -> Tensor:
    """Adds a Slice; `bounds` are starts, stops and steps of all axes."""
    starts, stops, steps = (
        graph.constant(np.array([bound[axis] for axis in axes], np.int64)) for bound in bounds
    )
    at = graph.constant(np.array([x.stored_at(axis) for axis in axes], np.int64))
    name = graph.node("Slice", [x.name, starts, stops, at, steps])
    shape = [_aval(eqn.outvars[0]).shape[a] if a in axes else d for a, d in enumerate(x.shape)]
    return Tensor(name, tuple(shape), x.order)


def _concatenate(graph: _Graph, eqn: core.JaxprEqn, *parts: Value) -> Value:
    axis = eqn.params["dimension"]
    order = next(part.order for part in parts if isinstance(part, Tensor))
    names = []
    for part, var in zip(parts, eqn.invars, strict=True):
        if part.shape != _aval(var).shape:
            part = graph.whole(part, _aval(var).shape)
        names.append(graph.ordered(part, order).name)
    name = graph.node("Concat", names, axis=order.index(axis))
    return Tensor(name, _aval(eqn.outvars[0]).shape, order)


def _product(graph: _Graph, eqn: core.JaxprEqn, x: Value, y: Value) -> Value:
    """A product with a constant matrix, over one axis."""
    (contract_x, contract_y), batch = eqn.params["dimension_numbers"]
    matrix, tensor = (x, y) if isinstance(x, np.ndarray) else (y, x)
    if not (isinstance(matrix, np.ndarray) and isinstance(tensor, Tensor)):
        raise UntranslatableError("a product of two tensors")
    is_left = matrix is x
    of_matrix, of_tensor = (contract_x, contract_y) if is_left else (contract_y, contract_x)
    batched, beside = batch if is_left else batch[::-1]
    if len(of_matrix) != 1 or any(matrix.shape[axis] != 1 for axis in batched):
        raise UntranslatableError("a product over several axes, or with many matrices")
    free = [a for a in range(matrix.ndim) if a not in (*of_matrix, *batched)]
    if len(free) != 1:
        raise UntranslatableError("a product with what is no matrix")
    at = of_tensor[0]
    table = matrix.transpose(*batched, *of_matrix, *free).reshape(matrix.shape[of_matrix[0]], -1)
    made = _multiplied(graph, tensor, at, table)
    # The axis that was summed over is now that of the matrix. JAX has those of the batch first,
    # then the left factor's, then the right one's.
    rest = [axis for axis in range(len(tensor.shape)) if axis != at and axis not in beside]
    places = [*beside, at, *rest] if is_left else [*beside, *rest, at]
    order = tuple(places.index(axis) for axis in made.order)
    return Tensor(made.name, tuple(made.shape[axis] for axis in places), order)


def _multiplied(graph: _Graph, x: Tensor, axis: int, table: np.ndarray) -> Tensor:
    """Replaces an axis of K by one of P: the sums over it, weighted by a table [K, P]."""
    if x.order[-1] != axis and (len(x.order) < 2 or x.order[-2] != axis):
        others = [a for a in range(len(x.shape)) if a != axis]
        x = graph.ordered(x, (*others[:-1], axis, others[-1]))
    if x.order[-1] == axis:
        name = graph.node("MatMul", [x.name, graph.constant(table)])
    else:
        name = graph.node("MatMul", [graph.constant(table.T), x.name])
    shape = tuple(table.shape[1] if a == axis else dim for a, dim in enumerate(x.shape))
    return Tensor(name, shape, x.order)


_CHANNELS_FIRST = (0, 3, 1, 2)  # how ONNX wants what JAX has as [B, H, W, C]


def _conv(graph: _Graph, eqn: core.JaxprEqn, x: Value, kernel: Value) -> Value:
    params, rank = eqn.params, len(_aval(eqn.invars[0]).shape)
    layout = params["dimension_numbers"]
    is_plain = (
        rank == 4
        and layout.lhs_spec == layout.out_spec == _CHANNELS_FIRST
        and set(params["lhs_dilation"]) == {1}
        and params["batch_group_count"] == 1
    )
    if not (is_plain and isinstance(kernel, np.ndarray)):
        raise UntranslatableError("a convolution that is none of images with a constant kernel")
    image = graph.ordered(x, _CHANNELS_FIRST)
    weights = kernel.transpose(layout.rhs_spec)
    (top, bottom), (left, right) = params["padding"]
    name = graph.node(
        "Conv",
        [image.name, graph.constant(weights)],
        kernel_shape=weights.shape[2:],
        strides=params["window_strides"],
        pads=[top, left, bottom, right],
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
    )
    return Tensor(name, _aval(eqn.outvars[0]).shape, _CHANNELS_FIRST)


def _pool(kind: str, graph: _Graph, eqn: core.JaxprEqn, x: Tensor) -> Value:
    params = eqn.params
    window, strides, padding = (
        params[name] for name in ("window_dimensions", "window_strides", "padding")
    )
    (top, bottom), (left, right) = padding[1:3]
    image = graph.ordered(x, _CHANNELS_FIRST)
    attributes = {"count_include_pad": 1} if kind == "AveragePool" else {}
    name = graph.node(
        kind,
        [image.name],
        kernel_shape=window[1:3],
        strides=strides[1:3],
        pads=[top, left, bottom, right],
        **attributes,
    )
    made = Tensor(name, _aval(eqn.outvars[0]).shape, _CHANNELS_FIRST)
    if kind == "MaxPool":
        return made
    size = np.asarray(math.prod(window), _aval(eqn.invars[0]).dtype)  # JAX's is a sum
    return _elementwise("Mul", graph, eqn, made, size)


_ELEMENTWISE = {  # most are called alike
    name: name.capitalize()
    for name in (
        *("add", "sub", "mul", "div", "pow", "max", "min"),
        *("neg", "abs", "exp", "log", "sqrt", "erf", "floor", "tanh"),
    )
} | {"add_any": "Add", "logistic": "Sigmoid"}
_REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}

Rule = Callable[..., Value]

_RULES: Mapping[str, Rule] = {
    **{name: functools.partial(_elementwise, kind) for name, kind in _ELEMENTWISE.items()},
    **{name: functools.partial(_reduce, kind) for name, kind in _REDUCTIONS.items()},
    "max": functools.partial(_bounded, "Max"),
    "min": functools.partial(_bounded, "Min"),
    "clamp": _clamp,
    "integer_pow": _power,
    "square": functools.partial(_composed, of=lambda x, **_: x * x),
    "rsqrt": functools.partial(_composed, of=lambda x, **_: 1 / jnp.sqrt(x)),
    "erfc": functools.partial(_composed, of=lambda x, **_: 1 - jax.lax.erf(x)),
    "convert_element_type": _cast,
    "select_n": _select,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "slice": _slice,
    "rev": _rev,
    "concatenate": _concatenate,
    "dot_general": _product,
    "conv_general_dilated": _conv,
    "reduce_window_max": functools.partial(_pool, "MaxPool"),
    "reduce_window_sum": functools.partial(_pool, "AveragePool"),
}
# The value at a place depends on nothing but the operands' there; all but the last have a rule.
_POINTWISE = {
    *(*_ELEMENTWISE, "integer_pow", "square", "rsqrt", "erfc", "convert_element_type", "clamp"),
    *("eq", "ne", "ge", "gt", "le", "lt", "and", "or", "not", "select_n"),
}
_INLINED = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
_SAME = ("optimization_barrier", "copy", "stop_gradient")
