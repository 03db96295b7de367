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

_ALONG_A_DIMENSION = {"cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "flip", "roll",
                      "sort", "argsort", "topk", "softmax", "_softmax", "log_softmax",
                      "_log_softmax"}  # fmt: skip
"""Ops that can keep a tensor's shape while they work along the dimension they name."""

_CONVOLUTIONS = {"conv1d", "conv2d", "convolution"}

_TRIANGLES = {"tril", "triu"}


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
                    f"{module_of(node)} mixes tokens outside of attention ({what})",
                    _layer_of(node),
                )
    return None


def _keeps_rows(node: fx.Node, rows: Any) -> bool:
    value = node.meta["val"]
    if isinstance(value, list | tuple):
        return all(_keeps_row_dim(node, v, rows) for v in value)
    return _keeps_row_dim(node, value, rows)


def _keeps_row_dim(node: fx.Node, value: Any, rows: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return True
    dim = _row_dims(value, rows)
    return dim is not None and dim not in _dims_worked_along(node, value.dim())


def _dims_worked_along(node: fx.Node, num_dims: int) -> set[int]:
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[1] if schema is not None else ""
    if name in _CONVOLUTIONS:
        return set(range(num_dims))
    if name in _TRIANGLES:
        return {num_dims - 2, num_dims - 1}
    if schema is None or name not in _ALONG_A_DIMENSION:
        return set()
    for index, argument in enumerate(schema.arguments):
        if argument.name in ("dim", "dims"):
            given = node.args[index] if index < len(node.args) else None
            dims: Any = node.kwargs.get(argument.name, given)
            dims = argument.default_value if dims is None else dims
            return {d % num_dims for d in (dims if isinstance(dims, list | tuple) else [dims])}
    return set(range(num_dims))


def _row_dims(value: torch.Tensor, rows: Any) -> int | None:
    """The one dimension that counts rows, or None if there is not exactly one."""
    found = None
    sizes: Any = value.shape
    for dim, size in enumerate(sizes):
        if isinstance(size, torch.SymInt):
            if found is not None or not (size.node.expr / rows).is_number:
                return None
            found = dim
    return found


def module_of(node: fx.Node) -> str:
    """The path of the innermost module of the transformers model that a node comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    inner = next((p for p in reversed(paths) if p and not p.startswith("_")), "")
    return inner.removeprefix("model.") or "the model"


def _layer_of(node: fx.Node) -> int | None:
    match = re.search(r"\.(\d+)(\.|$)", module_of(node))
    return int(match.group(1)) if match else None
