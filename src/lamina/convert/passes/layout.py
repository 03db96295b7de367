"""Where the elements of a tensor lie: views as strides, one row per token.

A row tensor has one dimension of unknown size, its rows; all else of a row lies together, in the
order of the other dimensions. A view of it is an offset and a stride per dimension.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

_aten = torch.ops.aten


class Heads(NamedTuple):
    """A layout as the native code takes it; in elements. See `View` in native/dense/program.h."""

    offset: int
    row_stride: int
    head_stride: int
    heads: int
    width: int


@dataclass(frozen=True)
class Layout:
    """A view of the memory of `root`."""

    root: fx.Node
    row_width: int
    """Elements per row of the root."""
    rows: str
    """The number of rows, as the trace spells it."""
    dims: tuple[tuple[int, int] | None, ...]
    """(size, stride) of each dimension; None for the rows."""
    offset: int = 0

    @property
    def row_dim(self) -> int:
        """Which dimension is the rows."""
        return self.dims.index(None)

    @property
    def is_contiguous(self) -> bool:
        """Whether it is all of its root's memory, in the order of its dimensions."""
        expected = 1
        for dim in reversed([d for d in self.dims if d is not None]):
            if dim[0] != 1 and dim[1] != expected:
                return False
            expected *= dim[0]
        leading = self.dims[: self.row_dim]
        return expected == self.row_width and all(d is not None and d[0] == 1 for d in leading)

    def heads(self) -> Heads | None:
        """With the last dimension as width and the others as heads; None if they do not merge."""
        if self.dims[-1] is None:
            return None
        width, stride = self.dims[-1]
        if stride != 1 and width != 1:
            return None
        count, step = 1, width
        for dim in reversed(self.dims[:-1]):
            if dim is None or dim[0] == 1:
                continue
            if count == 1:
                step = dim[1]
            elif dim[1] != step * count:
                return None
            count *= dim[0]
        return Heads(self.offset, self.row_width, step, count, width)


def root_layout(node: fx.Node, *, is_computed: bool) -> Layout | None:
    """The layout of a tensor of its own memory; None if it is not a tensor of rows.

    Args:
        is_computed: made by native code, rows outermost; else contiguous, as torch made it.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    rows = [i for i, size in enumerate(value.shape) if not isinstance(size, int)]
    if len(rows) != 1 or value.dim() < 2:
        return None
    row = rows[0]
    if not is_computed and any(size != 1 for size in value.shape[:row]):
        return None
    dims: list[tuple[int, int] | None] = []
    stride = 1
    for i in reversed(range(value.dim())):
        if i == row:
            dims.append(None)
        else:
            dims.append((value.shape[i], stride))
            stride *= value.shape[i]
    return Layout(node, stride, str(value.shape[row]), tuple(reversed(dims)))


def view_of(layout: Layout, node: fx.Node) -> Layout | None:
    """The layout of `node`, a view op of what `layout` describes; None if it is none."""
    dims = list(layout.dims)
    match node.target:
        case _aten.unsqueeze.default:
            at = _dim(node.args[1], len(dims) + 1)
            dims.insert(at, (1, 0))
        case _aten.squeeze.dim:
            at = _dim(node.args[1], len(dims))
            if dims[at] is None or dims[at][0] != 1:  # type: ignore[index]
                return None
            del dims[at]
        case _aten.transpose.int:
            a, b = (_dim(d, len(dims)) for d in node.args[1:3])
            dims[a], dims[b] = dims[b], dims[a]
        case _aten.slice.Tensor:
            return _slice(layout, node)
        case _aten.view.default | _aten.reshape.default | _aten.flatten.using_ints:
            return _reshape(layout, node)
        case _:
            return None
    return _with(layout, dims)


def part_of(layout: Layout, split: fx.Node, index: int) -> Layout | None:
    """The layout of part `index` of a chunk or split of what `layout` describes."""
    parts = split.meta["val"]
    dim = split.args[2] if len(split.args) > 2 else 0
    at = _dim(dim, len(layout.dims))
    if split.target not in (
        _aten.chunk.default, _aten.split.Tensor, _aten.split_with_sizes.default
    ) or layout.dims[at] is None:  # fmt: skip
        return None
    begin = sum(part.shape[at] for part in parts[:index])
    return _narrow(layout, at, begin, parts[index].shape[at])


def is_split(node: fx.Node) -> bool:
    """Whether `node` gives a list of views of its input."""
    return node.target in (
        _aten.chunk.default, _aten.split.Tensor, _aten.split_with_sizes.default
    )  # fmt: skip


def is_getitem(node: fx.Node) -> bool:
    """Whether `node` takes one of a list."""
    return node.target is operator.getitem


def _dim(dim: Any, count: int) -> int:
    assert isinstance(dim, int)
    return dim % count


def _with(layout: Layout, dims: list[tuple[int, int] | None], offset: int | None = None) -> Layout:
    offset = layout.offset if offset is None else offset
    return Layout(layout.root, layout.row_width, layout.rows, tuple(dims), offset)


def _narrow(layout: Layout, at: int, begin: int, size: int) -> Layout | None:
    dim = layout.dims[at]
    if dim is None or size == 0:
        return None
    dims = list(layout.dims)
    dims[at] = (size, dim[1])
    return _with(layout, dims, layout.offset + begin * dim[1])


def _slice(layout: Layout, node: fx.Node) -> Layout | None:
    arguments: tuple[Any, ...] = (*node.args, *(0, 0, 2**63 - 1, 1)[len(node.args) - 1 :])
    _, dim, begin, end, step = arguments
    at = _dim(dim, len(layout.dims))
    size = layout.dims[at]
    if size is None or step != 1 or not isinstance(begin, int | None) or not isinstance(end, int):
        return None
    begin = begin or 0
    if begin < 0 or end < 0:
        return None
    return _narrow(layout, at, begin, max(0, min(end, size[0]) - begin))


def _reshape(layout: Layout, node: fx.Node) -> Layout | None:
    """Regroups the dimensions after the rows; nothing but ones may stand before them."""
    shape = node.meta["val"].shape
    rows = [i for i, size in enumerate(shape) if not isinstance(size, int)]
    at = layout.row_dim
    if len(rows) != 1 or str(shape[rows[0]]) != layout.rows:
        return None
    before = (*layout.dims[:at], *((size, 0) for size in shape[: rows[0]]))
    if any(dim is None or dim[0] != 1 for dim in before):
        return None
    inner = _regroup([d for d in layout.dims[at + 1 :] if d is not None], shape[rows[0] + 1 :])
    if inner is None:
        return None
    return _with(layout, [*((1, 0) for _ in range(rows[0])), None, *inner])


def _regroup(dims: list[tuple[int, int]], sizes: Any) -> list[tuple[int, int]] | None:
    runs: list[list[int]] = []  # [size, stride] of what lies evenly spaced, outermost first
    for size, stride in dims:
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = [runs[-1][0] * size, stride]
        else:
            runs.append([size, stride])
    made: list[tuple[int, int]] = []
    for size in reversed(sizes):
        if size == 1:
            made.append((1, 0))
            continue
        if not runs or runs[-1][0] % size:
            return None
        run = runs[-1]
        made.append((size, run[1]))
        run[0] //= size
        run[1] *= size
        if run[0] == 1:
            runs.pop()
    return made[::-1] if not runs else None
