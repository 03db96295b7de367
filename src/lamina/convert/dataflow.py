"""From a traced graph to the numbers that `cut` works on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lamina.convert.collectives import COLLECTIVES
from lamina.convert.cut import UNCARRIABLE, Dataflow
from lamina.convert.trace import Trace, qkv_of

_MANY_ROWS = 1024
"""Row count at which sizes are compared: what does not grow with T then costs next to nothing."""

_FOLD_LIMIT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Values:
    """The kinds of values in a trace (see `cut`). All lists are in topological order."""

    folded: tuple[fx.Node, ...]
    """Constants computed once, when weights are bound: those that take little memory or none."""
    unfolded: tuple[fx.Node, ...]
    """Constants computed by each stage that uses them."""
    step_constants: tuple[fx.Node, ...]
    """Computed from positions, the number of rows and the chosen logit rows."""
    rows: tuple[fx.Node, ...]
    """Value v of `flow` is `rows[v]`; the first is the token ids."""
    flow: Dataflow

    def with_constants(self, nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """`nodes` and the unfolded constants that they need, in an order of computing."""
        unfolded = set(self.unfolded)
        needed: dict[fx.Node, None] = {}
        stack = [n for node in nodes for n in node.all_input_nodes if n in unfolded]
        while stack:
            node = stack.pop()
            if node not in needed:
                needed[node] = None
                stack.extend(n for n in node.all_input_nodes if n in unfolded)
        return (*(n for n in self.unfolded if n in needed), *nodes)


def read_values(trace: Trace) -> Values:
    """Classify every node of the trace."""
    weights = set(trace.weights) | set(trace.constants)
    matrices = {n for n in weights if n.meta["val"].dim() >= 2}
    step = {trace.position_ids, trace.logit_rows}
    folded: list[fx.Node] = []
    unfolded: list[fx.Node] = []
    step_constants: list[fx.Node] = []
    rows: list[fx.Node] = [trace.input_ids]
    number = {trace.input_ids: 0}
    heavy: set[int] = set()
    for node in trace.graph.nodes:
        if node.op != "call_function":
            continue
        inputs = node.all_input_nodes
        if any(n in number for n in inputs):
            number[node] = len(rows)
            if node.target in COLLECTIVES or any(n in matrices for n in inputs):
                heavy.add(len(rows))
            rows.append(node)
        elif any(n in step for n in inputs):
            step.add(node)
            step_constants.append(node)
        else:
            weights.add(node)
            small = _is_small(node) and not any(n in unfolded for n in inputs)
            (folded if small else unfolded).append(node)
            if any(n in matrices for n in inputs):
                matrices.add(node)
    num_rows = trace.input_ids.meta["val"].shape[1].node.expr
    sizes: dict[Any, int | None] = {}
    flow = Dataflow(
        inputs=tuple(tuple(number[n] for n in row.all_input_nodes if n in number) for row in rows),
        bytes_per_token=tuple(_bytes_per_token(n.meta["val"], num_rows, sizes) for n in rows),
        heavy=frozenset(heavy),
        attention=tuple(number[a] for a in trace.attention),
        queries=tuple(number[q] for q, _, _ in map(qkv_of, trace.attention)),
        keys_values=tuple((number[k], number[v]) for _, k, v in map(qkv_of, trace.attention)),
        result=number[trace.logits],
    )
    return Values(tuple(folded), tuple(unfolded), tuple(step_constants), tuple(rows), flow)


def _is_small(constant: fx.Node) -> bool:
    """Whether keeping the value costs little: it is small, or a view of its input."""
    schema = getattr(constant.target, "_schema", None)
    if schema is None or schema.returns[0].alias_info is not None:
        return True
    value = constant.meta["val"]
    return not isinstance(value, torch.Tensor) or value.nbytes <= _FOLD_LIMIT_BYTES


def bytes_per_token(trace: Trace, node: fx.Node) -> int:
    """Size of a carried tensor, per token."""
    num_rows = trace.input_ids.meta["val"].shape[1].node.expr
    return _bytes_per_token(node.meta["val"], num_rows, {}) or 0


def _bytes_per_token(value: Any, num_rows: Any, sizes: dict[Any, int | None]) -> int | None:
    if isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool):
        return 0
    if not isinstance(value, torch.Tensor):
        return UNCARRIABLE
    key = (value.dtype, tuple(map(str, value.shape)))
    if key not in sizes:
        numel = math.prod(_at_many_rows(size, num_rows) for size in value.shape)
        sizes[key] = numel * value.dtype.itemsize // _MANY_ROWS
    return sizes[key]


def _at_many_rows(size: Any, num_rows: Any) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression.subs({s: _MANY_ROWS if s == num_rows else 1
                                for s in expression.free_symbols}))  # fmt: skip
