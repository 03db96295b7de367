"""Rotational staggered pipelining: who runs which slice of which micro-batch, and when. Pure.

n micro-batches are in flight over r replicas of the model, and slice k of micro-batch j runs on
replica (j + k) mod r. A slice takes r *ticks*; slices of one micro-batch are due n ticks apart (r
if n < r), and no replica has two at once:

    n = 3, r = 2       tick  0   1   2   3   4   5   6   7   8
    replica 0              | A.0   | C.0   | B.1   | A.2   | ...
    replica 1                  | B.0   | A.1   | C.1   | B.2   | ...

For n = r + 1 this is the paper's timetable (Lamina, section 4.3): tick s belongs to slice s div n
of micro-batch s mod n, and an attention op is hidden completely if it takes no longer than one
tick, t_m / (n - 1). In general it may take n - r ticks, t_m (n - r) / r.

A step always starts on replica j mod r, so that layer k of micro-batch j is always computed on the
same replica. Where r does not divide the number of slices, a micro-batch therefore waits at the end
of a step for its replica's turn: up to r - 1 rounds of n ticks per step (none for one replica).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


def replica_of(micro_batch: int, slice_index: int, num_replicas: int) -> int:
    """The replica that runs a slice of a micro-batch's step."""
    return (micro_batch + slice_index) % num_replicas


def ticks_per_round(num_micro_batches: int, num_replicas: int) -> int:
    """Ticks from one slice of a micro-batch to its next one."""
    return max(num_micro_batches, num_replicas)


def first_tick(micro_batch: int, num_micro_batches: int, num_replicas: int) -> int:
    """The tick in which the micro-batch's slice 0 starts; slice k starts k rounds later.

    On replica p, micro-batch j starts at ticks f_j + n ((p - j) mod r) + any number of n r. These
    are r ticks apart for different j, on every replica, if f_j = a_j + n ((j - d_j) mod r) with a_j
    = n d_j (mod r), 0 <= a_j < n, and pairs (a_j, d_j) that are all different; there are exactly n
    such pairs. For n = r + 1 the result is j.
    """
    n, r = ticks_per_round(num_micro_batches, num_replicas), num_replicas
    common = math.gcd(n, r)
    group, member = divmod(micro_batch, common)
    d = group * pow(n // common, -1, r // common) % (r // common) + member * (r // common)
    return group * common + n * ((micro_batch - d) % r)


class Booking(NamedTuple):
    """A slice in the timetable. It occupies its replica for `num_replicas` ticks."""

    tick: int
    replica: int
    micro_batch: int
    slice_index: int


def timetable(num_micro_batches: int, num_replicas: int, num_slices: int) -> list[Booking]:
    """One step of every micro-batch, by ticks; the next steps follow `timetable_ticks` later."""
    n, r = num_micro_batches, num_replicas
    return sorted(
        Booking(
            first_tick(j, n, r) + k * ticks_per_round(n, r), replica_of(j, k, num_replicas), j, k
        )
        for j in range(n)
        for k in range(num_slices)
    )


def timetable_ticks(num_micro_batches: int, num_replicas: int, num_slices: int) -> int:
    """Ticks from one step of a micro-batch to its next: whole turns over all replicas."""
    num_rounds = num_slices + -num_slices % num_replicas
    return num_rounds * ticks_per_round(num_micro_batches, num_replicas)


class Turns:
    """Which micro-batch runs its next slice on one replica: the timetable, with late ones passed
    over.

    Times differ from tick to tick, so only the timetable's order is kept. A micro-batch that was
    not ready in its turn goes first when it is; steps may start at any time and take the next turn
    that is theirs; numbers without a step cost nothing.
    """

    def __init__(self, num_micro_batches: int, replica: int = 0, num_replicas: int = 1) -> None:
        """
        Args:
            num_micro_batches: as many as will ever be in flight at once.
        """
        self._replica = replica
        self._num_replicas = num_replicas
        self._round = ticks_per_round(num_micro_batches, num_replicas)
        self._first_ticks = [
            first_tick(j, num_micro_batches, num_replicas) for j in range(num_micro_batches)
        ]
        self._ticks: dict[int, int] = {}
        self._slices: dict[int, int] = {}
        self._num_slices: dict[int, int] = {}
        self._now = -1  # the latest tick whose slice was run

    @property
    def active(self) -> tuple[int, ...]:
        """Micro-batches whose step has slices left to run here, the next in the timetable first."""
        return tuple(sorted(self._ticks, key=self._ticks.__getitem__))

    def slice_of(self, micro_batch: int) -> int:
        """The slice that the micro-batch runs here next."""
        return self._slices[micro_batch]

    def begin(self, micro_batch: int, num_slices: int) -> None:
        """A step of the micro-batch starts; it has `num_slices` slices in all.

        Call it on every replica, when the micro-batch's last step is through everywhere.
        """
        assert micro_batch not in self._ticks, f"micro-batch {micro_batch} still has slices to run"
        self._book(micro_batch, (self._replica - micro_batch) % self._num_replicas, num_slices)

    def next(self, is_ready: Callable[[int], bool]) -> int | None:
        """The micro-batch to run now: the first in the timetable that is ready, else the first,
        which the caller then waits for (or for whichever of `active` is ready first); None when no
        step is active."""
        active = self.active
        for micro_batch in active:
            if is_ready(micro_batch):
                return micro_batch
        return active[0] if active else None

    def ran(self, micro_batch: int) -> None:
        """The micro-batch's next slice here was run (or is now running)."""
        self._now = max(self._now, self._ticks.pop(micro_batch))
        self._book(
            micro_batch,
            self._slices.pop(micro_batch) + self._num_replicas,
            self._num_slices.pop(micro_batch),
        )

    def _book(self, micro_batch: int, slice_index: int, num_slices: int) -> None:
        """Give a slice the next tick that is the micro-batch's on this replica."""
        if slice_index >= num_slices:
            return
        cycle = self._round * self._num_replicas
        tick = self._first_ticks[micro_batch] + slice_index * self._round
        earliest = self._now + 1
        self._ticks[micro_batch] = earliest + (tick - earliest) % cycle
        self._slices[micro_batch] = slice_index
        self._num_slices[micro_batch] = num_slices
