"""Clean-up of an exported graph: fewer nodes, no trace of the meta device, one spelling of T."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

_aten = torch.ops.aten

_CASTS = (
    _aten.to.dtype,
    _aten.to.device,
    _aten.to.dtype_layout,
    _aten.to.other,
    _aten._to_copy.default,
    _aten.type_as.default,
)
_SAME_WHEN_NOT_TRAINING = (_aten.dropout.default, _aten.alias.default, _aten.detach.default)


def simplify(graph: fx.Graph, *, num_rows_of: fx.Node) -> None:
    """Rewrite `graph` in place, without changing any value it computes.

    Args:
        num_rows_of: an input of shape [1, T]; every other way to ask for T becomes its size.
    """
    _drop_assertions(graph)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if (same := _equal_input(node)) is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
        elif node.target in _CASTS:
            _replace_cast(graph, node)
        else:
            node.args = map_aggregate(node.args, _off_meta)
            node.kwargs = map_aggregate(node.kwargs, _off_meta)
    _name_num_rows(graph, num_rows_of)
    _merge_equal(graph)
    graph.eliminate_dead_code()
    graph.lint()


def _drop_assertions(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        name = str(node.target)
        if not node.users and ("_assert" in name or "sym_constrain" in name):
            graph.erase_node(node)


def _off_meta(argument: Any) -> Any:
    return torch.device("cpu") if argument == torch.device("meta") else argument


def _equal_input(node: fx.Node) -> fx.Node | None:
    """The input that this node returns unchanged, if it does."""
    if node.target in _CASTS:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        same = source.meta["val"].dtype == node.meta["val"].dtype
        return source if same else None
    if node.target in _SAME_WHEN_NOT_TRAINING:
        assert node.target is not _aten.dropout.default or node.args[2] is False
        return node.args[0]  # type: ignore[return-value]
    if node.target is _aten.slice.Tensor:
        start = node.args[2] if len(node.args) > 2 else None
        end = node.args[3] if len(node.args) > 3 else None
        step = node.args[4] if len(node.args) > 4 else 1
        if start in (None, 0) and end in (None, 2**63 - 1) and step == 1:
            return node.args[0]  # type: ignore[return-value]
    return None


def _replace_cast(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_before(node):
        cast = graph.call_function(_aten.to.dtype, (node.args[0], node.meta["val"].dtype))
    cast.meta = dict(node.meta)
    node.replace_all_uses_with(cast)
    graph.erase_node(node)


def _name_num_rows(graph: fx.Graph, num_rows_of: fx.Node) -> None:
    rows = num_rows_of.meta["val"].shape[1]
    sizes = [n for n in graph.nodes if n.target is _aten.sym_size.int and _is(n.meta["val"], rows)]
    if not sizes:
        return
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        size = graph.call_function(_aten.sym_size.int, (num_rows_of, 1))
    size.meta = dict(sizes[0].meta)
    for node in sizes:
        node.replace_all_uses_with(size)
        graph.erase_node(node)


def _is(size: Any, rows: Any) -> bool:
    return isinstance(size, torch.SymInt) and size.node.expr == rows.node.expr


def _merge_equal(graph: fx.Graph) -> None:
    """Common subexpressions: models recompute views of the rotary tables in each layer."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is torch.ops.lamina.attention.default:
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        if (first := seen.setdefault(key, node)) is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _hashable(argument: Any) -> Any:
    if isinstance(argument, list | tuple):
        return tuple(_hashable(a) for a in argument)
    if isinstance(argument, dict):
        return tuple((k, _hashable(v)) for k, v in argument.items())
    # 1, 1.0 and True are equal keys but not equal arguments
    return (type(argument), argument)
