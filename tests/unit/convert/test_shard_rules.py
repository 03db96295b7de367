"""Every rule: the op on the parts of its inputs gives the part of its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.fx.node import map_arg

from lamina.convert.experts import expert_linear
from lamina.convert.passes.shard_rules import (
    arguments_for,
    inputs_for,
    is_sum,
    keeps_sums,
    source_of_slice,
)
from lamina.convert.shard import Shard, run

aten = torch.ops.aten
X, Y = torch.randn(2, 4, 6, generator=torch.manual_seed(0)), torch.randn(2, 4, 6)
ROW, WEIGHT, BIAS = torch.randn(6), torch.randn(8, 6), torch.randn(8)
EXPERTS = torch.randn(3, 8, 6)
ROUTES = torch.tensor([2, 0, 0, 1])


def _node(target: Any, args: tuple[Any, ...]) -> tuple[fx.Node, dict[fx.Node, torch.Tensor]]:
    """The op in a graph of its own, and the values of its inputs."""
    graph = fx.Graph()
    values: dict[fx.Node, torch.Tensor] = {}

    def placeholder(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            made = graph.placeholder(f"x{len(values)}")
            made.meta["val"] = value
            values[made] = value
            return made
        return [placeholder(v) for v in value] if isinstance(value, list) else value

    node = graph.call_function(target, tuple(placeholder(a) for a in args))
    node.meta["val"] = target(*args)
    return node, values


def _compute(node: fx.Node, values: dict[fx.Node, torch.Tensor], shard: Shard) -> torch.Tensor:
    inputs = inputs_for(node, shard)
    assert inputs is not None
    parts = {n: values[n] if part is None else part.of(values[n]) for n, part in inputs.items()}
    if source_of_slice(node, shard) is not None:
        (part,) = parts.values()
        return part
    target, args = arguments_for(node, shard)
    result: torch.Tensor = target(*map_arg(args, parts.__getitem__))
    return result


ODD = np.array([1, 3])


@pytest.mark.parametrize(
    ("target", "args", "shard"),
    [
        (aten.mul.Tensor, (X, Y), Shard(1, ODD)),
        (aten.add.Tensor, (X, ROW), run(2, 2, 5)),
        (aten.mul.Tensor, (X, X[..., :1]), run(2, 2, 5)),
        (aten.silu.default, (X,), Shard(1, ODD)),
        (aten.clamp.default, (X, -0.5, 0.5), run(0, 1, 2)),
        (aten.view.default, (X, [8, 6]), run(1, 2, 4)),
        (aten.reshape.default, (X, [2, 24]), run(1, 6, 12)),
        (aten.view.default, (X, [2, -1, 3, 2]), Shard(2, np.array([0, 2]))),
        (aten.flatten.using_ints, (X, 1, 2), run(1, 6, 18)),
        (aten.contiguous.default, (X,), run(1, 1, 3)),
        (aten.to.dtype, (X, torch.float64), run(1, 1, 3)),
        (aten.transpose.int, (X, 1, 2), run(1, 1, 3)),
        (aten.t.default, (WEIGHT,), run(1, 1, 3)),
        (aten.permute.default, (X, [2, 0, 1]), run(0, 1, 3)),
        (aten.unsqueeze.default, (X, 1), run(2, 1, 3)),
        (aten.unsqueeze.default, (X, -1), run(2, 1, 3)),
        (aten.squeeze.dim, (X[:1], 0), run(0, 1, 3)),
        (aten.select.int, (X, 1, 2), run(1, 1, 3)),
        (aten.slice.Tensor, (X, 2, 1, 6, 2), Shard(2, np.array([0, 2]))),
        (aten.slice.Tensor, (X, 2, -4, 2**63 - 1), run(2, 1, 3)),
        (aten.slice.Tensor, (X, 2, 0, 4), run(1, 1, 3)),
        (aten.expand.default, (X[:, :1], [-1, 4, -1]), run(1, 1, 3)),
        (aten.expand.default, (X[:1], [2, 4, 6]), run(2, 1, 3)),
        (aten.new_zeros.default, (X, [2, 4, 9]), run(1, 1, 3)),
        (aten.cat.default, ([X, Y], 2), run(1, 1, 3)),
        (aten.cat.default, ([X, Y], -1), run(2, 4, 9)),
        (aten.cat.default, ([X, Y], -1), run(2, 7, 9)),
        (aten.stack.default, ([X, Y], -1), run(1, 1, 3)),
        (aten.stack.default, ([X, Y], 1), run(2, 1, 3)),
        (aten.slice_scatter.default, (X, Y[..., :2], 2, 1, 3), run(1, 1, 3)),
        (aten.index.Tensor, (X, [None, torch.tensor([3, 0])]), run(2, 1, 3)),
        (aten.mean.dim, (X, [-1], True), run(1, 1, 3)),
        (aten.sum.dim_IntList, (X, [0]), run(0, 1, 3)),
        (aten.softmax.int, (X, -1), run(1, 1, 3)),
        (aten.layer_norm.default, (X, [6], ROW, ROW), run(1, 1, 3)),
        (aten.linear.default, (X, WEIGHT, BIAS), Shard(2, np.array([0, 3, 4]))),
        (aten.linear.default, (X, WEIGHT, BIAS), run(1, 1, 3)),
        (aten.addmm.default, (BIAS, X[0], WEIGHT.T), run(1, 2, 5)),
        (expert_linear._opoverload, (X[0], EXPERTS, None, ROUTES, False), run(1, 2, 5)),
        (
            expert_linear._opoverload,
            (X[0], EXPERTS.mT.contiguous(), torch.ones(3, 8), ROUTES, True),
            run(1, 2, 5),
        ),
    ],
)
def test_parts_make_a_part(target: Any, args: tuple[Any, ...], shard: Shard) -> None:
    node, values = _node(target, args)
    got = _compute(node, values, shard)
    torch.testing.assert_close(got, shard.of(node.meta["val"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "args", "shard"),
    [
        (aten.mean.dim, (X, [-1], True), run(2, 0, 1)),
        (aten.softmax.int, (X, -1), run(2, 1, 3)),
        (aten.layer_norm.default, (X, [6]), run(2, 1, 3)),
        (aten.view.default, (X, [2, 24]), run(1, 4, 12)),
        (aten.cumsum.default, (X, 1), run(2, 1, 3)),
        (aten.slice_scatter.default, (X, Y[..., :2], 2, 1, 3), run(2, 1, 3)),
    ],
)
def test_what_works_along_the_dimension_or_is_unknown_is_computed_whole(
    target: Any, args: tuple[Any, ...], shard: Shard
) -> None:
    node, _ = _node(target, args)
    assert inputs_for(node, shard) is None


LETS_THROUGH: list[tuple[Any, Callable[[torch.Tensor], tuple[Any, ...]]]] = [
    (aten.mul.Tensor, lambda x: (x, Y)),
    (aten.mul.Tensor, lambda x: (0.5, x)),
    (aten.div.Tensor, lambda x: (x, 3.0)),
    (aten.neg.default, lambda x: (x,)),
    (aten.sum.dim_IntList, lambda x: (x, [1])),
    (aten.view.default, lambda x: (x, [8, 6])),
    (aten.index.Tensor, lambda x: (x, [None, torch.tensor([3, 0])])),
]


@pytest.mark.parametrize(("target", "args"), LETS_THROUGH)
def test_sums_pass_through(target: Any, args: Callable[[torch.Tensor], tuple[Any, ...]]) -> None:
    node, values = _node(target, args(X))
    partial = next(n for n, value in values.items() if value is X)
    assert keeps_sums(node, partial)
    total = target(*args(X + Y))
    torch.testing.assert_close(target(*args(X)) + target(*args(Y)), total)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.silu.default, (X,)),
        (aten.add.Tensor, (X, 1.0)),
        (aten.div.Tensor, (Y, X)),
        (aten.pow.Tensor_Scalar, (X, 2)),
        (nn.functional.gelu, (X,)),
    ],
)
def test_other_ops_need_the_sum(target: Any, args: tuple[Any, ...]) -> None:
    node, values = _node(target, args)
    assert not keeps_sums(node, next(n for n, value in values.items() if value is X))


def test_only_sums_of_equal_shapes_are_sums() -> None:
    assert is_sum(_node(aten.add.Tensor, (X, Y))[0])
    assert not is_sum(_node(aten.add.Tensor, (X, ROW))[0])
    assert not is_sum(_node(aten.add.Tensor, (X, 1.0))[0])
