"""Stages of slices as programs: equal structure, one program; weights are its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg


@dataclass(frozen=True)
class Program:
    """`run(*values, *weights)` computes a stage and returns a tuple of its outputs.

    Shapes are those of the trace: batch dimension 1, any number of rows.
    """

    run: Callable[..., tuple[Any, ...]]
    module: fx.GraphModule
    """The same computation as a graph, for passes that compile it."""
    num_ops: int


@dataclass(frozen=True)
class Stage:
    """A program with the nodes of the trace that its arguments and outputs stand for here."""

    program: Program
    nodes: tuple[fx.Node, ...]
    values: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


class ProgramTable:
    """Builds stages; stages of equal structure get the same Program object."""

    def __init__(self, weights: Iterable[fx.Node]) -> None:
        """`weights`: the nodes that are bound once, not passed from stage to stage."""
        self._weights = frozenset(weights)
        self._programs: dict[Any, Program] = {}

    def __len__(self) -> int:
        """Number of distinct programs."""
        return len(self._programs)

    def stage(self, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Stage:
        """The stage that computes `nodes` (topological order) and hands out `outputs`."""
        inside = set(nodes)
        read = (n for node in nodes for n in node.all_input_nodes)
        outside = dict.fromkeys(n for n in (*read, *outputs) if n not in inside)
        values = tuple(n for n in outside if n not in self._weights)
        weights = tuple(n for n in outside if n in self._weights)
        key = _structure(nodes, (*values, *weights), outputs)
        if (program := self._programs.get(key)) is None:
            program = _build(nodes, (*values, *weights), outputs)
            self._programs[key] = program
        return Stage(program, tuple(nodes), values, weights, tuple(outputs))


def _structure(
    nodes: Sequence[fx.Node], arguments: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> Any:
    """A key that is equal exactly for stages that one program can run."""
    number = {node: i for i, node in enumerate((*arguments, *nodes))}

    def freeze(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return ("value", number[argument])
        if isinstance(argument, list | tuple):
            return tuple(freeze(a) for a in argument)
        # 1, 1.0 and True are equal keys but not equal arguments
        return (type(argument).__name__, argument)

    return (
        tuple(_form(node.meta["val"]) for node in arguments),
        tuple(
            (node.target, freeze(node.args), tuple((k, freeze(v)) for k, v in node.kwargs.items()))
            for node in nodes
        ),
        tuple(number[node] for node in outputs),
    )


def _form(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(map(str, value.shape)))
    return type(value).__name__


def _build(
    nodes: Sequence[fx.Node], arguments: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> Program:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(arguments):
        copies[node] = graph.placeholder(f"arg_{i}")
        copies[node].meta = {"val": node.meta["val"]}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {"val": node.meta["val"]}
    graph.output(tuple(copies[node] for node in outputs))
    module = fx.GraphModule(torch.nn.Module(), graph)
    return Program(run=module.forward, module=module, num_ops=len(nodes))


def evaluate(nodes: Sequence[fx.Node], known: dict[fx.Node, torch.Tensor]) -> None:
    """Compute `nodes` (topological order) from `known` and add their values to it."""
    for node in nodes:
        args = map_arg(node.args, known.__getitem__)
        kwargs = map_arg(node.kwargs, known.__getitem__)
        known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
