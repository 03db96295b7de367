"""Gathers the operations that native code knows into regions, each one call.

Nodes are taken in their order. An operation joins the open region unless it works on another number
of rows or type; a torch op that reads a result of the open region closes it, one that does not runs
before it. Views cost nothing inside a region: native code reads and writes with strides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lamina._native import DenseProgram
from lamina.convert.passes import ops
from lamina.convert.passes.layout import (
    Heads,
    Layout,
    is_getitem,
    is_split,
    part_of,
    root_layout,
    view_of,
)
from lamina.convert.passes.native import LinearWeights, OutputMemory, OutputView, Region

_ELEMENTS = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_COPIES = (torch.ops.aten.contiguous.default, torch.ops.aten.clone.default)
_MAX_BUFFERS = 60


@dataclass
class _Call:
    """A native operation: its operands' layouts, in the order of the native method."""

    node: fx.Node
    reads: list[Layout]
    weights: list[fx.Node | None] = field(default_factory=list)


@dataclass
class _OpenRegion:
    rows: str
    dtype: torch.dtype
    calls: list[_Call] = field(default_factory=list)
    made: set[fx.Node] = field(default_factory=set)
    layouts: dict[fx.Node, Layout] = field(default_factory=dict)
    """Its results and their views, once it is closed."""


def lower(graph: fx.Graph, weights: frozenset[fx.Node]) -> dict[fx.Node, Region]:
    """Replace native operations of `graph` by calls of regions, in place.

    The graph's order may then be wrong and unused nodes remain: see `order.sorted_copy`.

    Args:
        weights: the placeholders that are bound once.

    Returns:
        A new placeholder per region, to be bound to a BoundRegion; indices in a Region count the
        other placeholders.
    """
    return _Lowering(graph, weights).run()


class _Lowering:
    def __init__(self, graph: fx.Graph, weights: frozenset[fx.Node]) -> None:
        self._graph = graph
        self._weights = weights
        self._arguments = [n for n in graph.nodes if n.op == "placeholder"]
        self._layouts: dict[fx.Node, Layout] = {}
        self._splits: dict[fx.Node, Layout] = {}
        self._regions: list[_OpenRegion] = []
        self._open: _OpenRegion | None = None

    def run(self) -> dict[fx.Node, Region]:
        for node in list(self._graph.nodes):
            self._visit(node)
        self._close()
        placeholders: dict[fx.Node, Region] = {}
        results: dict[fx.Node, fx.Node] = {}
        last = self._arguments[-1]
        for number, region in enumerate(self._regions):
            with self._graph.inserting_after(last):
                last = self._graph.placeholder(f"region_{number}")
            placeholders[last] = _Emission(self._graph, region, self._arguments, results).run(last)
        return placeholders

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder" and node not in self._weights:
            if (layout := root_layout(node, is_computed=False)) is not None:
                self._layouts[node] = layout
        elif node.op == "call_function":
            if self._follow_view(node):
                return
            if (call := self._native_call(node)) is not None:
                self._join(call)
                return
            if self._open is not None and self._reads_region(node, self._open):
                self._close()
            if (layout := root_layout(node, is_computed=False)) is not None:
                self._layouts[node] = layout

    def _follow_view(self, node: fx.Node) -> bool:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return False
        layout: Layout | None = None
        if is_getitem(node) and source in self._splits:
            index = node.args[1]
            assert isinstance(index, int)
            layout = part_of(self._splits[source], source, index)
        elif source in self._layouts:
            if is_split(node):
                self._splits[node] = self._layouts[source]
                return True
            if node.target in _COPIES and self._layouts[source].is_contiguous:
                layout = self._layouts[source]
            else:
                layout = view_of(self._layouts[source], node)
        if layout is not None:
            self._layouts[node] = layout
        return layout is not None

    def _reads_region(self, node: fx.Node, region: _OpenRegion) -> bool:
        return any(self._comes_from(n, region) for n in node.all_input_nodes)

    def _comes_from(self, node: fx.Node, region: _OpenRegion) -> bool:
        layout = self._layouts.get(node) or self._splits.get(node)
        return layout is not None and layout.root in region.made

    # --- which operations native code knows ---

    def _native_call(self, node: fx.Node) -> _Call | None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype not in _ELEMENTS:
            return None
        values: tuple[Any, ...]
        weights: tuple[Any, ...] = ()
        if node.target is ops.linear:
            x, weight, bias, residual, _ = node.args
            values, weights = (x, residual), (weight, bias)
            if weight not in self._weights or weight.meta["val"].dim() != 2:  # type: ignore[union-attr]
                return None
        elif node.target is ops.rms_norm:
            values, weights = node.args[:1], node.args[1:2]
        elif node.target is ops.layer_norm:
            values, weights = node.args[:1], node.args[1:3]
        elif node.target is ops.activation:
            values = node.args[:2]
        elif node.target is ops.rotary or (
            node.target is torch.ops.aten.add.Tensor and not node.kwargs
        ):
            values = node.args
        elif node.target in _COPIES:
            values = node.args[:1]
        else:
            return None
        if any(w is not None and w not in self._weights for w in weights):
            return None
        reads = [self._operand(v, value.dtype) for v in values if v is not None]
        if any(layout is None for layout in reads):
            return None
        call = _Call(node, [r for r in reads if r is not None], list(weights))
        return call if self._fits(call) else None

    def _operand(self, value: Any, dtype: torch.dtype) -> Layout | None:
        if not isinstance(value, fx.Node) or value not in self._layouts:
            return None
        return self._layouts[value] if value.meta["val"].dtype == dtype else None

    def _fits(self, call: _Call) -> bool:
        out = root_layout(call.node, is_computed=True)
        if out is None or any(r.rows != out.rows for r in call.reads):
            return False
        heads = [layout.heads() for layout in (out, *call.reads)]
        if any(h is None for h in heads):
            return False
        shapes = [(h.heads, h.width) for h in heads if h is not None]
        if call.node.target is ops.linear:
            return all(count == 1 for count, _ in shapes)
        if call.node.target is ops.rotary:
            rotated = shapes[2]
            return shapes[0] == shapes[1] and rotated == shapes[3] and rotated[0] == 1
        return all(shape == shapes[0] for shape in shapes)

    # --- regions ---

    def _join(self, call: _Call) -> None:
        layout = root_layout(call.node, is_computed=True)
        assert layout is not None
        dtype = call.node.meta["val"].dtype
        region = self._open
        if region is None or region.rows != layout.rows or region.dtype != dtype or (
            len(region.calls) * 3 > _MAX_BUFFERS
        ):  # fmt: skip
            self._close()
            region = self._open = _OpenRegion(layout.rows, dtype)
        region.calls.append(call)
        region.made.add(call.node)
        self._layouts[call.node] = layout

    def _close(self) -> None:
        """Whoever reads a result or a view of one from here on reads a tensor of its own."""
        region, self._open = self._open, None
        if region is None:
            return
        self._regions.append(region)
        region.layouts = {n: v for n, v in self._layouts.items() if v.root in region.made}
        for node in region.layouts:
            del self._layouts[node]
            if (layout := root_layout(node, is_computed=False)) is not None:
                self._layouts[node] = layout
        self._splits = {n: v for n, v in self._splits.items() if v.root not in region.made}


class _Emission:
    """Writes one region: the native program, its call and the nodes that stand for its results."""

    def __init__(
        self,
        graph: fx.Graph,
        region: _OpenRegion,
        arguments: list[fx.Node],
        results: dict[fx.Node, fx.Node],
    ) -> None:
        """`results`: what stands for results of regions; this one's are added."""
        self._graph = graph
        self._region = region
        self._results = results
        self._layouts = region.layouts
        self._number = {node: i for i, node in enumerate(arguments)}
        self._calls = {call.node for call in region.calls}
        self._linears: list[LinearWeights] = []
        self._vectors: list[int] = []

    def run(self, placeholder: fx.Node) -> Region:
        region = self._region
        inputs = list(
            dict.fromkeys(
                read.root for c in region.calls for read in c.reads if read.root not in region.made
            )
        )
        wanted = [n for n in self._layouts if not all(map(self._is_inside, n.users))]
        memory, views = self._outputs(wanted)
        program = DenseProgram(_ELEMENTS[region.dtype], len(inputs) + len(memory))
        buffers = {n: i for i, n in enumerate(inputs)}
        for i, node in enumerate(memory):
            buffers[self._layouts[node].root] = len(inputs) + i
        self._write(program, buffers)
        self._replace(placeholder, inputs, [*memory, *(n for n, _ in views)])
        row_dim = next(
            i for i, s in enumerate(inputs[0].meta["val"].shape) if not isinstance(s, int)
        )
        return Region(
            program=program,
            row_input=(0, row_dim),
            dtype=region.dtype,
            outputs=tuple(memory.values()),
            views=tuple(view for _, view in views),
            linears=tuple(self._linears),
            vectors=tuple(self._vectors),
            num_ops=len(region.calls),
        )

    def _is_inside(self, user: fx.Node) -> bool:
        """Whether it is an operation of the region or only a view of its results."""
        if is_split(user):
            return all(part in self._layouts for part in user.users)
        return user in self._calls or user in self._layouts

    def _outputs(
        self, wanted: list[fx.Node]
    ) -> tuple[dict[fx.Node, OutputMemory], list[tuple[fx.Node, OutputView]]]:
        """Memory per root that is needed, shaped for the first node that is all of it."""
        first: dict[fx.Node, fx.Node] = {}
        for node in sorted(wanted, key=lambda n: not self._layouts[n].is_contiguous):
            first.setdefault(self._layouts[node].root, node)
        memory: dict[fx.Node, OutputMemory] = {}
        views: list[tuple[fx.Node, OutputView]] = []
        for root, node in first.items():
            layout = self._layouts[node]
            if layout.is_contiguous:
                shape = node.meta["val"].shape
                at = layout.row_dim
                memory[node] = OutputMemory(tuple(shape[:at]), tuple(shape[at + 1 :]))
            else:
                memory[root] = OutputMemory((), (layout.row_width,))
        place = {self._layouts[n].root: i for i, n in enumerate(memory)}
        for node in wanted:
            layout = self._layouts[node]
            if node in memory and layout.is_contiguous:
                continue
            views.append((node, OutputView(
                place[layout.root],
                tuple(None if d is None else d[0] for d in layout.dims),
                tuple(layout.row_width if d is None else d[1] for d in layout.dims),
                layout.offset,
            )))  # fmt: skip
        return memory, views

    def _write(self, program: DenseProgram, buffers: dict[fx.Node, int]) -> None:
        last_use: dict[fx.Node, int] = {}
        for i, call in enumerate(self._region.calls):
            last_use.update({read.root: i for read in call.reads})
            last_use.setdefault(call.node, i)
        outside = set(buffers)
        free: list[tuple[int, int]] = []  # (elements per row, scratch buffer)
        for i, call in enumerate(self._region.calls):
            if call.node not in buffers:
                width = self._layouts[call.node].row_width
                fitting = sorted(f for f in free if f[0] == width)
                if fitting:
                    free.remove(fitting[0])
                    buffers[call.node] = fitting[0][1]
                else:
                    buffers[call.node] = program.scratch(width)
            self._write_call(program, call, buffers)
            for root in {call.node, *(r.root for r in call.reads)}:
                if last_use[root] == i and root not in outside:
                    free.append((self._layouts[root].row_width, buffers[root]))

    def _write_call(self, program: DenseProgram, call: _Call, buffers: dict[fx.Node, int]) -> None:
        node = call.node
        arguments: Any = node.args
        out = _view(self._layouts[node], buffers)
        reads = [_view(read, buffers) for read in call.reads]
        if node.target is ops.linear:
            weight, bias = call.weights
            assert weight is not None
            self._linears.append(LinearWeights(
                self._number[weight], None if bias is None else self._number[bias], arguments[4]
            ))  # fmt: skip
            residual = reads[1] if len(reads) > 1 else None
            program.linear(reads[0], len(self._linears) - 1, out, residual)
        elif node.target is ops.rms_norm:
            kind = "rms_once" if arguments[3] else "rms"
            program.norm(reads[0], out, self._vector(call.weights[0]), -1, arguments[2], kind)
        elif node.target is ops.layer_norm:
            scale, shift = (self._vector(w) for w in call.weights)
            program.norm(reads[0], out, scale, shift, arguments[3], "layer")
        elif node.target is ops.activation:
            gate = reads[1] if len(reads) > 1 else None
            program.activation(reads[0], gate, out, arguments[2])
        elif node.target is ops.rotary:
            program.rotary(reads[0], reads[1], reads[2], out)
        else:
            program.add(reads[0], reads[1] if len(reads) > 1 else None, out)

    def _vector(self, weight: fx.Node | None) -> int:
        if weight is None:
            return -1
        self._vectors.append(self._number[weight])
        return len(self._vectors) - 1

    def _replace(self, placeholder: fx.Node, inputs: list[fx.Node], results: list[fx.Node]) -> None:
        # Right behind the last of the region's inputs and operations: readers come later.
        last = self._region.calls[-1].node
        with self._graph.inserting_after(last):
            call = self._graph.call_method(
                "__call__", (placeholder, *(self._results.get(n, n) for n in inputs))
            )
        place = call
        for i, result in enumerate(results):
            with self._graph.inserting_after(place):
                place = self._graph.call_method("__getitem__", (call, i))
            place.meta = dict(result.meta)
            self._results[result] = place
            result.replace_all_uses_with(place, lambda user: not self._is_inside(user))


def _view(layout: Layout, buffers: dict[fx.Node, int]) -> tuple[int, int, int, int, int, int]:
    heads = layout.heads()
    assert isinstance(heads, Heads)
    return (buffers[layout.root], *heads)
