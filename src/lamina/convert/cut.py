"""Where to cut: the minimum of bytes carried past each attention op, and the order in a slice.

Pure graph code over integers; a *value* is the result of one node of the traced graph.

A value is of one of four kinds, which its inputs decide:

- *constant*: computed from weights alone. Never carried: every slice has its weights.
- *step constant*: computed from the step's positions (and weights), or from the number of rows.
  Never carried: computed once per step wherever slices run, from the position ids.
- *rows*: everything else. Attention i's result and what is computed from it exist only after
  attention i; its level is i. Before any attention op the level is -1.
- *heavy* rows: an op that reads a weight matrix or speaks to other ranks. It is computed once and
  never again, as early as possible: what needs no attention result runs in the shadow of the hop.

Cut i separates what is computed before attention i's result arrives from what needs it. It is a
minimum vertex cut: each value of rows is an edge in -> out whose capacity is its bytes per token;
uses are edges of infinite capacity. Sources are the token ids and all heavy values (and attention
results) of a level below i, whose inputs are known by then; the sinks are values of level i or more
and whatever the next cut carries. Cheap values between cut and sink may be computed a second time
instead of being carried. Cuts are found from the last to the first, and each looks only at what the
next slice needs: a slice's own ops, and of earlier ones only light chains such as the sums of a
residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx

UNCARRIABLE = None
"""Price of a value that cannot cross a cut, such as a tuple of tensors."""


@dataclass(frozen=True)
class Dataflow:
    """The rows part of a traced graph. Values are numbered in an order of computing.

    Constants and step constants do not appear in `inputs`.
    """

    inputs: tuple[tuple[int, ...], ...]
    """Per value: the values of rows that it is computed from; none for a step's input."""
    bytes_per_token: tuple[int | None, ...]
    heavy: frozenset[int]
    attention: tuple[int, ...]
    """The attention ops' results, in order."""
    queries: tuple[int, ...]
    keys_values: tuple[tuple[int, int], ...]
    result: int


@dataclass(frozen=True)
class SliceOrder:
    """The values that one slice computes, each part in computing order and each value once."""

    q: tuple[int, ...]
    kv: tuple[int, ...]
    deferred: tuple[int, ...]
    carried: tuple[int, ...]
    """The values that later slices use, computed here or carried on; empty for the last slice."""


class CannotCut(Exception):
    """No finite cut exists at this attention op (counting from 0)."""

    def __init__(self, index: int) -> None:
        super().__init__(f"no finite cut at attention op {index}")
        self.index = index


def cut(flow: Dataflow) -> tuple[SliceOrder, ...]:
    """One more slice than attention ops. Raises CannotCut."""
    num_cuts = len(flow.attention)
    levels = _levels(flow)
    carried: list[frozenset[int]] = [frozenset()] * (num_cuts + 1)
    needed = {flow.result}
    for i in reversed(range(num_cuts)):
        carried[i] = _minimum_cut(flow, levels, i, needed)
        needed = {flow.queries[i], *flow.keys_values[i], *carried[i]}
    return tuple(_order(flow, carried, i) for i in range(num_cuts + 1))


def _levels(flow: Dataflow) -> list[int]:
    index = {value: i for i, value in enumerate(flow.attention)}
    levels: list[int] = []
    for value, inputs in enumerate(flow.inputs):
        levels.append(index.get(value, max((levels[v] for v in inputs), default=-1)))
    return levels


def _minimum_cut(flow: Dataflow, levels: list[int], i: int, needed: set[int]) -> frozenset[int]:
    """The values of level below i that the slice after attention i gets, at least cost."""
    network = nx.DiGraph()
    network.add_nodes_from(("source", "sink"))
    stack = list(needed)
    seen = set(needed)
    attention = set(flow.attention)

    def visit(inputs: Iterable[int]) -> None:
        for value in inputs:
            if value not in seen:
                seen.add(value)
                stack.append(value)

    while stack:
        value = stack.pop()
        if value == flow.attention[i]:
            continue
        if levels[value] >= i:
            network.add_edge((value, "in"), "sink")
            visit(flow.inputs[value])
            for v in flow.inputs[value]:
                network.add_edge((v, "out"), (value, "in"))
            continue
        if value in needed:
            network.add_edge((value, "out"), "sink")
        price = flow.bytes_per_token[value]
        capacity = {} if price is UNCARRIABLE or value in attention else {"capacity": price}
        network.add_edge((value, "in"), (value, "out"), **capacity)
        if value in flow.heavy or value in attention or not flow.inputs[value]:
            network.add_edge("source", (value, "in"))
            continue
        visit(flow.inputs[value])
        for v in flow.inputs[value]:
            network.add_edge((v, "out"), (value, "in"))
    try:
        _, (_, late) = nx.minimum_cut(network, "source", "sink")
    except nx.NetworkXUnbounded:
        raise CannotCut(i) from None
    return frozenset(
        node[0]
        for node in late
        if node != "sink" and node[1] == "out" and levels[node[0]] < i
        and (node[0], "in") in network and (node[0], "in") not in late
    )  # fmt: skip


def _order(flow: Dataflow, carried: list[frozenset[int]], i: int) -> SliceOrder:
    if i == 0:
        done = {value for value, inputs in enumerate(flow.inputs) if not inputs}
    else:
        done = {*carried[i - 1], flow.attention[i - 1]}
    if i == len(flow.attention):
        return SliceOrder(q=_compute(flow, (flow.result,), done), kv=(), deferred=(), carried=())
    return SliceOrder(
        q=_compute(flow, (flow.queries[i],), done),
        kv=_compute(flow, flow.keys_values[i], done),
        deferred=_compute(flow, carried[i], done),
        carried=tuple(sorted(carried[i])),
    )


def _compute(flow: Dataflow, targets: Iterable[int], done: set[int]) -> tuple[int, ...]:
    """What must be computed for `targets`; adds it to `done`."""
    todo: list[int] = []
    stack = list(targets)
    while stack:
        value = stack.pop()
        if value not in done:
            done.add(value)
            todo.append(value)
            stack.extend(flow.inputs[value])
    return tuple(sorted(todo))
