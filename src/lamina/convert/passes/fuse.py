"""Finds the operations of `ops` in a program's graph.

A match needs only the values that it reads: nodes in between that others use stay for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from lamina.convert.passes import ops

_aten = torch.ops.aten
_SQRT_2_OVER_PI = 0.7978845608028654


def fuse(graph: fx.Graph) -> None:
    """Rewrite `graph` in place; what it computes stays the same up to rounding."""
    for match in (_rms_norm, _layer_norm, _activation, _rotary, _partial_rotary, _gated, _linear):
        _replace_all(graph, match)
    graph.eliminate_dead_code()
    _replace_all(graph, _residual)
    graph.eliminate_dead_code()
    graph.lint()


Match = tuple[Callable[..., Any], tuple[Any, ...]]


def _replace_all(graph: fx.Graph, match: Callable[[fx.Node], Match | None]) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function" or (found := match(node)) is None:
            continue
        function, arguments = found
        with graph.inserting_before(node):
            fused = graph.call_function(function, arguments)
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        graph.erase_node(node)


def _is(value: Any, *targets: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _shape(value: Any) -> tuple[str, ...] | None:
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    return tuple(map(str, tensor.shape)) if isinstance(tensor, torch.Tensor) else None


def _pairs(node: Any, *targets: Any) -> Iterator[tuple[Any, Any]]:
    """Both orders of a commutative op's operands."""
    if _is(node, *targets) and len(node.args) == 2 and not node.kwargs:
        a, b = node.args
        yield a, b
        yield b, a


def _uncast(node: Any) -> Any:
    return node.args[0] if _is(node, _aten.to.dtype) else node


def _normalized(node: Any) -> tuple[fx.Node, float] | None:
    """(x, eps) if node is x / rms(x) in float32."""
    for x, factor in _pairs(node, _aten.mul.Tensor):
        if not _is(factor, _aten.rsqrt.default) or _dtype(factor) != torch.float32:
            continue
        for mean, eps in _pairs(factor.args[0], _aten.add.Tensor):
            if not _is(mean, _aten.mean.dim) or not isinstance(eps, float):
                continue
            squares, dims, *keep = mean.args
            if dims not in ([-1], (-1,)) or keep != [True]:
                continue
            if _is(squares, _aten.pow.Tensor_Scalar) and squares.args == (x, 2):
                return x, eps
            if _is(squares, _aten.mul.Tensor) and squares.args == (x, x):
                return x, eps
    return None


def _is_vector(node: Any, like: fx.Node) -> bool:
    shape, rows = _shape(node), _shape(like)
    return shape is not None and rows is not None and shape == rows[-1:] and shape[0].isdigit()


def _rms_norm(node: Any) -> Match | None:
    for weight, scaled in _pairs(node, _aten.mul.Tensor):
        found = _normalized(_uncast(scaled))
        if found is None or not _is_vector(weight, node):
            continue
        x, eps = _uncast(found[0]), found[1]
        if _dtype(node) == _dtype(x) == _dtype(scaled) == _dtype(weight):
            return ops.rms_norm, (x, weight, eps, False)
    if _is(node, _aten.to.dtype):  # weighted in float32, rounded once
        for weight, scaled in _pairs(node.args[0], _aten.mul.Tensor):
            found = _normalized(scaled)
            if found is not None and _is_vector(weight, node):
                x, eps = _uncast(found[0]), found[1]
                if _dtype(node) == _dtype(x):
                    return ops.rms_norm, (x, _uncast(weight), eps, True)
    return None


def _layer_norm(node: Any) -> Match | None:
    if not _is(node, _aten.layer_norm.default):
        return None
    x, shape, weight, bias, eps = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
    if len(shape) != 1:
        return None
    return ops.layer_norm, (x, weight, bias, eps)


def _activation(node: Any) -> Match | None:
    if _is(node, _aten.silu.default):
        return ops.activation, (node.args[0], None, "silu")
    if _is(node, _aten.relu.default):
        return ops.activation, (node.args[0], None, "relu")
    if _is(node, _aten.gelu.default):
        kind = {"none": "gelu", "tanh": "gelu_tanh"}[node.kwargs.get("approximate", "none")]
        return ops.activation, (node.args[0], None, kind)
    return _written_out_gelu(node)


def _written_out_gelu(node: Any) -> Match | None:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    for half, one_plus in _pairs(node, _aten.mul.Tensor):
        if not (_is(half, _aten.mul.Tensor) and half.args[1] == 0.5):
            continue
        x = half.args[0]
        tanh: Any = one_plus.args[0] if _plus_one(one_plus) else None
        inner: Any = tanh.args[0] if _is(tanh, _aten.tanh.default) else None
        if not (_is(inner, _aten.mul.Tensor) and inner.args[1] == _SQRT_2_OVER_PI):
            continue
        for other, cubic in _pairs(inner.args[0], _aten.add.Tensor):
            if other is x and _is(cubic, _aten.mul.Tensor) and cubic.args[1] == 0.044715:
                cube = cubic.args[0]
                if _is(cube, _aten.pow.Tensor_Scalar) and cube.args == (x, 3.0):
                    return ops.activation, (x, None, "gelu_tanh")
    return None


def _plus_one(node: Any) -> bool:
    return _is(node, _aten.add.Tensor) and node.args[1] == 1.0


def _gated(node: Any) -> Match | None:
    for active, gate in _pairs(node, _aten.mul.Tensor):
        if _is(active, ops.activation) and active.args[1] is None and _shape(gate) == _shape(node):
            x, _, name = active.args
            if _shape(x) == _shape(node) and _dtype(gate) == _dtype(x) == _dtype(node):
                return ops.activation, (x, gate, name)
    return None


def _sliced(node: Any) -> tuple[fx.Node, int, int] | None:
    """(x, begin, end) if node is x[..., begin:end]."""
    if not _is(node, _aten.slice.Tensor) or (len(node.args) > 4 and node.args[4] != 1):
        return None
    x, dim, begin, end = (*node.args, *(0, 0, 2**63 - 1)[len(node.args) - 1 :])[:4]
    size = x.meta["val"].shape[-1]
    if dim not in (-1, len(x.meta["val"].shape) - 1) or not isinstance(end, int):
        return None
    return x, begin or 0, min(end, size)


def _rotary(node: Any) -> Match | None:
    for first, second in _pairs(node, _aten.add.Tensor):
        for x, cos in _pairs(first, _aten.mul.Tensor):
            for swapped, sin in _pairs(second, _aten.mul.Tensor):
                if _is_swapped(swapped, x) and _shape(cos) == _shape(sin):
                    shape, table = _shape(x), _shape(cos)
                    if shape and table and shape == _shape(node) and shape[-1] == table[-1]:
                        return ops.rotary, (x, cos, sin)
    return None


def _is_swapped(node: Any, x: Any) -> bool:
    """Whether node is cat((-x's second half, x's first half))."""
    if not _is(node, _aten.cat.default) or len(node.args[0]) != 2 or node.args[1:] != (-1,):
        return False
    negative, first = node.args[0]
    if not _is(negative, _aten.neg.default):
        return False
    parts = _sliced(negative.args[0]), _sliced(first)
    if parts[0] is None or parts[1] is None:
        return False
    size = parts[0][0].meta["val"].shape[-1]
    return parts == ((x, size // 2, size), (x, 0, size // 2)) and size % 2 == 0


def _partial_rotary(node: Any) -> Match | None:
    if not _is(node, _aten.cat.default) or len(node.args[0]) != 2 or node.args[1:] != (-1,):
        return None
    rotated, kept = node.args[0]
    if not _is(rotated, ops.rotary) or (rest := _sliced(kept)) is None:
        return None
    x, begin, end = rest
    whole, cos, sin = rotated.args
    width = whole.meta["val"].shape[-1]
    if end != x.meta["val"].shape[-1] or begin != width:
        return None
    if whole is x or _sliced(whole) == (x, 0, width):
        return ops.rotary, (x, cos, sin)
    return None


def _linear(node: Any) -> Match | None:
    if _is(node, _aten.linear.default):
        x, weight, bias = (*node.args, None)[:3]
        return ops.linear, (x, weight, bias, None, False)
    if _is(node, _aten.addmm.default) and not node.kwargs:
        bias, x, weight = node.args
        if _is_vector(bias, node):
            return ops.linear, (x, weight, bias, None, True)
    if _is(node, _aten.mm.default):
        return ops.linear, (*node.args, None, None, True)
    return None


def _residual(node: Any) -> Match | None:
    for residual, linear in _pairs(node, _aten.add.Tensor):
        if (
            _is(linear, ops.linear)
            and linear.args[3] is None
            and len(linear.users) == 1
            and _shape(residual) == _shape(linear) == _shape(node)
            and _dtype(residual) == _dtype(linear)
        ):
            x, weight, bias, _, is_transposed = linear.args
            return ops.linear, (x, weight, bias, residual, is_transposed)
    return None
