"""In-place ops of an exported graph -> ops that return new tensors.

The cut needs a graph in which every value is made once. torch.export's own functionalization
retraces the whole graph and takes longer than the export; the few patterns that model code uses are
rewritten here in one pass, and what is left is reported so that the caller can retrace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


def make_functional(graph: fx.Graph) -> bool:
    """Rewrite in place. False if some op could not be rewritten; the graph is then still valid."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _mutates(node):
            continue
        target = node.args[0]
        assert isinstance(target, fx.Node)
        if (made := _as_slice_scatter(graph, node, order)) is not None:
            changed = target.args[0]
        elif (made := _as_functional(graph, node, order)) is not None:
            changed = target
        else:
            return False
        assert isinstance(changed, fx.Node)
        _replace_later_uses(changed, made, order)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        if changed is not target and not target.users:
            graph.erase_node(target)
    return True


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _as_functional(graph: fx.Graph, node: fx.Node, order: dict[fx.Node, int]) -> fx.Node | None:
    """`x.op_(...)` as `op(x, ...)`."""
    target = node.args[0]
    assert isinstance(target, fx.Node)
    packet, overload = str(node.target).split(".")[1:3]
    function = getattr(getattr(_aten, packet.removesuffix("_"), None), overload, None)
    dtype = target.meta["val"].dtype
    operands = [n.meta["val"] for n in node.all_input_nodes[1:]]
    promotes = any(
        isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != dtype
        for x in operands
    )  # fmt: skip
    if not packet.endswith("_") or function is None or promotes or not _owns(target, node, order):
        return None
    return _insert(graph, node, function, node.args, node.kwargs, order)


def _as_slice_scatter(graph: fx.Graph, node: fx.Node, order: dict[fx.Node, int]) -> fx.Node | None:
    """`x[..., a:b].copy_(y)` as `slice_scatter(x, y, ...)`."""
    if node.target is not _aten.copy_.default:
        return None
    part, source = node.args[:2]
    assert isinstance(part, fx.Node)
    assert isinstance(source, fx.Node)
    if part.target is not _aten.slice.Tensor or len(part.users) != 1:
        return None
    whole = part.args[0]
    assert isinstance(whole, fx.Node)
    a, b = part.meta["val"], source.meta["val"]
    if a.dtype != b.dtype or a.shape != b.shape or not _owns(whole, part, order):
        return None
    made = _insert(
        graph, node, _aten.slice_scatter.default, (whole, source, *part.args[1:]), {}, order
    )
    made.meta = dict(whole.meta)
    return made


def _owns(value: fx.Node, until: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether `value` is memory of its own that no other value made before `until` shares."""
    if value.op == "placeholder" or _is_view(value):
        return False
    return not any(_is_view(user) and order[user] < order[until] for user in value.users)


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        source = node.args[0]
        return isinstance(source, fx.Node) and _is_view(source)
    return any(r.alias_info is not None for r in schema.returns) and not schema.is_mutable


def _insert(
    graph: fx.Graph,
    before: fx.Node,
    function: Any,
    args: Any,
    kwargs: Any,
    order: dict[fx.Node, int],
) -> fx.Node:
    with graph.inserting_before(before):
        made = graph.call_function(function, args, kwargs)
    made.meta = dict(before.meta)
    order[made] = order[before]
    return made


def _replace_later_uses(value: fx.Node, made: fx.Node, order: dict[fx.Node, int]) -> None:
    value.replace_all_uses_with(made, lambda user: order[user] > order[made])
