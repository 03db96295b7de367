"""Rewrites of exported graphs: same values, fewer and purer ops; rows kept apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from lamina.convert.functional import make_functional
from lamina.convert.graph import simplify
from lamina.convert.independence import find_row_mixing

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Module(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.function(x, y)


def _export(function: Function) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("rows", min=2)
    x, y = torch.zeros(1, 7, 4), torch.zeros(1, 7, 4)
    return torch.export.export(
        _Module(function), (x, y), dynamic_shapes=({1: rows}, {1: rows}), strict=False
    )


def _run(graph: fx.Graph, *inputs: torch.Tensor) -> torch.Tensor:
    (result,) = fx.GraphModule(nn.Module(), graph)(*inputs)
    return result


def _divide(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x + 1
    total = z.sum(-1, keepdim=True)
    z /= total
    return z * y


def _fill_parts(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x.new_empty(1, x.shape[1], 8)
    z[..., :4] = x
    z[..., 4:] = y
    return z.transpose(1, 2)


def _scatter(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    chosen = x.topk(2).indices
    mask = torch.zeros_like(x)
    mask.scatter_(-1, chosen, 1.0)
    return mask * y


@pytest.mark.parametrize("function", [_divide, _fill_parts, _scatter])
def test_in_place_ops_become_functional(function: Function) -> None:
    graph = _export(function).graph
    assert make_functional(graph)
    assert not any(getattr(n.target, "_schema", None) and n.target._schema.is_mutable
                   for n in graph.nodes)  # fmt: skip
    x, y = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    torch.testing.assert_close(_run(graph, x, y), function(x.clone(), y), rtol=0, atol=0)


def _through_a_view(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x + 1
    flat = z.view(-1)
    flat += 1
    return z * y


def _with_a_live_view(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x + 1
    flat = z.view(-1)
    z *= 2
    return flat.sum() + y


@pytest.mark.parametrize("function", [_through_a_view, _with_a_live_view])
def test_aliased_in_place_ops_are_left_for_retracing(function: Function) -> None:
    program = _export(function)
    assert not make_functional(program.graph)
    x, y = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    torch.testing.assert_close(_run(program.graph, x.clone(), y), function(x.clone(), y))


def test_simplify_drops_what_does_nothing() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(x.to(torch.float32), training=False)[:, :, 0:]
        return x.view(1, x.shape[1], 2, 2).sum(-1) + y.view(1, y.shape[1], 2, 2).sum(-1)

    graph = _export(function).graph
    simplify(graph, num_rows_of=next(iter(graph.nodes)))
    ops = [n.target.__name__ for n in graph.nodes if n.op == "call_function"]
    assert sorted(ops) == ["add.Tensor", "sum.dim_IntList", "sum.dim_IntList", "sym_size.int",
                           "view.default", "view.default"]  # fmt: skip
    x, y = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    torch.testing.assert_close(_run(graph, x, y), function(x, y))


def test_simplify_merges_equal_ops_but_not_equal_numbers_of_other_types() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ints = torch.full_like(y, 2, dtype=torch.int64)
        return x.exp() + x.exp() + (ints * 1) + (ints * 1.0)

    graph = _export(function).graph
    simplify(graph, num_rows_of=next(iter(graph.nodes)))
    ops = [n.target.__name__ for n in graph.nodes if n.op == "call_function"]
    assert ops.count("exp.default") == 1
    assert ops.count("mul.Tensor") == 2


@pytest.mark.parametrize(
    ("mixes", "function"),
    [
        (False, lambda x, y: (x @ torch.ones(4, 4)).softmax(-1) + y.cumsum(2)),
        (False, lambda x, y: x.view(-1, 2, 2).flip(1).sum(-1).topk(1).values),
        (True, lambda x, y: x.cumsum(1)),
        (True, lambda x, y: x.softmax(dim=1)),
        (True, lambda x, y: x.flip(1)),
        (True, lambda x, y: x.roll(1, 1)),
        (True, lambda x, y: x.sort(1).values),
        (True, lambda x, y: x - x.mean(1, keepdim=True)),
        (True, lambda x, y: x + nn.functional.pad(y, (0, 0, 1, 0))[:, :-1]),
        (True, lambda x, y: (x @ y.transpose(1, 2)).softmax(-1) @ y),
        (True, lambda x, y: nn.functional.conv1d(x.transpose(1, 2), torch.ones(4, 4, 3),
                                                 padding=1)),
    ],
)  # fmt: skip
def test_rows_that_meet_are_found(mixes: bool, function: Function) -> None:
    graph = _export(function).graph
    x, y = (n for n in graph.nodes if n.op == "placeholder" and n.name in ("x", "y"))
    graph.eliminate_dead_code()
    nothing = fx.Graph().placeholder("logit_rows")
    assert (find_row_mixing(graph, (x, y), nothing) is not None) == mixes
