"""A part of a tensor along one dimension, and how views move it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Index = npt.NDArray[np.int64]

_STAND_INS = (1_000_003, 1_000_033, 1_000_037)
"""Primes that take the place of unknown sizes where shapes are compared."""


@dataclass(frozen=True, eq=False)
class Shard:
    """The elements `index` (ascending, each once) of dimension `dim` (not negative)."""

    dim: int
    index: Index

    def __len__(self) -> int:
        """How many elements of the dimension there are."""
        return len(self.index)

    def __eq__(self, other: object) -> bool:
        """Whether it is the same part."""
        return (
            isinstance(other, Shard)
            and self.dim == other.dim
            and np.array_equal(self.index, other.index)
        )

    def __hash__(self) -> int:
        """Equal shards are the same key."""
        return hash((self.dim, self.index.tobytes()))

    def on(self, dim: int) -> Shard:
        """The same elements of another dimension."""
        return Shard(dim, self.index)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a tensor in memory of its own, contiguous."""
        return tensor.index_select(self.dim, torch.from_numpy(self.index)).contiguous()

    def view_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The part of a tensor in the tensor's memory; None if it is not one contiguous run."""
        start, stop = int(self.index[0]), int(self.index[-1]) + 1
        part = tensor.narrow(self.dim, start, stop - start)
        return part if len(self) == stop - start and part.is_contiguous() else None

    def shape_of(self, value: torch.Tensor) -> tuple[Any, ...]:
        """The shape of the part of `value`."""
        shape = list(value.shape)
        shape[self.dim] = len(self)
        return tuple(shape)


def bounds(size: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """Rank's share [start, stop) of `size` elements: contiguous, in the order of the ranks."""
    return size * rank // num_ranks, size * (rank + 1) // num_ranks


def run(dim: int, start: int, stop: int) -> Shard:
    """Elements [start, stop) of a dimension."""
    return Shard(dim, np.arange(start, stop, dtype=np.int64))


def merged(wanted: Iterable[Shard | None]) -> Shard | None:
    """The part that contains all of the parts; None if that is the whole or they do not fit."""
    shards = list(wanted)
    dims = {None if shard is None else shard.dim for shard in shards}
    if len(dims) != 1 or None in dims:
        return None
    first, *others = (shard for shard in shards if shard is not None)
    for other in others:
        if other != first:
            first = Shard(first.dim, np.union1d(first.index, other.index))
    return first


def positions(outer: Index, inner: Index) -> Index | None:
    """Where the elements of `inner` are in `outer`; None if some are not."""
    found = np.searchsorted(outer, inner)
    if len(inner) and (found[-1] >= len(outer) or not np.array_equal(outer[found], inner)):
        return None
    return found


def slices(index: Index) -> Iterator[tuple[int, int, int]]:
    """`index` as (start, stop, step) of consecutive pieces: one if it is evenly spaced."""
    steps = np.diff(index)
    if len(steps) == 0 or (steps == steps[0]).all():
        step = int(steps[0]) if len(steps) else 1
        yield int(index[0]), int(index[-1]) + 1, step
        return
    for piece in np.split(index, np.flatnonzero(steps != 1) + 1):
        yield int(piece[0]), int(piece[-1]) + 1, 1


def sizes_of(*shapes: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    """The shapes with primes for unknown sizes, the same for the same unknown."""
    unknown: dict[Any, int] = {}

    def size_of(size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            unknown.setdefault(symbol, _STAND_INS[len(unknown)])
        return int(expression.subs(unknown))

    return tuple(tuple(size_of(size) for size in shape) for shape in shapes)


def reshaped(shard: Shard, shape: Sequence[Any], new_shape: Sequence[Any]) -> Shard | None:
    """The part `shard` of a tensor of `shape` after a reshape; None if it is not one there."""
    old, new = sizes_of(shape, new_shape)
    for old_dims, new_dims in _groups(old, new):
        if shard.dim not in old_dims:
            continue
        old_sizes, new_sizes = [old[d] for d in old_dims], [new[d] for d in new_dims]
        if any(size in _STAND_INS for size in (*old_sizes, *new_sizes)):
            return None
        mask = np.zeros(old_sizes, dtype=bool)
        mask.swapaxes(0, old_dims.index(shard.dim))[shard.index] = True
        mask = mask.reshape(new_sizes)
        for axis, dim in enumerate(new_dims):
            others = tuple(a for a in range(len(new_dims)) if a != axis)
            line = mask.any(axis=others)
            if np.array_equal(line, mask.all(axis=others)):
                return Shard(dim, np.flatnonzero(line))
    return None


def _groups(
    old: Sequence[int], new: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The smallest groups of neighbouring dimensions that a reshape turns into each other."""
    i = j = 0
    while i < len(old) and j < len(new):
        a, b = [i], [j]
        while (x := math.prod(old[d] for d in a)) != (y := math.prod(new[d] for d in b)):
            side, end = (a, len(old)) if x < y else (b, len(new))
            if side[-1] + 1 >= end:
                return
            side.append(side[-1] + 1)
        yield tuple(a), tuple(b)
        i, j = a[-1] + 1, b[-1] + 1
