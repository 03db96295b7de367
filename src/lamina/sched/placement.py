"""Where a new sequence's KV goes: shares for the attention workers by their weights and free pages.

heads: contiguous head units of every token, as many for each worker as bring the load of all
running sequences closest to the weights. requests: everything on one worker. tokens: page-aligned
ranges of the length that the sequence may reach, the last one open. Shares never change while a
sequence runs; new sequences make up for what older ones have tilted, and for weights that have
changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from lamina.sched.budget import PageBudget
from lamina.types import LOCAL, Share, ceil_div

Mode = Literal["heads", "requests", "tokens"]


class Placer:
    """Chooses placements, and reserves nothing.

    With no remote executors everything stays local.
    """

    def __init__(
        self,
        budget: PageBudget,
        units: int,
        mode: Mode,
        *,
        spill: bool = False,
        weights: Mapping[int, float] | None = None,
    ) -> None:
        """
        Args:
            units: head units of the model.
            spill: sequences that may outgrow what `mode` can hold are shared by tokens.
            weights: of the remote executors; default: equal ones.
        """
        self.units = units
        self.mode = mode
        self._budget = budget
        self._remote = tuple(sorted(e for e in budget.capacity_pages if e != LOCAL))
        self._spill = spill and bool(self._remote)
        grains = {budget.page_units[e] for e in self._remote}
        assert len(grains) <= 1, "remote executors have pages of one size"
        self._grain = grains.pop() if grains else units
        self.local_share = Share(LOCAL, 0, units)
        """Where the rows of prompts in progress attend."""
        self.weights: dict[int, float] = dict.fromkeys(self._remote, 1.0)
        """Of each remote executor, as ratios; may be changed at any time, for later placements."""
        self.weights.update(weights or {})
        self._mode_tokens = self._most_tokens(mode)

    @property
    def max_tokens(self) -> int:
        """Longest sequence that can be placed when nothing else is."""
        local = self._most_pages([LOCAL]) * self._budget.page_tokens
        kept = max(self._mode_tokens, self._most_tokens("tokens") if self._spill else 0)
        return min(local, kept) if self._remote else local

    def place(
        self, num_tokens: int, longest: int, keep_free: Mapping[int, int]
    ) -> tuple[Share, ...] | None:
        """Shares for a sequence of `num_tokens` whose rows will attend locally at first.

        Args:
            longest: tokens that it may reach, at most `max_tokens`.
            keep_free: pages that must stay free on executors.

        Returns:
            The placement, without the pages of the local executor for the prompt, for which there
            is room too; None when the pages are not there now.
        """
        budget = self._budget
        room = {e: max(0, budget.free(e) - keep_free.get(e, 0)) for e in budget.capacity_pages}
        room[LOCAL] = budget.free(LOCAL) - (0 if self._remote else keep_free.get(LOCAL, 0))
        if budget.pages(self.local_share, num_tokens) > room[LOCAL]:
            return None
        if not self._remote:
            return (self.local_share,)
        mode = self.mode
        if self._spill and longest > self._mode_tokens:
            mode = "tokens"
        match mode:
            case "heads":
                return self._by_heads(num_tokens, longest, room)
            case "requests":
                return self._by_requests(num_tokens, longest, room)
            case "tokens":
                return self._by_tokens(num_tokens, longest, room)

    def _by_heads(
        self, num_tokens: int, longest: int, room: Mapping[int, int]
    ) -> tuple[Share, ...] | None:
        """As many lanes for each worker as keep all loads closest to the weights."""
        budget, page, grain = self._budget, self._budget.page_tokens, self._grain
        now, full = ceil_div(num_tokens, page), ceil_div(longest, page)
        counts = share_out(
            self.units // grain,
            {e: self._load(e) / (grain * now) for e in self._remote},
            self.weights,
            {e: min(room[e] // now, budget.capacity_pages[e] // full) for e in self._remote},
        )
        if counts is None:
            return None
        shares = []
        start = 0
        for executor in self._remote:
            stop = start + counts[executor] * grain
            if stop > start:
                shares.append(Share(executor, start, stop))
            start = stop
        return tuple(shares)

    def _by_requests(
        self, num_tokens: int, longest: int, room: Mapping[int, int]
    ) -> tuple[Share, ...] | None:
        """The worker that is the least loaded relative to its weight, of those with room."""
        budget = self._budget
        best: tuple[float, Share] | None = None
        for executor in self._remote:
            share = Share(executor, 0, self.units)
            pages = budget.pages(share, num_tokens)
            if pages > room[executor]:
                continue
            if budget.pages(share, longest) > budget.capacity_pages[executor]:
                continue
            load = self._load(executor) + pages * budget.page_units[executor]
            level = load / self.weights[executor]
            if best is None or level < best[0]:
                best = level, share
        return None if best is None else (best[1],)

    def _by_tokens(
        self, num_tokens: int, longest: int, room: Mapping[int, int]
    ) -> tuple[Share, ...] | None:
        """Ranges of the final length by weight; within free memory if it is there, else within
        all."""
        budget, page = self._budget, self._budget.page_tokens
        lanes = {e: self.units // budget.page_units[e] for e in self._remote}
        loads = {e: self._load(e) / self.units for e in self._remote}
        num_pages = ceil_div(longest, page)
        # The least loaded first: of a sequence that has just begun, the first ranges alone are
        # filled.
        order = sorted(self._remote, key=lambda e: (loads[e] / self.weights[e], e))
        for limit in (room, budget.capacity_pages):
            caps = {e: limit[e] // lanes[e] for e in self._remote}
            counts = share_out(num_pages, loads, self.weights, caps)
            if counts is None:
                continue
            shares = _token_ranges([(e, counts[e]) for e in order], self.units, page)
            if all(budget.pages(s, num_tokens) <= room[s.executor] for s in shares):
                return shares
        return None

    def _load(self, executor: int) -> float:
        """Reserved pages, in head units."""
        return self._budget.used(executor) * self._budget.page_units[executor]

    def _most_pages(self, executors: Iterable[int]) -> int:
        """Pages of all units that the executors hold together."""
        budget = self._budget
        return sum(
            budget.capacity_pages[e] // (self.units // budget.page_units[e]) for e in executors
        )

    def _most_tokens(self, mode: Mode) -> int:
        """Longest sequence that the remote executors can hold alone, by one way to share it out."""
        budget = self._budget
        if not self._remote:
            pages = 0
        elif mode == "tokens":
            pages = self._most_pages(self._remote)
        elif mode == "requests":
            pages = max(self._most_pages([e]) for e in self._remote)
        else:
            # The most pages p for which the workers' lanes of p pages cover all units.
            low, high = 0, max(budget.capacity_pages[e] for e in self._remote)
            while low < high:
                middle = (low + high + 1) // 2
                lanes = sum(budget.capacity_pages[e] // middle for e in self._remote)
                low, high = (
                    (middle, high) if lanes * self._grain >= self.units else (low, middle - 1)
                )
            pages = low
        return pages * budget.page_tokens


def _token_ranges(
    counts: Iterable[tuple[int, int]], units: int, page_tokens: int
) -> tuple[Share, ...]:
    """Consecutive ranges of (executor, pages), the last one open."""
    held = [(executor, count) for executor, count in counts if count]
    shares = []
    start = 0
    for index, (executor, count) in enumerate(held):
        stop = start + count * page_tokens
        is_last = index == len(held) - 1
        shares.append(Share(executor, 0, units, start, None if is_last else stop))
        start = stop
    return tuple(shares)


def share_out(
    total: int,
    loads: Mapping[int, float],
    weights: Mapping[int, float],
    capacities: Mapping[int, int],
) -> dict[int, int] | None:
    """Deal out `total` equal pieces so that the highest load by weight gets as low as it can.

    Args:
        loads: what each worker has already, in pieces.
        weights: of each worker, above 0.
        capacities: most pieces that each worker takes.

    Returns:
        Pieces for each worker; None when the capacities do not suffice.
    """
    if sum(capacities.values()) < total:
        return None

    def filled(level: float) -> dict[int, int]:
        return {
            e: min(capacities[e], max(0, math.floor(level * weights[e] - loads[e]))) for e in loads
        }

    low, high = 0.0, max((loads[e] + total) / weights[e] for e in loads)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(filled(middle).values()) <= total else (low, middle)
    counts = filled(low)
    for _ in range(total - sum(counts.values())):
        best = min(
            (e for e in counts if counts[e] < capacities[e]),
            key=lambda e: ((loads[e] + counts[e] + 1) / weights[e], e),
        )
        counts[best] += 1
    return counts
