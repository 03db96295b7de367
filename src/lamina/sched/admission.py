"""Page budgets and placements: may a sequence start, where does its KV go.

The engine mirrors the page counts of every executor by arithmetic and never asks. A page holds
`page_tokens` tokens of one sequence, in all layers, for the heads of its executor.
"""

from __future__ import annotations

from collections.abc import Mapping

from lamina.errors import CapacityError
from lamina.types import LOCAL, ceil_div


class PageBudget:
    """Mirror of the executors' allocators."""

    def __init__(self, page_tokens: int, capacity_pages: Mapping[int, int]) -> None:
        self.page_tokens = page_tokens
        self.capacity_pages = dict(capacity_pages)
        self._held: dict[int, dict[int, int]] = {e: {} for e in capacity_pages}
        self._used: dict[int, int] = dict.fromkeys(capacity_pages, 0)

    def used(self, executor: int) -> int:
        return self._used[executor]

    def free(self, executor: int) -> int:
        return self.capacity_pages[executor] - self._used[executor]

    def sequences(self, executor: int) -> set[int]:
        return set(self._held[executor])

    def missing(self, executor: int, sequence: int, num_tokens: int) -> int:
        """Pages that the sequence lacks on the executor to hold `num_tokens`."""
        need = ceil_div(num_tokens, self.page_tokens)
        return max(0, need - self._held[executor].get(sequence, 0))

    def fits(self, executor: int, sequence: int, num_tokens: int) -> bool:
        return self.missing(executor, sequence, num_tokens) <= self.free(executor)

    def reserve(self, executor: int, sequence: int, num_tokens: int) -> None:
        """Hold pages for `num_tokens`; CapacityError (and no change) when they do not fit."""
        missing = self.missing(executor, sequence, num_tokens)
        if missing > self.free(executor):
            raise CapacityError(
                f"executor {executor} has {self.free(executor)} free pages, "
                f"sequence {sequence} needs {missing} more"
            )
        held = self._held[executor]
        held[sequence] = held.get(sequence, 0) + missing
        self._used[executor] += missing

    def release(self, executor: int, sequence: int) -> bool:
        """Give back all the sequence's pages on the executor; False if it held none."""
        pages = self._held[executor].pop(sequence, None)
        self._used[executor] -= pages or 0
        return pages is not None


class Admission:
    """Chooses placements: every remote executor (partition by heads), one of them (by requests), or
    the local one where there are no others."""

    def __init__(self, budget: PageBudget, *, by_requests: bool) -> None:
        self._budget = budget
        self._remote = tuple(sorted(e for e in budget.capacity_pages if e != LOCAL))
        self._by_requests = by_requests

    @property
    def max_tokens(self) -> int:
        """Longest sequence that can be placed when nothing else is."""
        budget = self._budget
        pages = {e: budget.capacity_pages[e] for e in (LOCAL, *self._remote)}
        remote = [pages[e] for e in self._remote]
        kept = (max(remote) if self._by_requests else min(remote)) if remote else pages[LOCAL]
        return min(kept, pages[LOCAL]) * budget.page_tokens

    def place(self, sequence: int, num_tokens: int, *, keep_free: int) -> tuple[int, ...] | None:
        """Reserve pages for a sequence of `num_tokens` whose rows will attend locally at first.

        Args:
            keep_free: pages that must stay free on each executor of the placement.

        Returns:
            The placement, or None (and no change) when the pages are not there now.
        """
        budget = self._budget
        if not self._remote:
            placement: tuple[int, ...] = (LOCAL,)
        elif self._by_requests:
            placement = (max(self._remote, key=lambda e: (budget.free(e), -e)),)
        else:
            placement = self._remote
        for executor in placement:
            missing = budget.missing(executor, sequence, num_tokens)
            if missing + keep_free > budget.free(executor):
                return None
        if not budget.fits(LOCAL, sequence, num_tokens):
            return None
        for executor in {LOCAL, *placement}:
            budget.reserve(executor, sequence, num_tokens)
        return placement
