"""Which page holds which tokens of which lane. Pure bookkeeping: no tensors, no torch.

A *lane* is a sequence's tokens for some head units (`types.ExecutorPlan`). Every executor owns one
`PageAllocator`. Pages are handed out so that a lane's tokens lie in as few contiguous runs as
possible: attention reads faster where the next page is the next in memory. A lane grows into the
page after its last one while that is free; a run that must start elsewhere starts in the middle of
the largest free gap, which leaves room to grow for it and for its neighbour.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from lamina import _native
from lamina.attention.spec import AttentionSpec
from lamina.errors import CapacityError
from lamina.types import ceil_div


def bytes_per_page(specs: Sequence[AttentionSpec], page_tokens: int, cache_dtype: str) -> int:
    """Bytes of one page over all layers of `specs` (the heads of a lane), padding included.

    Args:
        page_tokens: tokens per page; memory is laid out for the next multiple of 16.
        cache_dtype: float32, float16, bfloat16 or int8.
    """
    return _native.page_bytes(layer_specs(specs, [None] * len(specs)), cache_dtype, page_tokens)


def cache_dtype_name(kv_cache_dtype: str, dtype: str) -> str:
    """The cache's dtype from the setting (`auto` or `int8`) and the model's dtype."""
    return dtype if kv_cache_dtype == "auto" else kv_cache_dtype


def layer_specs(
    specs: Sequence[AttentionSpec], sinks: Sequence[Sequence[float] | None]
) -> list[_native.LayerSpec]:
    """Specs of a lane's heads as the native side takes them.

    Args:
        sinks: per layer those of the query heads of all lanes of a sequence, if any.
    """
    return [
        _native.LayerSpec(
            query_heads=spec.num_query_heads,
            kv_heads=spec.num_kv_heads,
            head_dim_k=spec.head_dim_k,
            head_dim_v=spec.head_dim_v,
            scale=spec.scale,
            window=spec.window or 0,
            softcap=spec.softcap or 0.0,
            sinks=list(values or ()),
        )
        for spec, values in zip(specs, sinks, strict=True)
    ]


Lane = tuple[int, int]
"""A sequence (the engine's number) and the first head unit that the lane has of it."""


def lane_name(lane: Lane) -> str:
    """For messages."""
    sequence, unit = lane
    return f"sequence {sequence} (from head unit {unit})"


class PageAllocator:
    """Pages of `page_tokens` tokens, each free or owned by exactly one lane.

    Not thread-safe: its executor's thread alone uses it.
    """

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        assert num_pages >= 0, "num_pages counts pages"
        assert page_tokens >= 1, "a page holds at least one token"
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._pages: dict[Lane, list[int]] = {}
        self._lengths: dict[Lane, int] = {}
        # Free pages as sorted runs [start, stop) that do not touch; num_free caches their total.
        self._free: list[tuple[int, int]] = [(0, num_pages)] if num_pages else []
        self._num_free = num_pages

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_used(self) -> int:
        return self.num_pages - self._num_free

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The lanes known here, in the order in which they came."""
        return tuple(self._pages)

    def pages(self, lane: Lane) -> list[int]:
        """The lane's pages in token order (a copy); empty for an unknown lane."""
        return list(self._pages.get(lane, ()))

    def append_pages(self, lane: Lane, to: array[int]) -> int:
        """Append the lane's pages in token order; returns how many (none of an unknown lane)."""
        owned = self._pages.get(lane, [])
        to.fromlist(owned)
        return len(owned)

    def length(self, lane: Lane) -> int:
        """Tokens of the lane; 0 for an unknown lane."""
        return self._lengths.get(lane, 0)

    def resize(self, lane: Lane, num_tokens: int) -> None:
        """Truncate or extend a lane to `num_tokens` tokens; an unknown one starts empty.

        Raises:
            CapacityError: too few free pages; nothing has changed.
        """
        assert num_tokens >= 0, "a length is not negative"
        owned = self._pages.get(lane)
        if owned is None:
            owned = []
        elif (len(owned) - 1) * self.page_tokens < num_tokens <= len(owned) * self.page_tokens:
            self._lengths[lane] = num_tokens
            return
        missing = ceil_div(num_tokens, self.page_tokens) - len(owned)
        if missing > self._num_free:
            raise CapacityError(
                f"{lane_name(lane)} needs {missing} more KV pages for {num_tokens} tokens, "
                f"{self._num_free} of {self.num_pages} are free; give the attention worker more "
                "memory or run fewer or shorter sequences"
            )
        self._pages[lane] = owned
        self._lengths[lane] = num_tokens
        if missing < 0:
            dropped = owned[missing:]
            del owned[missing:]
            self._give_back(dropped)
        while missing > 0:
            start, stop = self._take_run(missing, after=owned[-1] if owned else None)
            owned.extend(range(start, stop))
            missing -= stop - start

    def release(self, lane: Lane) -> None:
        """Free all pages of a lane and forget it. Idempotent."""
        self._lengths.pop(lane, None)
        self._give_back(self._pages.pop(lane, []))

    def check_integrity(self) -> list[str]:
        """Everything that is wrong with the books, one sentence each; empty when they are sound."""
        problems = []
        owner: dict[int, str] = {}
        claims = [(lane_name(lane), page) for lane, pages in self._pages.items() for page in pages]
        claims += [("the free list", page) for run in self._free for page in range(*run)]
        for who, page in claims:
            if not 0 <= page < self.num_pages:
                problems.append(f"{who} holds page {page}, which does not exist")
            elif page in owner:
                problems.append(f"page {page} is held by {owner[page]} and by {who}")
            owner[page] = who
        lost = [page for page in range(self.num_pages) if page not in owner]
        if lost:
            problems.append(f"{len(lost)} pages are neither owned nor free, the first is {lost[0]}")
        if self._pages.keys() != self._lengths.keys():
            problems.append("the lanes with pages are not the lanes with a length")
        for lane, length in self._lengths.items():
            need, have = ceil_div(length, self.page_tokens), len(self._pages.get(lane, ()))
            if need != have:
                problems.append(
                    f"{lane_name(lane)} has {length} tokens and {have} pages, not {need}"
                )
        num_free = sum(stop - start for start, stop in self._free)
        if num_free != self._num_free:
            problems.append(f"{num_free} pages are free but {self._num_free} are counted as free")
        if any(start >= stop for start, stop in self._free) or any(
            left[1] >= right[0] for left, right in zip(self._free, self._free[1:], strict=False)
        ):
            problems.append(f"the free runs are empty, unsorted or touch: {self._free}")
        return problems

    def _take_run(self, wanted: int, after: int | None) -> tuple[int, int]:
        """Remove up to `wanted` (at least one) contiguous pages from the free runs."""
        if after is not None:
            index = bisect_left(self._free, (after + 1, 0))
            if index < len(self._free) and self._free[index][0] == after + 1:
                run_start, run_stop = self._free[index]
                return self._cut(index, run_start, min(run_start + wanted, run_stop))
        index = max(range(len(self._free)), key=lambda i: self._free[i][1] - self._free[i][0])
        run_start, run_stop = self._free[index]
        size = min(wanted, run_stop - run_start)
        # Nobody grows into a gap at the very start of the memory: no need to leave room there.
        start = run_start + (run_stop - run_start - size) // 2 if run_start else 0
        return self._cut(index, start, start + size)

    def _cut(self, index: int, start: int, stop: int) -> tuple[int, int]:
        run_start, run_stop = self._free[index]
        rest = [(run_start, start), (stop, run_stop)]
        self._free[index : index + 1] = [run for run in rest if run[0] < run[1]]
        self._num_free -= stop - start
        return start, stop

    def _give_back(self, pages: list[int]) -> None:
        for first, last in contiguous_runs(pages):
            start, stop = first, last + 1
            index = bisect_right(self._free, (start, stop))
            if index < len(self._free) and self._free[index][0] == stop:
                stop = self._free.pop(index)[1]
            if index and self._free[index - 1][1] == start:
                index -= 1
                start = self._free.pop(index)[0]
            self._free.insert(index, (start, stop))
        self._num_free += len(pages)


def contiguous_runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Split a list of pages where a page does not follow its predecessor.

    Returns:
        (first page, last page) of each run, in order: [4, 5, 6, 2] -> [(4, 6), (2, 2)].
    """
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and runs[-1][1] + 1 == page:
            runs[-1] = (runs[-1][0], page)
        else:
            runs.append((page, page))
    return runs
