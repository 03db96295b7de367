"""Page budgets: the engine mirrors the page counts of every executor by arithmetic and never asks.

Executors keep KV in lanes of `page_units` head units (`types.ExecutorPlan`). A lane page holds
`page_tokens` tokens of one sequence, in all layers, for the heads of one lane.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lamina.errors import CapacityError
from lamina.types import Share, ceil_div


class PageBudget:
    """Mirror of the executors' allocators. All counts are of lane pages."""

    def __init__(
        self, page_tokens: int, capacity_pages: Mapping[int, int], page_units: Mapping[int, int]
    ) -> None:
        """
        Args:
            capacity_pages: pages of each executor.
            page_units: head units of a page of each executor.
        """
        assert capacity_pages.keys() == page_units.keys(), "every executor has pages of some size"
        self.page_tokens = page_tokens
        self.capacity_pages = dict(capacity_pages)
        self.page_units = dict(page_units)
        self._held: dict[int, dict[int, int]] = {e: {} for e in capacity_pages}
        self._used: dict[int, int] = dict.fromkeys(capacity_pages, 0)

    def used(self, executor: int) -> int:
        return self._used[executor]

    def free(self, executor: int) -> int:
        return self.capacity_pages[executor] - self._used[executor]

    def sequences(self, executor: int) -> set[int]:
        return set(self._held[executor])

    def holds(self, executor: int, sequence: int) -> bool:
        """Whether the sequence has pages on the executor."""
        return sequence in self._held[executor]

    def pages(self, share: Share, num_tokens: int) -> int:
        """Pages of a share of a sequence of `num_tokens` tokens."""
        lanes = share.num_units // self.page_units[share.executor]
        return lanes * ceil_div(share.num_tokens(num_tokens), self.page_tokens)

    def missing(self, sequence: int, shares: Iterable[Share], num_tokens: int) -> dict[int, int]:
        """Pages that the sequence lacks on each executor to hold `num_tokens` in these shares,
        where it lacks any."""
        need: dict[int, int] = {}
        for share in shares:
            pages = self.pages(share, num_tokens)
            need[share.executor] = need.get(share.executor, 0) + pages
        missing = {e: pages - self._held[e].get(sequence, 0) for e, pages in need.items()}
        return {e: pages for e, pages in missing.items() if pages > 0}

    def lacking(self, missing: Mapping[int, int]) -> set[int]:
        """Executors that have fewer free pages than are missing there."""
        return {e for e, pages in missing.items() if pages > self.free(e)}

    def reserve(self, sequence: int, missing: Mapping[int, int]) -> None:
        """Hold more pages for a sequence; CapacityError (and no change) when they do not fit."""
        for executor in self.lacking(missing):
            raise CapacityError(
                f"executor {executor} has {self.free(executor)} free pages, "
                f"sequence {sequence} needs {missing[executor]} more"
            )
        for executor, pages in missing.items():
            held = self._held[executor]
            held[sequence] = held.get(sequence, 0) + pages
            self._used[executor] += pages

    def release(self, executor: int, sequence: int) -> bool:
        """Give back all the sequence's pages on the executor; False if it held none."""
        pages = self._held[executor].pop(sequence, None)
        self._used[executor] -= pages or 0
        return pages is not None
