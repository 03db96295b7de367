"""The page allocator keeps sound books under any sequence of calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lamina.attention.spec import AttentionSpec
from lamina.errors import CapacityError
from lamina.kv.pages import Lane, PageAllocator, bytes_per_page, contiguous_runs
from lamina.types import ceil_div


class AllocatorMachine(RuleBasedStateMachine):
    """The allocator against a model that knows lengths only."""

    @initialize(num_pages=st.integers(0, 40), page_tokens=st.sampled_from([1, 3, 16]))
    def start(self, num_pages: int, page_tokens: int) -> None:
        self.pages = PageAllocator(num_pages, page_tokens)
        self.lengths: dict[Lane, int] = {}

    def need(self, num_tokens: int) -> int:
        return ceil_div(num_tokens, self.pages.page_tokens)

    @rule(
        lane=st.tuples(st.integers(0, 2), st.sampled_from([0, 4])),
        num_pages=st.integers(0, 24),
        spare=st.integers(0, 15),
    )
    def resize(self, lane: Lane, num_pages: int, spare: int) -> None:
        num_tokens = max(0, num_pages * self.pages.page_tokens - spare)
        before = self.pages.pages(lane)
        grown = self.need(num_tokens) - self.need(self.lengths.get(lane, 0))
        if grown > self.pages.num_free:
            who = rf"sequence {lane[0]} \(from head unit {lane[1]}\)"
            with pytest.raises(CapacityError, match=f"{who} needs {grown} more"):
                self.pages.resize(lane, num_tokens)
            assert self.pages.pages(lane) == before
            return
        self.pages.resize(lane, num_tokens)
        self.lengths[lane] = num_tokens
        after = self.pages.pages(lane)
        kept = min(len(before), len(after))
        assert after[:kept] == before[:kept], "tokens that stay must stay where they are"

    @rule(lane=st.tuples(st.integers(0, 3), st.sampled_from([0, 4])))
    def release(self, lane: Lane) -> None:
        self.pages.release(lane)
        self.lengths.pop(lane, None)

    @invariant()
    def books_agree(self) -> None:
        assert self.pages.check_integrity() == []
        assert set(self.pages.lanes) == self.lengths.keys()
        used = [page for lane in self.lengths for page in self.pages.pages(lane)]
        assert len(set(used)) == len(used) == self.pages.num_used
        assert self.pages.num_used + self.pages.num_free == self.pages.num_pages
        for lane, length in self.lengths.items():
            assert self.pages.length(lane) == length
            assert len(self.pages.pages(lane)) == self.need(length)


AllocatorMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestAllocator = AllocatorMachine.TestCase


def lane(sequence: int) -> Lane:
    return (sequence, 0)


def test_a_failed_resize_forgets_a_new_lane() -> None:
    pages = PageAllocator(num_pages=2, page_tokens=4)
    with pytest.raises(CapacityError):
        pages.resize(lane(1), 9)
    assert pages.lanes == ()
    assert pages.num_free == 2


def test_a_resize_to_zero_keeps_the_lane_without_pages() -> None:
    pages = PageAllocator(num_pages=2, page_tokens=4)
    pages.resize(lane(1), 5)
    pages.resize(lane(1), 0)
    assert (pages.lanes, pages.num_free, pages.length(lane(1))) == ((lane(1),), 2, 0)


def test_lanes_that_grow_together_stay_contiguous_while_there_is_room() -> None:
    pages = PageAllocator(num_pages=256, page_tokens=1)
    for length in range(1, 17):
        for sequence in range(4):
            pages.resize(lane(sequence), length)
    assert all(len(contiguous_runs(pages.pages(lane(sequence)))) == 1 for sequence in range(4))


def test_all_pages_can_be_used_however_fragmented() -> None:
    pages = PageAllocator(num_pages=9, page_tokens=1)
    for sequence in range(9):
        pages.resize(lane(sequence), 1)
    for sequence in range(0, 9, 2):
        pages.release(lane(sequence))
    pages.resize(lane(100), 5)
    assert pages.num_free == 0
    assert pages.check_integrity() == []


@pytest.mark.parametrize(
    ("corrupt", "problem"),
    [
        (lambda pages: pages._pages[lane(1)].append(pages._pages[lane(2)][0]), "is held by"),
        (lambda pages: pages._pages[lane(1)].__setitem__(0, 99), "does not exist"),
        (lambda pages: pages._free.clear(), "neither owned nor free"),
        (
            lambda pages: pages._lengths.__setitem__(lane(1), 100),
            "sequence 1 (from head unit 0) has 100 tokens",
        ),
        (lambda pages: pages._lengths.pop(lane(2)), "not the lanes with a length"),
        (lambda pages: pages._free.append((9, 9)), "empty, unsorted or touch"),
        (lambda pages: setattr(pages, "_num_free", 1), "counted as free"),
    ],
)
def test_integrity_reports_every_kind_of_damage(corrupt: object, problem: str) -> None:
    pages = PageAllocator(num_pages=8, page_tokens=4)
    pages.resize(lane(1), 5)
    pages.resize(lane(2), 8)
    corrupt(pages)  # type: ignore[operator]
    assert any(problem in line for line in pages.check_integrity())


def test_contiguous_runs() -> None:
    assert contiguous_runs([]) == []
    assert contiguous_runs([4, 5, 6, 2, 1]) == [(4, 6), (2, 2), (1, 1)]


def test_bytes_per_page_counts_every_layers_own_heads_and_sizes() -> None:
    def spec(layer: int, num_kv_heads: int, head_dim_k: int, head_dim_v: int) -> AttentionSpec:
        return AttentionSpec(
            layer=layer,
            num_query_heads=8,
            num_kv_heads=num_kv_heads,
            head_dim_k=head_dim_k,
            head_dim_v=head_dim_v,
            scale=1.0,
        )

    # Keys are padded to multiples of 4, values to multiples of 16, tokens of a page to 16.
    specs = (spec(0, 2, 4, 16), spec(1, 8, 6, 40))
    elements = 32 * (2 * (4 + 16) + 8 * (8 + 48))
    assert bytes_per_page(specs, 32, "bfloat16") == 2 * elements
    assert bytes_per_page(specs, 30, "bfloat16") == 2 * elements
    assert bytes_per_page(specs, 32, "float32") == 4 * elements
    # int8: one float32 per token and head for keys and for values.
    assert bytes_per_page(specs, 32, "int8") == elements + 32 * (2 + 8) * 2 * 4
