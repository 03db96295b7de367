"""The last slice works only on the rows whose logits are wanted.

Models choose rows right before the last linear. Operations on rows give the same when the rows of
their inputs are chosen instead, so that a long prompt's rows skip the last layer's linears.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lamina.convert.collectives import ALL_REDUCE
from lamina.convert.passes import ops

_ROW_WISE = (ops.linear, ops.rms_norm, ops.layer_norm, ops.activation,
             torch.ops.aten.add.Tensor, ALL_REDUCE)  # fmt: skip
_index = torch.ops.aten.index.Tensor


def select_rows_early(graph: fx.Graph) -> None:
    """Move the choice of rows, `x[:, rows]`, up through operations that nobody else needs."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is _index and _chooses_rows(node):
            _move_up(graph, node)
    graph.eliminate_dead_code()
    graph.lint()


def _chooses_rows(node: Any) -> bool:
    x, indices = node.args
    return len(indices) == 2 and indices[0] is None and _is_rows(x)


def _is_rows(node: Any) -> bool:
    """Whether it is a tensor [1, rows, elements]."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() != 3:
        return False
    sizes: list[Any] = list(value.shape)
    return [isinstance(size, int) for size in sizes] == [True, False, True]


def _is_row_wise(node: fx.Node) -> bool:
    """Whether each row of the result comes from the same rows of the inputs, or from weights."""
    return node.target in _ROW_WISE and _is_rows(node) and all(
        _is_rows(n) or all(isinstance(size, int) for size in n.meta["val"].shape)
        for n in node.all_input_nodes
    )  # fmt: skip


def _move_up(graph: fx.Graph, index: Any) -> None:
    x, (_, rows) = index.args
    moved: dict[fx.Node, None] = {}
    for node in reversed(list(graph.nodes)):
        is_only_for_index = all(user is index or user in moved for user in node.users)
        if is_only_for_index and _is_row_wise(node):
            moved[node] = None
    if x not in moved:
        return
    num_rows = index.meta["val"].shape[1]
    chosen: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(index):
        for node in reversed(list(moved)):
            for source in node.all_input_nodes:
                if source not in moved and source not in chosen and _is_rows(source):
                    chosen[source] = graph.call_function(_index, (source, [None, rows]))
                    chosen[source].meta = {"val": _with_rows(source, num_rows)}
            copy = graph.node_copy(node, lambda n: chosen.get(n, n))
            copy.meta = {"val": _with_rows(node, num_rows)}
            chosen[node] = copy
    index.replace_all_uses_with(chosen[x])
    graph.erase_node(index)


def _with_rows(node: fx.Node, num_rows: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value.new_empty((value.shape[0], num_rows, value.shape[2]))
