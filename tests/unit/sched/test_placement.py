"""Placements cover everything once, follow the weights, and fit."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import CapacityError
from lamina.sched.budget import PageBudget
from lamina.sched.placement import Mode, Placer, share_out
from lamina.types import LOCAL, Share, ceil_div

PAGE = 16
UNITS = 8


def make_placer(
    pages: list[int],
    mode: Mode,
    *,
    weights: dict[int, float] | None = None,
    spill: bool = False,
    local_pages: int = 10_000,
) -> tuple[Placer, PageBudget]:
    """Remote executors 1, 2, ... with these many pages (of one unit where heads are shared)."""
    capacity = {LOCAL: local_pages, **dict(enumerate(pages, start=1))}
    units = {e: 1 if e != LOCAL and mode == "heads" else UNITS for e in capacity}
    budget = PageBudget(PAGE, capacity, units)
    return Placer(budget, UNITS, mode, weights=weights, spill=spill), budget


def place(
    placer: Placer, budget: PageBudget, sequence: int, num_tokens: int, longest: int | None = None
) -> tuple[Share, ...] | None:
    shares = placer.place(num_tokens, longest or num_tokens, {})
    if shares is not None:
        budget.reserve(sequence, budget.missing(sequence, shares, num_tokens))
    return shares


def check_cover(shares: tuple[Share, ...], length: int) -> None:
    """Every unit of every token up to `length` lies in exactly one share; one end is open."""
    for unit in range(UNITS):
        mine = sorted(
            (s for s in shares if s.unit_start <= unit < s.unit_stop), key=lambda s: s.token_start
        )
        assert mine[0].token_start == 0
        assert mine[-1].token_stop is None
        for left, right in itertools.pairwise(mine):
            assert left.token_stop == right.token_start
            assert right.token_start % PAGE == 0
        assert sum(s.num_tokens(length) for s in mine) == length
    assert len({s.executor for s in shares}) == len(shares)


@settings(max_examples=300, deadline=None)
@given(
    mode=st.sampled_from(["heads", "requests", "tokens"]),
    pages=st.lists(st.integers(8, 80), min_size=1, max_size=5),
    weights=st.lists(st.floats(0.05, 20), min_size=5, max_size=5),
    spill=st.booleans(),
    data=st.data(),
)
def test_placements_cover_once_and_fit(
    mode: Mode, pages: list[int], weights: list[float], spill: bool, data: st.DataObject
) -> None:
    by_worker = dict(zip(range(1, len(pages) + 1), weights, strict=False))
    placer, budget = make_placer(pages, mode, weights=by_worker, spill=spill, local_pages=40)
    if placer.max_tokens == 0:
        return
    for sequence in range(12):
        longest = data.draw(st.integers(1, placer.max_tokens))
        num_tokens = data.draw(st.integers(1, longest))
        keep_free = data.draw(st.dictionaries(st.integers(0, len(pages)), st.integers(0, 5)))
        free = {e: budget.free(e) for e in budget.capacity_pages}
        shares = placer.place(num_tokens, longest, keep_free)
        if shares is None:
            assert sequence > 0 or keep_free, "an empty system takes every sequence"
            continue
        check_cover(shares, longest)
        for share in shares:
            assert budget.pages(share, longest) <= budget.capacity_pages[share.executor], (
                "it can grow to its end where it is"
            )
            if needed := budget.pages(share, num_tokens):
                assert needed + keep_free.get(share.executor, 0) <= free[share.executor]
        budget.reserve(sequence, budget.missing(sequence, shares, num_tokens))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (5.0, 3.0), (1.0, 4.0), (1.0, 0.01), (3, 2, 1)])
def test_cumulative_load_of_heads_follows_the_weights(weights: tuple[float, ...]) -> None:
    placer, budget = make_placer(
        [10_000] * len(weights), "heads", weights=dict(enumerate(weights, start=1))
    )
    for sequence in range(60):
        assert place(placer, budget, sequence, 64 + 16 * (sequence % 5))
    used = [budget.used(e) for e in placer.weights]
    for pages, weight in zip(used, weights, strict=True):
        want = sum(used) * weight / sum(weights)
        assert abs(pages - want) <= 9, "within a unit of one sequence"


def test_five_and_three_of_eight_heads() -> None:
    placer, budget = make_placer([1000, 1000], "heads", weights={1: 5.0, 2: 3.0})
    assert place(placer, budget, 1, 64) == (Share(1, 0, 5), Share(2, 5, 8))


def test_a_worker_may_get_no_head_of_a_sequence() -> None:
    placer, budget = make_placer([1000, 1000], "heads", weights={1: 1.0, 2: 0.01})
    assert place(placer, budget, 1, 64) == (Share(1, 0, 8),)


def test_weights_that_change_are_made_up_for_by_new_sequences() -> None:
    placer, budget = make_placer([10_000, 10_000], "heads")
    for sequence in range(10):
        place(placer, budget, sequence, 160)
    assert budget.used(1) == budget.used(2)
    placer.weights[1] = 3.0
    for sequence in range(10, 20):
        place(placer, budget, sequence, 160)
    assert budget.used(1) == 3 * budget.used(2)


def test_heads_yield_to_memory() -> None:
    placer, budget = make_placer([4 * 6, 4 * 2], "heads")
    assert place(placer, budget, 1, 4 * PAGE) == (Share(1, 0, 6), Share(2, 6, 8))
    assert place(placer, budget, 2, PAGE) is None
    assert placer.max_tokens == 4 * PAGE


def test_requests_go_where_the_load_is_lowest_by_weight() -> None:
    placer, budget = make_placer([100, 100], "requests", weights={1: 2.0, 2: 1.0})
    executors = [
        shares[0].executor
        for sequence in range(6)
        if (shares := place(placer, budget, sequence, 4 * PAGE))
    ]
    assert executors.count(1) == 4
    assert executors.count(2) == 2
    full, budget = make_placer([100, 3], "requests")
    place(full, budget, 1, 4 * PAGE)
    shares = place(full, budget, 2, 4 * PAGE)
    assert shares == (Share(1, 0, UNITS),), "the other one is too small"


def test_tokens_are_ranges_of_the_final_length() -> None:
    placer, budget = make_placer([100, 100], "tokens", weights={1: 3.0, 2: 1.0})
    assert place(placer, budget, 1, 20, longest=8 * PAGE) == (
        Share(1, 0, UNITS, 0, 6 * PAGE),
        Share(2, 0, UNITS, 6 * PAGE, None),
    )
    assert budget.used(1) == 2
    assert budget.used(2) == 0, "no token is there yet"
    second = place(placer, budget, 2, 20, longest=4 * PAGE)
    assert second is not None
    assert second[0].executor == 2, "the least loaded begins"


def test_a_context_larger_than_each_worker_is_shared_by_tokens() -> None:
    placer, budget = make_placer([6, 3], "tokens")
    assert placer.max_tokens == 9 * PAGE
    shares = place(placer, budget, 1, 9 * PAGE)
    assert shares is not None
    check_cover(shares, 9 * PAGE)
    assert (budget.used(1), budget.used(2)) == (6, 3)


def test_spilling_sequences_are_shared_by_tokens_the_others_are_not() -> None:
    placer, budget = make_placer([6, 6], "requests", spill=True)
    assert placer.max_tokens == 12 * PAGE
    assert place(placer, budget, 1, PAGE, longest=6 * PAGE) == (Share(1, 0, UNITS),)
    assert place(placer, budget, 2, PAGE, longest=7 * PAGE) == (
        Share(2, 0, UNITS, 0, 4 * PAGE),
        Share(1, 0, UNITS, 4 * PAGE, None),
    )
    by_heads, budget = make_placer([8 * 4, 8 * 4 + 7], "heads", spill=True)
    assert by_heads.max_tokens == 8 * PAGE, "four pages of all heads on each; no more by tokens"


def test_the_prompt_must_fit_locally() -> None:
    placer, budget = make_placer([100], "requests", local_pages=2)
    assert placer.max_tokens == 2 * PAGE
    assert placer.place(2 * PAGE, 2 * PAGE, {LOCAL: 2}) is not None, "prompts do not grow"
    budget.reserve(1, {LOCAL: 1})
    assert placer.place(2 * PAGE, 2 * PAGE, {}) is None


def test_the_budget_counts_lanes() -> None:
    budget = PageBudget(PAGE, {LOCAL: 8, 1: 8}, {LOCAL: 4, 1: 1})
    shares = (Share(1, 0, 3, 0, 2 * PAGE), Share(LOCAL, 0, 4))
    assert budget.missing(1, shares, 3 * PAGE) == {1: 6, LOCAL: 3}
    budget.reserve(1, {1: 6, LOCAL: 1})
    assert budget.missing(1, shares, 3 * PAGE) == {LOCAL: 2}
    assert budget.lacking({1: 3, LOCAL: 2}) == {1}
    with pytest.raises(CapacityError, match="executor 1 has 2 free pages, sequence 2 needs 3"):
        budget.reserve(2, {LOCAL: 1, 1: 3})
    assert (budget.used(LOCAL), budget.used(1)) == (1, 6), "nothing was reserved"
    assert budget.release(1, 1)
    assert not budget.release(1, 1)
    assert budget.free(1) == 8


@given(
    total=st.integers(0, 60),
    workers=st.lists(
        st.tuples(st.floats(0, 50), st.floats(0.05, 20), st.integers(0, 40)),
        min_size=1,
        max_size=5,
    ),
)
def test_share_out_is_as_even_as_pieces_can_be(
    total: int, workers: list[tuple[float, float, int]]
) -> None:
    loads = {e: load for e, (load, _, _) in enumerate(workers)}
    weights = {e: weight for e, (_, weight, _) in enumerate(workers)}
    capacities = {e: capacity for e, (_, _, capacity) in enumerate(workers)}
    counts = share_out(total, loads, weights, capacities)
    if counts is None:
        assert sum(capacities.values()) < total
        return
    assert sum(counts.values()) == total
    assert all(0 <= counts[e] <= capacities[e] for e in counts)
    # Moving one piece to another worker never lowers the higher of the two levels.
    for a in counts:
        for b in counts:
            if a != b and counts[a] and counts[b] < capacities[b]:
                before = (loads[a] + counts[a]) / weights[a]
                after = (loads[b] + counts[b] + 1) / weights[b]
                assert after >= before * (1 - 1e-9)


def test_page_counts_round_up() -> None:
    budget = PageBudget(PAGE, {LOCAL: 1, 1: 1}, {LOCAL: UNITS, 1: UNITS})
    for tokens in (1, PAGE, PAGE + 1):
        assert budget.pages(Share(1, 0, UNITS), tokens) == ceil_div(tokens, PAGE)
    assert budget.pages(Share(1, 0, UNITS, 2 * PAGE, None), 2 * PAGE) == 0
