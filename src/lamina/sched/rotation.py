"""Rotational staggered pipelining: who runs which slice of which micro-batch, and when. Pure.

n micro-batches are in flight over r replicas of the model. Tick s belongs to slice s div n of micro-batch
s mod n, and slice k of micro-batch j runs on replica (j + k) mod r. For n = r + 1 that is the paper's
timetable (Lamina, section 4.3): a replica starts a slice every r ticks, no two at once, and an attention
op is hidden completely if it takes no longer than one tick, t_m / (n - 1).
"""

from __future__ import annotations

from collections.abc import Callable


def replica_of(micro_batch: int, slice_index: int, num_replicas: int) -> int:
    """The replica that runs a slice of a micro-batch's step."""
    return (micro_batch + slice_index) % num_replicas


class Turns:
    """Which micro-batch runs its next slice on one replica: the timetable, with late ones passed over."""

    def __init__(self, num_micro_batches: int, replica: int = 0, num_replicas: int = 1) -> None:
        self._num_micro_batches = num_micro_batches
        self._replica = replica
        self._num_replicas = num_replicas
        self._ticks: dict[int, int] = {}
        self._slices: dict[int, int] = {}
        self._now = 0

    @property
    def active(self) -> tuple[int, ...]:
        """Micro-batches whose step has slices left to run here, the next in the timetable first."""
        return tuple(sorted(self._ticks, key=self._ticks.__getitem__))

    def slice_of(self, micro_batch: int) -> int:
        """The slice that the micro-batch runs here next."""
        return self._slices[micro_batch]

    def begin(self, micro_batch: int, num_slices: int) -> None:
        """A step of the micro-batch starts; it has `num_slices` slices in all."""
        raise NotImplementedError

    def next(self, is_ready: Callable[[int], bool]) -> int | None:
        """The micro-batch to run now: the first in the timetable that is ready, else the first, which
        the caller then waits for; None when no step is active."""
        raise NotImplementedError

    def ran(self, micro_batch: int) -> None:
        """The micro-batch's next slice here was run."""
        raise NotImplementedError
