"""The context edge of a slice: what later slices need of it where another replica runs them.

Step constants are no part of it: every replica computes them from the step's inputs, which all of
them get. The attention output goes to the next replica by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from lamina.convert.trace import Trace
from lamina.errors import ConversionError


class ContextValue(NamedTuple):
    """A tensor of the edge, and the slot of a state that holds it."""

    slot: int
    dtype: torch.dtype
    sizes: tuple[int | None, ...]
    """None stands for the number of rows."""

    def shape(self, num_rows: int) -> list[int]:
        return [num_rows if size is None else size for size in self.sizes]

    def num_bytes(self, num_rows: int) -> int:
        return math.prod(self.shape(num_rows)) * self.dtype.itemsize


def context_values(
    trace: Trace, carried: Iterable[fx.Node], slots: dict[fx.Node, int]
) -> tuple[ContextValue, ...]:
    """The edge of a slice that carries these values, in the order in which they are sent.

    Raises:
        ConversionError: a value is no tensor with a dimension of rows.
    """
    num_rows = trace.input_ids.meta["val"].shape[1].node.expr
    values = [
        _value(trace, node, slots[node], num_rows)
        for node in carried
        if node is not trace.input_ids
    ]
    # Wider elements first: every part of a message is then aligned to its elements.
    return tuple(sorted(values, key=lambda value: -value.dtype.itemsize))


def pack_context(edge: Sequence[ContextValue], values: list[Any]) -> list[torch.Tensor]:
    """Take the edge out of a state's values: contiguous tensors, in the edge's order."""
    parts = []
    for value in edge:
        parts.append(values[value.slot].contiguous())
        values[value.slot] = None
    return parts


def unpack_context(
    edge: Sequence[ContextValue], values: list[Any], payload: torch.Tensor, num_rows: int
) -> None:
    """Set a state's values to views of the packed parts, uint8 [context_bytes]."""
    start = 0
    for value in edge:
        stop = start + value.num_bytes(num_rows)
        values[value.slot] = payload[start:stop].view(value.dtype).view(value.shape(num_rows))
        start = stop
    assert start == payload.shape[0], "both sides run the same slices"


def context_bytes(edge: Sequence[ContextValue], num_rows: int) -> int:
    """Size of the packed parts."""
    return sum(value.num_bytes(num_rows) for value in edge)


def _value(trace: Trace, node: fx.Node, slot: int, num_rows: Any) -> ContextValue:
    value = node.meta["val"]
    shape: tuple[Any, ...] = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
    sizes = tuple(None if isinstance(size, torch.SymInt) else int(size) for size in shape)
    if not sizes or any(
        size is None and dim.node.expr != num_rows for size, dim in zip(sizes, shape, strict=True)
    ):
        raise ConversionError(
            f"{node.name}, which later slices need, cannot be moved between replicas; "
            "use model_replicas=1",
            model=trace.name,
        )
    return ContextValue(slot, value.dtype, sizes)
