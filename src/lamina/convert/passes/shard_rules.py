"""What an op needs of its inputs when only a part of its result is wanted.

A rule knows an op's dimensions and nothing of models: for the part `shard` of the result it gives
the parts of the inputs from which the same op, with arguments for the smaller shapes, computes it.
Ops without a rule are computed whole on every rank, and a part is taken from the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from lamina.convert.shard import Shard, reshaped, sizes_of

_aten = torch.ops.aten

Wanted = Shard | None
"""A part of a value, or all of it."""

Inputs = dict[fx.Node, Wanted]
"""What an op needs. An input that is missing is not needed."""


class Linear(NamedTuple):
    """A linear op over weights: the last dimension of `x` is summed over."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    in_dim: int
    """The dimension of the weight that is summed over."""
    out_dim: int
    experts: fx.Node | None = None
    """Each row's expert, whose weights are at that place of the weight's dimension 0."""


def linear_of(node: fx.Node) -> Linear | None:
    """The node as a linear, if it is one."""
    args: Any = node.args
    match node.target:
        case _aten.linear.default:
            return Linear(args[0], args[1], args[2] if len(args) > 2 else None, 1, 0)
        case _aten.addmm.default if not node.kwargs and _rank(args[0]) == 1:
            return Linear(args[1], args[2], args[0], 0, 1)
        case _aten.mm.default:
            return Linear(args[0], args[1], None, 0, 1)
        case torch.ops.lamina.expert_linear.default:
            rows, weight, bias, experts, transposed = args[:5]
            in_dim, out_dim = (1, 2) if transposed else (2, 1)
            return Linear(rows, weight, bias, in_dim, out_dim, experts)
    return None


def inputs_for(node: fx.Node, shard: Shard) -> Inputs | None:
    """The parts of the inputs that make `shard` of the node; None if it cannot be made of parts."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if (linear := linear_of(node)) is not None:
        return _linear(node, linear, shard)
    if (rule := _RULES.get(node.target)) is not None:
        return rule(node, shard)
    return _pointwise(node, shard) if _is_pointwise(node) else None


def arguments_for(node: fx.Node, shard: Shard) -> tuple[Any, tuple[Any, ...]]:
    """Target and arguments that compute `shard` of the node from the parts of its inputs."""
    args: Any = node.args
    match node.target:
        case _aten.view.default | _aten.reshape.default | _aten._unsafe_view.default:
            return _aten.reshape.default, (args[0], _with_size(args[1], shard), *args[2:])
        case _aten.expand.default | _aten.new_empty.default | _aten.new_zeros.default:
            return node.target, (args[0], _with_size(args[1], shard), *args[2:])
        case _aten.cat.default if _dim(node, 1, 0) == shard.dim:
            kept = [n for n in args[0] if len(_part_of_cat(node, n, shard).index)]
            return node.target, (kept, *args[1:])
    return node.target, args


def source_of_slice(node: fx.Node, shard: Shard) -> tuple[fx.Node, Shard] | None:
    """(x, part of x) if the node is a slice along the shard's dimension: the part itself."""
    if node.target is not _aten.slice.Tensor or _dim(node, 1, 0) != shard.dim:
        return None
    args: Any = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    source, _, start, _, step = args
    size = source.meta["val"].shape[shard.dim]
    first = max(0, size + start) if start is not None and start < 0 else start or 0
    return source, Shard(shard.dim, first + step * shard.index)


def _rank(node: fx.Node) -> int:
    value: torch.Tensor = node.meta["val"]
    return value.dim()


def _dim(node: fx.Node, position: int, default: int) -> int:
    """Argument `position`, a dimension of the node's result, as a number that is not negative."""
    dim: Any = node.args[position] if len(node.args) > position else default
    return int(dim) % _rank(node)


def _with_size(sizes: Any, shard: Shard) -> list[Any]:
    changed = [*sizes]
    if changed[shard.dim] != -1:
        changed[shard.dim] = len(shard)
    return changed


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _broadcast(node: fx.Node, source: fx.Node, shard: Shard) -> Wanted:
    """What is wanted of an operand that is broadcast to the node's shape."""
    value = source.meta["val"]
    if not isinstance(value, torch.Tensor):
        return None
    dim = shard.dim - (_rank(node) - value.dim())
    whole, size = sizes_of(node.meta["val"].shape, value.shape)
    return shard.on(dim) if dim >= 0 and size[dim] == whole[shard.dim] else None


def _pointwise(node: fx.Node, shard: Shard) -> Inputs:
    return {source: _broadcast(node, source, shard) for source in node.all_input_nodes}


def _linear(node: fx.Node, linear: Linear, shard: Shard) -> Inputs | None:
    if shard.dim != _rank(node) - 1:  # other dimensions pass through
        if linear.experts is not None:
            return None
        inputs: Inputs = {linear.x: shard, linear.weight: None}
        return inputs if linear.bias is None else {**inputs, linear.bias: None}
    inputs = {linear.x: None, linear.weight: shard.on(linear.out_dim)}
    if linear.bias is not None:
        inputs[linear.bias] = shard.on(_rank(linear.bias) - 1)
    if linear.experts is not None:
        inputs[linear.experts] = None
    return inputs


def _first(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _others_whole(node: fx.Node, inputs: Inputs) -> Inputs:
    return {**dict.fromkeys(node.all_input_nodes), **inputs}


def _same(node: fx.Node, shard: Shard) -> Inputs:
    return _others_whole(node, {_first(node): shard})


def _view(node: fx.Node, shard: Shard) -> Inputs | None:
    source = _first(node)
    part = reshaped(shard, node.meta["val"].shape, source.meta["val"].shape)
    return None if part is None else _others_whole(node, {source: part})


def _transpose(node: fx.Node, shard: Shard) -> Inputs:
    a, b = _dim(node, 1, 0), _dim(node, 2, 1)
    return {_first(node): shard.on({a: b, b: a}.get(shard.dim, shard.dim))}


def _t(node: fx.Node, shard: Shard) -> Inputs:
    return {_first(node): shard.on(_rank(node) - 1 - shard.dim)}


def _permute(node: fx.Node, shard: Shard) -> Inputs:
    order: Any = node.args[1]
    return {_first(node): shard.on(order[shard.dim] % len(order))}


def _unsqueeze(node: fx.Node, shard: Shard) -> Inputs | None:
    at = _dim(node, 1, 0)
    if at == shard.dim:
        return None
    return {_first(node): shard.on(shard.dim - (at < shard.dim))}


def _removed(node: fx.Node, shard: Shard) -> Inputs:
    """One dimension of the input is gone."""
    source = _first(node)
    at: Any = node.args[1]
    at %= _rank(source)
    return _others_whole(node, {source: shard.on(shard.dim + (at <= shard.dim))})


def _slice(node: fx.Node, shard: Shard) -> Inputs:
    if (found := source_of_slice(node, shard)) is not None:
        return _others_whole(node, dict([found]))
    return _same(node, shard)


def _expand(node: fx.Node, shard: Shard) -> Inputs:
    source = _first(node)
    return _others_whole(node, {source: _broadcast(node, source, shard)})


def _new(node: fx.Node, shard: Shard) -> Inputs:
    """Only the dtype of the first input matters: it may be the same part."""
    source = _first(node)
    like, whole = sizes_of(source.meta["val"].shape, node.meta["val"].shape)
    is_like = len(like) == len(whole) and like[shard.dim] == whole[shard.dim]
    return _others_whole(node, {source: shard if is_like else None})


def _part_of_cat(node: fx.Node, source: fx.Node, shard: Shard) -> Shard:
    """The elements of one of cat's inputs that are in a part along cat's dimension."""
    inputs: Any = node.args[0]
    start = 0
    for other in inputs:
        size = other.meta["val"].shape[shard.dim]
        if other is source:
            inside = shard.index[(shard.index >= start) & (shard.index < start + size)]
            return Shard(shard.dim, inside - start)
        start += size
    raise AssertionError("the source is one of cat's inputs")


def _cat(node: fx.Node, shard: Shard) -> Inputs | None:
    inputs: Any = node.args[0]
    if _dim(node, 1, 0) != shard.dim:
        return dict.fromkeys(inputs, shard)
    if len(set(inputs)) != len(inputs):
        return None
    parts = {source: _part_of_cat(node, source, shard) for source in inputs}
    return {source: part for source, part in parts.items() if len(part)}


def _stack(node: fx.Node, shard: Shard) -> Inputs | None:
    inputs: Any = node.args[0]
    at = _dim(node, 1, 0)
    if at == shard.dim:
        return None
    return dict.fromkeys(inputs, shard.on(shard.dim - (at < shard.dim)))


def _slice_scatter(node: fx.Node, shard: Shard) -> Inputs | None:
    source: Any = node.args[1]
    if _dim(node, 2, 0) == shard.dim:
        return None
    return _others_whole(node, {_first(node): shard, source: shard})


def _index(node: fx.Node, shard: Shard) -> Inputs | None:
    """x[:, rows]: one dimension is indexed by a vector."""
    indices: Any = node.args[1]
    used = [i for i, n in enumerate(indices) if n is not None]
    if len(used) != 1 or _rank(indices[used[0]]) != 1 or used[0] == shard.dim:
        return None
    return _same(node, shard)


def _reduce(node: fx.Node, shard: Shard) -> Inputs | None:
    """A reduction over other dimensions."""
    source = _first(node)
    rank = _rank(source)
    dims: Any = node.args[1] if len(node.args) > 1 else None
    keeps = bool(node.args[2]) if len(node.args) > 2 else False
    if not dims:
        return None
    gone = {d % rank for d in dims}
    left = [d for d in range(rank) if keeps or d not in gone]
    dim = left[shard.dim]
    return None if dim in gone else {source: shard.on(dim)}


def _along(node: fx.Node, shard: Shard) -> Inputs | None:
    """An op that works along one dimension and keeps the shape (softmax)."""
    return None if _dim(node, 1, -1) == shard.dim else _same(node, shard)


def _norm(node: fx.Node, shard: Shard) -> Inputs | None:
    """A norm over the last dimensions."""
    normalized: Any = node.args[1]
    return None if shard.dim >= _rank(node) - len(normalized) else _same(node, shard)


_RULES: dict[Any, Callable[[fx.Node, Shard], Inputs | None]] = {
    **dict.fromkeys((_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default,
                     _aten.flatten.using_ints), _view),
    **dict.fromkeys((_aten.contiguous.default, _aten.clone.default, _aten.to.dtype), _same),
    _aten.transpose.int: _transpose,
    _aten.t.default: _t,
    _aten.permute.default: _permute,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.squeeze.dim: _removed,
    _aten.select.int: _removed,
    _aten.slice.Tensor: _slice,
    _aten.expand.default: _expand,
    **dict.fromkeys((_aten.new_empty.default, _aten.new_zeros.default), _new),
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.slice_scatter.default: _slice_scatter,
    _aten.index.Tensor: _index,
    **dict.fromkeys((_aten.mean.dim, _aten.sum.dim_IntList, _aten.amax.default), _reduce),
    **dict.fromkeys((_aten.softmax.int, _aten._softmax.default), _along),
    **dict.fromkeys((_aten.layer_norm.default, _aten.rms_norm.default), _norm),
}  # fmt: skip


# --- partial sums ---

_LINEAR_VIEWS = frozenset(
    (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default,
     _aten.flatten.using_ints, _aten.contiguous.default, _aten.clone.default, _aten.to.dtype,
     _aten.transpose.int, _aten.permute.default, _aten.unsqueeze.default, _aten.squeeze.dim,
     _aten.slice.Tensor, _aten.index.Tensor, _aten.neg.default, _aten.sum.dim_IntList)
)  # fmt: skip


def keeps_sums(node: fx.Node, partial: fx.Node) -> bool:
    """Whether the node of partial sums, summed over the ranks, is the node of the sum.

    Args:
        partial: the input that is a partial sum; the others are the same on all ranks.
    """
    if node.target in _LINEAR_VIEWS:
        return node.args[0] is partial and partial not in node.all_input_nodes[1:]
    if node.target in (_aten.mul.Tensor, _aten.mul.Scalar):
        return node.args[0] is not node.args[1]
    if node.target in (_aten.div.Tensor, _aten.div.Scalar):
        return node.args[0] is partial and node.args[1] is not partial
    return False


def is_sum(node: fx.Node) -> bool:
    """Whether the node adds two tensors of its own shape."""
    if node.target is not _aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return False
    values = [n.meta["val"] for n in (node, *node.all_input_nodes)]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return len(tensors) == 3 and len({*sizes_of(*(t.shape for t in tensors))}) == 1
