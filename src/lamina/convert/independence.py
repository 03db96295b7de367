"""Do rows meet anywhere but in attention? A check on the shapes and ops of a traced graph.

Slices run over rows of many sequences at once, so everything outside `lamina::attention` must treat
each row by itself. The check is structural: a tensor computed from the rows must keep the row
dimension (or a fixed multiple of it) exactly once, and no op may work along it. Recurrences,
convolutions and reductions over tokens all break one of these.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten

_MIXING = {"cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "flip", "roll", "sort",
           "argsort", "diff", "conv1d", "conv2d", "convolution", "tril", "triu", "topk",
           "softmax", "_softmax", "log_softmax"}  # fmt: skip
"""Ops that keep a tensor's shape, or nearly, while they work along one dimension."""


@dataclass(frozen=True)
class RowMixing:
    reason: str
    layer: int | None


def find_row_mixing(
    graph: fx.Graph, row_inputs: tuple[fx.Node, ...], logit_rows: fx.Node
) -> RowMixing | None:
    """The first op in which rows may meet, or None. Ops on chosen rows (logits) are exempt."""
    rows = row_inputs[0].meta["val"].shape[1].node.expr
    depends = set(row_inputs)
    chosen = {logit_rows}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if any(n in chosen for n in node.all_input_nodes):
            chosen.add(node)
        elif node.target is torch.ops.lamina.attention.default:
            depends.add(node)
        elif any(n in depends for n in node.all_input_nodes):
            depends.add(node)
            if not _keeps_rows(node, rows):
                what = str(getattr(node.target, "__name__", node.target)).split(".")[0]
                return RowMixing(
                    f"{_module_of(node)} mixes tokens outside of attention ({what})",
                    _layer_of(node),
                )
    return None


def _keeps_rows(node: fx.Node, rows: Any) -> bool:
    value = node.meta["val"]
    if isinstance(value, list | tuple):
        return all(_row_dims(v, rows) is not None for v in value if isinstance(v, torch.Tensor))
    if not isinstance(value, torch.Tensor):
        return True
    dim = _row_dims(value, rows)
    if dim is None:
        return False
    name = str(node.target).split(".")[1] if "." in str(node.target) else ""
    if name not in _MIXING:
        return True
    along = node.args[2 if name == "topk" else 1] if len(node.args) > 1 else -1
    if name == "topk" and len(node.args) < 3:
        along = -1
    return isinstance(along, int) and along % value.dim() != dim and "conv" not in name


def _row_dims(value: torch.Tensor, rows: Any) -> int | None:
    """The one dimension that counts rows, or None if there is not exactly one."""
    found = None
    for dim, size in enumerate(value.shape):
        if not isinstance(size, torch.SymInt):
            continue
        expression = size.node.expr
        if not (expression / rows).is_number or found is not None:
            return None
        found = dim
    return found


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next((p for p, _ in reversed(stack.values()) if p), "the model")
    return str(path).removeprefix("model.")


def _layer_of(node: fx.Node) -> int | None:
    match = re.search(r"\.(\d+)(\.|$)", _module_of(node))
    return int(match.group(1)) if match else None
