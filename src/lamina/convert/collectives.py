"""What the tensor-parallel ranks of a replica say to each other: the ops and who carries them out.

A rank's graph contains `lamina::all_reduce` where partial sums meet and `lamina::all_gather` where
parts are put together. The ops name their group by a tag; the process that runs the graph says
with `use_group` what stands behind it. All ranks run the same ops in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lamina.errors import ConfigError

DEFAULT_GROUP = "tensor_parallel"


@dataclass(frozen=True, kw_only=True)
class TensorParallel:
    """Which of the ranks that share a replica's heads and features a model is for."""

    rank: int
    size: int
    group: str = DEFAULT_GROUP
    """The tag of the rank's collectives."""

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.size < 1:
            raise ConfigError(
                f"tensor_parallel_size={self.size} is no number of ranks; use 1 or more"
            )
        if not 0 <= self.rank < self.size:
            raise ConfigError(
                f"tensor-parallel rank {self.rank} does not exist: with tensor_parallel_size="
                f"{self.size} ranks run from 0 to {self.size - 1}"
            )


class Collectives(Protocol):
    """Carries out the collectives of one rank. Both calls block until all ranks have made them."""

    def all_reduce(self, x: torch.Tensor) -> None:
        """Replace `x` (contiguous, of the same shape and dtype on all ranks) by the ranks' sum."""

    def all_gather(self, x: torch.Tensor, num_ranks: int) -> Sequence[torch.Tensor]:
        """Every rank's `x` (contiguous, of the same shape and dtype), in the order of the ranks."""


_GROUPS: dict[str, Collectives] = {}


def use_group(collectives: Collectives | None, group: str = DEFAULT_GROUP) -> None:
    """Say who carries out the collectives of a tag in this process; None: nobody any more."""
    if collectives is None:
        _GROUPS.pop(group, None)
    else:
        _GROUPS[group] = collectives


def _collectives(group: str) -> Collectives:
    if (collectives := _GROUPS.get(group)) is None:
        raise ConfigError(
            f"no process group for {group}: a rank of a tensor-parallel model has to connect to "
            "the others (convert.process_group) and call use_group before its first step"
        )
    return collectives


@torch.library.custom_op("lamina::all_reduce", mutates_args=())
def all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum of all ranks' `x`, a new contiguous tensor."""
    out = x.clone(memory_format=torch.contiguous_format)
    _collectives(group).all_reduce(out)
    return out


@all_reduce.register_fake
def _all_reduce_fake(x: torch.Tensor, group: str) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def all_reduce_in_place(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum of all ranks' `x`, in the memory of `x` if that is contiguous."""
    x = x.contiguous()
    _collectives(group).all_reduce(x)
    return x


@torch.library.custom_op("lamina::all_gather", mutates_args=())
def all_gather(x: torch.Tensor, dim: int, sizes: list[int], group: str) -> torch.Tensor:
    """All ranks' parts along `dim`, in the order of the ranks; a new contiguous tensor.

    Args:
        sizes: every rank's size along `dim`.
    """
    widest = max(sizes)
    if x.shape[dim] < widest:
        padding = list(x.shape)
        padding[dim] = widest - x.shape[dim]
        x = torch.cat((x, x.new_zeros(padding)), dim)
    parts = _collectives(group).all_gather(x.contiguous(), len(sizes))
    return torch.cat(
        [part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim
    )


@all_gather.register_fake
def _all_gather_fake(x: torch.Tensor, dim: int, sizes: list[int], group: str) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] = sum(sizes)
    return x.new_empty(shape)


ALL_REDUCE = torch.ops.lamina.all_reduce.default
ALL_GATHER = torch.ops.lamina.all_gather.default
COLLECTIVES = (ALL_REDUCE, ALL_GATHER)
"""The ops as they appear in graphs."""
