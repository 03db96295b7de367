"""Which values of a graph a tensor-parallel rank computes whole, and which in part.

Attention ops are given: a rank has its heads of q, k, v and the output. From the logits back to
the inputs every value is then asked for by its users, whole or in part, and asks its own inputs:

- a value of which all users want parts is computed in part, if its op can (`shard_rules`); a linear
  does with a part of its outputs (a *column* shard of its weights);
- a linear of which all is wanted may instead sum over a part of its input (a *row* shard) if that
  input comes from column shards and attention alone, through ops that work in parts, and nobody
  else uses anything in between. The result is a partial sum;
- experts are linears; where that fails for them, a chain of experts' linears can be divided by
  experts, which again gives a partial sum;
- everything else is computed whole by every rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from lamina.attention.partition import head_units, kv_head_range, query_head_range
from lamina.attention.spec import AttentionSpec
from lamina.convert.collectives import TensorParallel
from lamina.convert.passes.shard_rules import Inputs, Linear, Wanted, inputs_for, linear_of
from lamina.convert.shard import Shard, bounds, merged, run
from lamina.convert.trace import Trace, qkv_of


@dataclass
class ShardPlan:
    """What one rank does with each node."""

    parts: dict[fx.Node, Shard] = field(default_factory=dict)
    """Values that the rank has in part; of the others it has all."""
    rows: dict[fx.Node, Shard] = field(default_factory=dict)
    """Row-sharded linears, whose results are partial sums, and their part of the input."""
    divided: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    """Experts' linears divided by experts, and the rank's experts. Rows of others are zeros."""
    sums: set[fx.Node] = field(default_factory=set)
    """Linears whose results are partial sums: all of `rows` and some of `divided`."""
    wanted: dict[fx.Node, list[Wanted]] = field(default_factory=dict)
    """What the users of each value want of it; values that are not in it are not needed."""


@dataclass(frozen=True)
class Heads:
    """The rank's heads of one attention op."""

    query: tuple[int, int]
    kv: tuple[int, int]


def heads_of(
    spec: AttentionSpec, specs: Sequence[AttentionSpec], parallel: TensorParallel
) -> Heads:
    """Contiguous, by head units (see `attention.partition`)."""
    units = head_units(specs)
    start, stop = bounds(units, parallel.rank, parallel.size)
    return Heads(
        query_head_range(spec, start, stop, units), kv_head_range(spec, start, stop, units)
    )


def attention_inputs(node: fx.Node, heads: Heads) -> Inputs:
    """What an attention op needs for some of its heads."""
    q, k, v = qkv_of(node)
    inputs: Inputs = {q: run(1, *heads.query), k: run(1, *heads.kv), v: run(1, *heads.kv)}
    sinks = node.args[7]
    if isinstance(sinks, fx.Node):
        inputs[sinks] = run(0, *heads.query)
    return inputs


def make_plan(trace: Trace, heads: dict[fx.Node, Heads], parallel: TensorParallel) -> ShardPlan:
    """Decide for every node of the trace.

    Args:
        heads: of every attention op.
    """
    return _Planner(trace, heads, parallel).run()


class _Planner:
    def __init__(self, trace: Trace, heads: dict[fx.Node, Heads], parallel: TensorParallel) -> None:
        self._nodes = list(trace.graph.nodes)
        self._order = {node: i for i, node in enumerate(self._nodes)}
        self._logits = trace.logits
        self._heads = heads
        self._parallel = parallel
        self._constant = _constants(
            self._nodes, (trace.input_ids, trace.position_ids, trace.logit_rows)
        )
        self._plan = ShardPlan()

    def run(self) -> ShardPlan:
        for node in reversed(self._nodes):
            if node.op == "output":
                vocabulary = self._share(self._logits, -1)
                in_parts = vocabulary and self._comes_in_parts(self._logits, vocabulary, node)
                self._want({self._logits: vocabulary if in_parts else None})
            elif node.op == "call_function" and node in self._plan.wanted:
                self._want(self._decide(node))
        return self._plan

    def _want(self, inputs: Inputs) -> None:
        for node, wanted in inputs.items():
            self._plan.wanted.setdefault(node, []).append(wanted)

    def _decide(self, node: fx.Node) -> Inputs:
        """Record what happens to the node, and return what it needs."""
        plan = self._plan
        if node in self._heads:
            plan.parts[node] = run(1, *self._heads[node].query)
            return attention_inputs(node, self._heads[node])
        part = merged(plan.wanted.get(node, ()))
        if part is not None and (inputs := inputs_for(node, part)) is not None:
            plan.parts[node] = part
            return inputs
        linear = linear_of(node)
        if linear is None or linear.weight not in self._constant:
            return dict.fromkeys(node.all_input_nodes)
        whole: Inputs = dict.fromkeys(node.all_input_nodes)
        if node not in plan.divided and linear.x not in self._constant:
            share = self._share(linear.x, -1)
            if share is not None and self._comes_in_parts(linear.x, share, node):
                plan.rows[node] = share
                plan.sums.add(node)
                return {**whole, linear.x: share, linear.weight: share.on(linear.in_dim)}
            if linear.experts is not None:
                self._divide_experts(node, linear)
        if node in plan.divided:
            mine = run(0, *plan.divided[node])
            return {**whole, linear.weight: mine} | ({linear.bias: mine} if linear.bias else {})
        return whole

    def _share(self, node: fx.Node, dim: int) -> Shard | None:
        """The rank's share of a dimension; None if there is not something for every rank."""
        value: torch.Tensor = node.meta["val"]
        size = value.shape[dim]
        if not isinstance(size, int) or size < self._parallel.size:
            return None
        return run(dim % value.dim(), *bounds(size, self._parallel.rank, self._parallel.size))

    def _comes_in_parts(self, value: fx.Node, part: Shard, user: fx.Node) -> bool:
        """Whether `part` of `value` can be computed from parts of linears and attention alone."""
        wanted: dict[fx.Node, list[Wanted]] = {value: [part]}
        inside = {user}
        queue = [-self._order[value]]
        queued = {value}
        ends = 0
        while queue:
            node = self._nodes[-heapq.heappop(queue)]
            shard = merged(wanted[node])
            if shard is None or not all(n in inside for n in node.users):
                return False
            inside.add(node)
            if node in self._heads:
                if shard != run(1, *self._heads[node].query):
                    return False
                ends += 1
                continue
            linear = linear_of(node) if node not in self._plan.rows else None
            is_end = linear is not None and linear.weight in self._constant and (
                shard.dim == node.meta["val"].dim() - 1
            )  # fmt: skip
            inputs = inputs_for(node, shard) if node.op == "call_function" else None
            if inputs is None:
                return False
            ends += is_end
            for source, piece in inputs.items():
                if source in self._constant:
                    continue
                wanted.setdefault(source, []).append(piece)
                if piece is not None and source not in queued:
                    queued.add(source)
                    heapq.heappush(queue, -self._order[source])
        return ends > 0

    def _divide_experts(self, last: fx.Node, linear: Linear) -> None:
        """Divide the experts of `last` and of the experts' linears that only lead to it."""
        value: torch.Tensor = linear.weight.meta["val"]
        num_experts = value.shape[0]
        if num_experts < self._parallel.size:
            return
        mine = bounds(num_experts, self._parallel.rank, self._parallel.size)
        self._plan.divided[last] = mine
        self._plan.sums.add(last)
        leads_only_to_it: set[fx.Node] = {last}
        for node in reversed(self._nodes[: self._order[last]]):
            if node.op != "call_function" or not node.users:
                continue
            same_rows = all(n in leads_only_to_it for n in node.users)
            if not same_rows or not _has_rows_of(node, linear.x):
                continue
            if (other := linear_of(node)) is None or other.experts is None:
                leads_only_to_it.add(node)
            elif other.experts is linear.experts:
                self._plan.divided[node] = mine


def _has_rows_of(node: fx.Node, rows: fx.Node) -> bool:
    value, like = node.meta["val"], rows.meta["val"]
    return isinstance(value, torch.Tensor) and value.dim() > 0 and (
        str(value.shape[0]) == str(like.shape[0])
    )  # fmt: skip


def _constants(nodes: Sequence[fx.Node], step_inputs: Sequence[fx.Node]) -> set[fx.Node]:
    """Weights and what is computed from them alone."""
    constant: set[fx.Node] = set()
    for node in nodes:
        is_weight = node.op == "placeholder" and node not in step_inputs
        if is_weight or (
            node.op == "call_function" and all(n in constant for n in node.all_input_nodes)
        ):
            constant.add(node)
    return constant
