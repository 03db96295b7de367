"""Placement on a decode instance that may offload: `sched.offload` decides for each newcomer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lamina.sched.budget import PageBudget
from lamina.sched.offload import Bounds, Load, decide
from lamina.sched.placement import Placer
from lamina.sched.sequence import Sequence
from lamina.types import LOCAL, Share

OWN = 1
"""Executor that stands for the decode instance's own memory."""


class OffloadPlacer(Placer):
    """Everything on the decode instance, except what the policy sends to the prefill instances'
    executors (2, 3, ...), of which the one with the most free pages takes it."""

    def __init__(self, budget: PageBudget, units: int, bounds: Bounds) -> None:
        super().__init__(budget, units, "requests")
        self.bounds = bounds
        self.num_placed = 0
        self.num_offloaded = 0
        """Of those placed; a sequence that was preempted is placed again."""
        self.sequence_of: Callable[[int], Sequence] | None = None
        """Set by who makes the batcher."""
        self._executors = tuple(e for e in sorted(budget.capacity_pages) if e not in (LOCAL, OWN))

    def load(self, executor: int) -> Load:
        """The sequences on one executor."""
        assert self.sequence_of is not None, "the batcher is known before anything is placed"
        sequences = self._budget.sequences(executor)
        return Load(
            num_sequences=len(sequences),
            num_tokens=sum(self.sequence_of(s).num_tokens for s in sequences),
        )

    def place(
        self, num_tokens: int, longest: int, keep_free: Mapping[int, int]
    ) -> tuple[Share, ...] | None:
        executor = OWN
        if self._executors and self.bounds.ratio > 0:
            loads = [self.load(e) for e in self._executors]
            offloaded = Load(
                num_sequences=sum(load.num_sequences for load in loads),
                num_tokens=sum(load.num_tokens for load in loads),
            )
            if decide(self.bounds, self.load(OWN), offloaded, longest).offload:
                best = max(self._executors, key=lambda e: (self._budget.free(e), -e))
                if self._fits(best, num_tokens, longest, keep_free):
                    executor = best
        if not self._fits(executor, num_tokens, longest, keep_free):
            return None
        self.num_placed += 1
        self.num_offloaded += executor != OWN
        return (Share(executor, 0, self.units),)

    def _fits(
        self, executor: int, num_tokens: int, longest: int, keep_free: Mapping[int, int]
    ) -> bool:
        budget = self._budget
        share = Share(executor, 0, self.units)
        room = budget.free(executor) - keep_free.get(executor, 0)
        return (
            budget.pages(share, num_tokens) <= room
            and budget.pages(share, longest) <= budget.capacity_pages[executor]
        )
