"""Rewrites of programs for the device that runs them, after cutting and loading weights.

A pass changes a copy of a program's graph; the program itself stays the reference. Per distinct
program the copy is made once; per stage its weights are bound: packed weights take the place of the
plain ones, whose memory is freed with the last stage that reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from lamina._native import DenseWorkspace, PackedLinear, ThreadPool
from lamina.convert.collectives import ALL_REDUCE, all_reduce_in_place
from lamina.convert.passes.fuse import fuse
from lamina.convert.passes.inductor import compiled, linear_handle, use_handles
from lamina.convert.passes.lower import lower
from lamina.convert.passes.native import BoundRegion, LinearWeights, Region
from lamina.convert.passes.order import sorted_copy
from lamina.convert.passes.rows import select_rows_early

if TYPE_CHECKING:
    from lamina.convert.program import Program
    from lamina.convert.slices import BoundStage

_ELEMENTS = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class Rewritten:
    """A program after the passes: `run(*values, *plain weights, *bound regions or handles)`."""

    run: Callable[..., tuple[Any, ...]]
    module: fx.GraphModule
    weights: tuple[int, ...]
    """Which of the program's arguments are still read as plain tensors."""
    regions: tuple[Region, ...] = ()
    """Native calls to bind."""
    handles: tuple[LinearWeights, ...] = ()
    """Linears of compiled code."""


class Passes:
    """Rewrites stages to call native code on a pool's threads. Used for the stages of one model."""

    def __init__(self, pool: ThreadPool, *, compile: bool = False, isa: str | None = None) -> None:
        """See `SlicedModel.optimize`."""
        self._pool = pool
        self._compile = compile
        self._workspace = DenseWorkspace(pool, isa)
        self._programs: dict[tuple[int, int], Rewritten] = {}
        self._packed: dict[Any, PackedLinear] = {}

    @property
    def programs(self) -> tuple[Rewritten, ...]:
        """The distinct programs that were made."""
        return tuple(self._programs.values())

    @property
    def num_packed_linears(self) -> int:
        """How many linears' weights are packed."""
        return len(self._packed)

    @property
    def num_packed_bytes(self) -> int:
        """Memory of all packed weights."""
        return sum(packed.num_bytes for packed in self._packed.values())

    def rewrite(self, bound: BoundStage) -> BoundStage:
        """The stage with its rewritten program and the weights that this reads."""
        program, stage = bound.stage.program, bound.stage
        key = (id(program), len(stage.values))
        if (made := self._programs.get(key)) is None:
            rewrite = rewrite_compiled if self._compile else rewrite_native
            made = self._programs[key] = rewrite(program, len(stage.values))
        nodes = (*stage.values, *stage.weights)
        tensors: dict[int, torch.Tensor] = dict(
            zip(range(len(stage.values), len(nodes)), bound.weights, strict=True)
        )
        regions = [self._bind(region, nodes, tensors) for region in made.regions]
        handles = []
        for linear in made.handles:
            packed = self._pack(linear, nodes, tensors)
            dtype = tensors[linear.weight].dtype
            handles.append(linear_handle(packed, dtype, self._workspace))
        weights = (*(tensors[i] for i in made.weights), *regions, *handles)
        return replace(bound, run=made.run, weights=weights)

    def _bind(
        self, region: Region, nodes: tuple[fx.Node, ...], tensors: dict[int, torch.Tensor]
    ) -> BoundRegion:
        linears = [self._pack(linear, nodes, tensors) for linear in region.linears]
        return region.bind(self._workspace, linears, [tensors[i] for i in region.vectors])

    def _pack(
        self, linear: LinearWeights, nodes: tuple[fx.Node, ...], tensors: dict[int, torch.Tensor]
    ) -> PackedLinear:
        weight, bias, is_transposed = linear
        key = (nodes[weight], None if bias is None else nodes[bias], is_transposed)
        if key not in self._packed:
            self._packed[key] = pack(
                tensors[weight], None if bias is None else tensors[bias], is_transposed, self._pool
            )
        return self._packed[key]


def rewrite_native(program: Program, num_values: int) -> Rewritten:
    """Fuse a copy of the program's graph and lower it to native calls.

    Args:
        num_values: how many of the program's arguments are values; the others are weights.
    """
    graph, weights = _fused_copy(program, num_values)
    regions = lower(graph, weights)
    _reduce_in_place(graph)
    module, kept = _finished(graph, weights)
    return Rewritten(module.forward, module, kept, regions=tuple(regions.values()))


def rewrite_compiled(program: Program, num_values: int) -> Rewritten:
    """Give a copy of the program's graph packed linears and let Inductor compile it."""
    graph, weights = _fused_copy(program, num_values)
    handles = use_handles(graph, weights)
    module, kept = _finished(graph, weights)
    return Rewritten(compiled(module), module, kept, handles=tuple(handles.values()))


def _reduce_in_place(graph: fx.Graph) -> None:
    """Sum a native call's result over the ranks in its own memory.

    Nobody else reads a partial sum or a view of it: `shard` reduces each once, for all its readers.
    """
    for node in graph.nodes:
        if node.target is ALL_REDUCE:
            (source,) = node.all_input_nodes
            if source.op == "call_method" and len(source.users) == 1:
                node.target = all_reduce_in_place


def _fused_copy(program: Program, num_values: int) -> tuple[fx.Graph, frozenset[fx.Node]]:
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.module.graph, {}))
    arguments = [n for n in graph.nodes if n.op == "placeholder"]
    fuse(graph)
    select_rows_early(graph)
    return graph, frozenset(arguments[num_values:])


def _finished(
    graph: fx.Graph, weights: frozenset[fx.Node]
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """A module of the graph without unused weights, and which arguments the others are."""
    number = {node: i for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    copy, kept = sorted_copy(graph, weights)
    return fx.GraphModule(torch.nn.Module(), copy), tuple(number[n] for n in kept)


def pack(
    weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool, pool: ThreadPool
) -> PackedLinear:
    """A copy of a linear's weights in the native layout.

    Args:
        weight: bfloat16 or float32 [outputs, inputs]; [inputs, outputs] if `is_transposed`.
        bias: [outputs].
    """
    if is_transposed:
        weight = weight.T
    num_outputs, num_inputs = weight.shape
    packed = PackedLinear(_ELEMENTS[weight.dtype], num_outputs, num_inputs)
    output_stride, input_stride = weight.stride()
    packed.set(0, weight.data_ptr(), num_outputs, output_stride, input_stride, pool)
    if bias is not None:
        packed.set_bias(0, bias.detach().float().tolist())
    return packed
