"""A traced model -> one tensor-parallel rank's model: its heads, its weights, and collectives.

The graph is rewritten before it is cut, so that everything after (cut, slices, native passes) sees
an ordinary graph of smaller tensors with collectives in it. `shard_plan` decides, this module
writes the graph:

- a value of which a part is wanted that the rank has whole is sliced; no communication;
- a partial sum stays one through ops that sums pass through (casts, products with what all ranks
  have, sums of partial sums), so that branches meet before they are reduced, and is all-reduced
  where something else reads it. A linear's bias is added by rank 0;
- a part of which all is wanted (logits) is gathered.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_arg

from lamina.attention.partition import head_units
from lamina.attention.spec import AttentionSpec
from lamina.convert.collectives import ALL_GATHER, ALL_REDUCE, TensorParallel
from lamina.convert.passes.shard_plan import (
    Heads,
    ShardPlan,
    attention_inputs,
    heads_of,
    make_plan,
)
from lamina.convert.passes.shard_rules import (
    Inputs,
    Wanted,
    arguments_for,
    inputs_for,
    is_sum,
    keeps_sums,
    linear_of,
    source_of_slice,
)
from lamina.convert.shard import Shard, bounds, positions, run, slices
from lamina.convert.trace import Trace
from lamina.errors import ConfigError

_aten = torch.ops.aten
_SPLITS = (_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default)


def shard_trace(trace: Trace, specs: tuple[AttentionSpec, ...], parallel: TensorParallel) -> Trace:
    """The rank's trace. `trace` stays as it is; with one rank there are no collectives.

    Args:
        specs: of the whole model's attention ops, in order.

    Raises:
        ConfigError: the heads cannot be shared out evenly over so many ranks.
    """
    if parallel.size == 1:
        return replace(trace, parallel=parallel)
    _check_heads(specs, parallel)
    trace = _with_slices_for_splits(trace)
    heads = {
        node: heads_of(spec, specs, parallel)
        for node, spec in zip(trace.attention, specs, strict=True)
    }
    return _Writer(trace, make_plan(trace, heads, parallel), heads, parallel).run()


def _check_heads(specs: tuple[AttentionSpec, ...], parallel: TensorParallel) -> None:
    units = head_units(specs)
    if units % parallel.size:
        possible = [str(n) for n in range(1, units + 1) if units % n == 0]
        heads = ", ".join(str(n) for n in sorted({spec.num_kv_heads for spec in specs}))
        raise ConfigError(
            f"tensor_parallel_size={parallel.size} cannot share {heads} KV heads evenly; use "
            f"{' or '.join(possible)}"
        )


def _with_slices_for_splits(trace: Trace) -> Trace:
    """A copy of the trace in which splits into views are slices: one op to know instead of four."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in trace.graph.nodes:
        if node.target is operator.getitem and node.args[0].target in _SPLITS:
            made = _slice_for(graph, node, copies)
        else:
            made = graph.node_copy(node, copies.__getitem__)
        made.meta = dict(node.meta)
        copies[node] = made
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    return Trace(
        name=trace.name,
        graph=graph,
        input_ids=copies[trace.input_ids],
        position_ids=copies[trace.position_ids],
        logit_rows=copies[trace.logit_rows],
        logits=copies[trace.logits],
        attention=tuple(copies[n] for n in trace.attention),
        weights={copies[n]: name for n, name in trace.weights.items()},
        constants={copies[n]: value for n, value in trace.constants.items()},
    )


def _slice_for(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    split: Any = node.args[0]
    place: Any = node.args[1]
    parts = split.meta["val"]
    dim = (split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)) % parts[0].dim()
    start = sum(part.shape[dim] for part in parts[:place])
    stop = start + parts[place].shape[dim]
    return graph.call_function(_aten.slice.Tensor, (copies[split.args[0]], dim, start, stop))


class _Writer:
    """Writes the rank's graph, node by node in the order of the whole one."""

    def __init__(
        self, trace: Trace, plan: ShardPlan, heads: dict[fx.Node, Heads], parallel: TensorParallel
    ) -> None:
        self._trace = trace
        self._plan = plan
        self._heads = heads
        self._parallel = parallel
        self._graph = fx.Graph()
        self._last_argument: fx.Node | None = None
        self._values: dict[tuple[fx.Node, Wanted], fx.Node] = {}
        """What of each value the rank has."""
        self._sums: dict[fx.Node, fx.Node] = {}
        """Values that are sums over the ranks of these."""
        self._added: dict[fx.Node, fx.Node] = {}
        """What all ranks have and has to be added to such a sum: a node of the whole graph."""
        self._weights: dict[fx.Node, str] = {}
        self._constants: dict[fx.Node, torch.Tensor] = {}
        self._shards: dict[fx.Node, Shard] = {}

    def run(self) -> Trace:
        trace = self._trace
        inputs = (trace.input_ids, trace.position_ids, trace.logit_rows)
        for node in inputs:
            self._values[node, None] = self._argument(node, node.meta["val"])
        for node in trace.graph.nodes:
            if node.op == "call_function" and node in self._plan.wanted:
                self._write(node)
        logits = self._get(trace.logits)
        self._graph.output((logits,))
        self._graph.lint()
        return Trace(
            name=trace.name,
            graph=self._graph,
            input_ids=self._values[trace.input_ids, None],
            position_ids=self._values[trace.position_ids, None],
            logit_rows=self._values[trace.logit_rows, None],
            logits=logits,
            attention=tuple(self._values[n, self._plan.parts[n]] for n in trace.attention),
            weights=self._weights,
            constants=self._constants,
            shards=self._shards,
            parallel=self._parallel,
        )

    # --- values ---

    def _get(self, node: fx.Node, wanted: Wanted = None) -> fx.Node:
        """The rank's node for all of a value, or a part of it."""
        key = (node, wanted)
        if key not in self._values:
            self._values[key] = self._convert(node, wanted)
        return self._values[key]

    def _convert(self, node: fx.Node, wanted: Wanted) -> fx.Node:
        if node.op == "placeholder":
            return self._weight(node, wanted)
        if node in self._sums and wanted is None:
            return self._reduced(node)
        part = self._plan.parts.get(node)
        if wanted is None:
            assert part is not None, "a value that is not there in part is there"
            return self._gathered(node, part)
        if part is not None and part.dim == wanted.dim:
            found = positions(part.index, wanted.index)
            if found is not None:
                return self._sliced(self._get(node, part), Shard(part.dim, found), node)
        return self._sliced(self._get(node), wanted, node)

    def _weight(self, node: fx.Node, wanted: Wanted) -> fx.Node:
        value = node.meta["val"]
        if wanted is not None:
            value = value.new_empty(wanted.shape_of(value))
        made = self._argument(node, value)
        if node in self._trace.constants:
            constant = self._trace.constants[node]
            self._constants[made] = constant if wanted is None else wanted.of(constant)
            return made
        self._weights[made] = self._trace.weights[node]
        if wanted is not None:
            self._shards[made] = wanted
        return made

    def _argument(self, node: fx.Node, value: Any) -> fx.Node:
        if self._last_argument is None:
            made = self._graph.placeholder(node.name)
        else:
            with self._graph.inserting_after(self._last_argument):
                made = self._graph.placeholder(node.name)
        made.meta = {**node.meta, "val": value}
        self._last_argument = made
        return made

    def _sliced(self, whole: fx.Node, part: Shard, node: fx.Node) -> fx.Node:
        if len(part) == whole.meta["val"].shape[part.dim]:
            return whole
        pieces = [
            self._call(
                node,
                _aten.slice.Tensor,
                (whole, part.dim, *piece),
                Shard(part.dim, np.arange(*piece)),
            )
            for piece in slices(part.index)
        ]
        if len(pieces) == 1:
            return pieces[0]
        return self._call(node, _aten.cat.default, (pieces, part.dim), part)

    def _gathered(self, node: fx.Node, part: Shard) -> fx.Node:
        value: torch.Tensor = node.meta["val"]
        size = value.shape[part.dim]
        shares = [bounds(size, rank, self._parallel.size) for rank in range(self._parallel.size)]
        start, stop = shares[self._parallel.rank]
        assert len(part) == stop - start, "parts are gathered that are shares"
        assert part.index[0] == start
        sizes = [stop - start for start, stop in shares]
        arguments = (self._get(node, part), part.dim, sizes, self._parallel.group)
        return self._call(node, ALL_GATHER, arguments)

    def _reduced(self, node: fx.Node) -> fx.Node:
        part = self._sums[node]
        total = self._graph.call_function(ALL_REDUCE, (part, self._parallel.group))
        total.meta = dict(part.meta)
        if node not in self._added:
            return total
        return self._call(node, _aten.add.Tensor, (self._get(self._added[node]), total))

    # --- ops ---

    def _call(self, node: fx.Node, target: Any, args: Any, part: Wanted = None) -> fx.Node:
        """A new node that stands for `part` of `node`."""
        made = self._graph.create_node("call_function", target, args, {}, node.name)
        made.meta = dict(node.meta)
        if part is not None:
            value = node.meta["val"]
            made.meta["val"] = value.new_empty(part.shape_of(value))
        return made

    def _write(self, node: fx.Node) -> None:
        part = self._plan.parts.get(node)
        if node in self._heads:
            self._write_part(
                node, self._plan.parts[node], attention_inputs(node, self._heads[node])
            )
        elif node in self._plan.rows:
            self._write_rows(node, self._plan.rows[node])
        elif node in self._plan.divided:
            self._write_divided(node, *self._plan.divided[node])
        elif part is not None:
            if (source := source_of_slice(node, part)) is not None:
                self._values[node, part] = self._get(*source)
            else:
                inputs = inputs_for(node, part)
                assert inputs is not None, "the plan has parts of ops that can be computed in part"
                self._write_part(node, part, inputs)
        elif not self._write_sum(node):
            made = self._graph.node_copy(node, self._get)
            self._values[node, None] = made

    def _write_part(self, node: fx.Node, part: Shard, inputs: Inputs) -> None:
        def argument(source: fx.Node) -> fx.Node:
            return self._get(source, inputs[source])

        target, args = arguments_for(node, part)
        made = self._call(node, target, map_arg(args, argument), part)
        made.kwargs = map_arg(node.kwargs, argument)
        self._values[node, part] = made

    def _write_rows(self, node: fx.Node, share: Shard) -> None:
        linear = linear_of(node)
        assert linear is not None
        x = self._get(linear.x, share)
        weight = self._get(linear.weight, share.on(linear.in_dim))
        has_bias = linear.bias is not None and self._parallel.rank == 0
        bias = self._get(linear.bias) if linear.bias is not None and has_bias else None
        target: Any = node.target
        args: tuple[Any, ...]
        if linear.experts is not None:
            args = (x, weight, bias, self._get(linear.experts), *node.args[4:])
        elif target is _aten.linear.default:
            args = (x, weight, bias)
        elif bias is not None:
            target, args = _aten.addmm.default, (bias, x, weight)
        else:
            target, args = _aten.mm.default, (x, weight)
        self._sums[node] = self._call(node, target, args)

    def _write_divided(self, node: fx.Node, start: int, stop: int) -> None:
        linear = linear_of(node)
        assert linear is not None
        assert linear.experts is not None
        mine = run(0, start, stop)
        bias = None if linear.bias is None else self._get(linear.bias, mine)
        args = (self._get(linear.x), self._get(linear.weight, mine), bias,
                self._get(linear.experts), node.args[4], start)  # fmt: skip
        made = self._call(node, node.target, args)
        if node in self._plan.sums:
            self._sums[node] = made
        else:
            self._values[node, None] = made

    def _write_sum(self, node: fx.Node) -> bool:
        """Keep a partial sum one, if nobody else reads it and the op lets sums through."""
        summed = [
            n
            for n in node.all_input_nodes
            if n in self._sums and (n, None) not in self._values and len(n.users) == 1
        ]
        waiting = [n for n in summed if n in self._added]
        if is_sum(node) and summed and len(waiting) < 2:
            if len(summed) == 2:
                self._sums[node] = self._call(
                    node, _aten.add.Tensor, tuple(self._sums[n] for n in summed)
                )
                if waiting:
                    self._added[node] = self._added[waiting[0]]
                return True
            if not waiting:
                (other,) = (n for n in node.all_input_nodes if n not in summed)
                self._sums[node] = self._sums[summed[0]]
                self._added[node] = other
                return True
        if len(summed) != 1 or waiting or not keeps_sums(node, summed[0]):
            return False
        self._sums[node] = self._graph.node_copy(
            node, lambda n: self._sums[n] if n is summed[0] else self._get(n)
        )
        return True
