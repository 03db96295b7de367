"""Stages of equal structure share a program; unequal ones do not."""

from __future__ import annotations

import torch
from torch import fx

from lamina.convert.program import ProgramTable, evaluate

_mul, _add = torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor


class _Graph:
    def __init__(self) -> None:
        self.graph = fx.Graph()

    def placeholder(self, name: str, size: int = 2) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.zeros(1, size)
        return node

    def call(self, function: object, *args: object, size: int = 2) -> fx.Node:
        node = self.graph.call_function(function, args)  # type: ignore[arg-type]
        node.meta["val"] = torch.zeros(1, size)
        return node


def test_the_same_ops_on_other_weights_share_a_program() -> None:
    g = _Graph()
    x, w1, w2 = (g.placeholder(n) for n in ("x", "w1", "w2"))
    table = ProgramTable((w1, w2))
    a = g.call(_mul, x, w1)
    b = g.call(_mul, x, w2)
    first, second = table.stage((a,), (a,)), table.stage((b,), (b,))
    assert first.program is second.program
    assert len(table) == 1
    assert (first.values, first.weights) == ((x,), (w1,))
    assert (second.values, second.weights) == ((x,), (w2,))
    (result,) = first.program.run(torch.tensor([[2.0, 3.0]]), torch.tensor([[5.0, 7.0]]))
    assert result.tolist() == [[10.0, 21.0]]


def test_other_constants_shapes_wiring_or_outputs_are_other_programs() -> None:
    g = _Graph()
    x, y, wide = g.placeholder("x"), g.placeholder("y"), g.placeholder("wide", size=3)
    table = ProgramTable(())
    sums = [
        g.call(_add, x, 1),
        g.call(_add, x, 1.0),
        g.call(_add, x, 2),
        g.call(_add, wide, 1, size=3),
        g.call(_add, x, x),
        g.call(_add, x, y),
    ]
    for node in sums:
        table.stage((node,), (node,))
    assert len(table) == len(sums)
    last = sums[-1]
    table.stage((last,), (last, last))
    assert len(table) == len(sums) + 1


def test_outputs_may_be_values_that_come_from_outside() -> None:
    g = _Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    total = g.call(_add, x, x)
    stage = ProgramTable(()).stage((total,), (y, total))
    assert stage.values == (x, y)
    outputs = stage.program.run(torch.tensor([1.0]), torch.tensor([9.0]))
    assert [o.item() for o in outputs] == [9.0, 2.0]


def test_evaluate_computes_in_order() -> None:
    g = _Graph()
    w = g.placeholder("w")
    doubled = g.call(_add, w, w)
    squared = g.call(_mul, doubled, doubled)
    known = {w: torch.tensor([3.0])}
    evaluate((doubled, squared), known)
    assert known[squared].item() == 36.0
