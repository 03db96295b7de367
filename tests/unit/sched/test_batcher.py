"""The batcher with one micro-batch, against executors that only keep books."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import CapacityError
from lamina.sched.batcher import Batcher
from lamina.sched.placement import Mode
from lamina.types import LOCAL, FinishReason, Share
from support.scheduling import PAGE, UNITS, LaneExecutors, make_batcher, make_request


def drive(batcher: Batcher, executors: LaneExecutors) -> dict[int, FinishReason]:
    """Run until nothing is left; sampled tokens are 1, 2, 3, ... of each sequence."""
    finished: dict[int, FinishReason] = {}
    for _ in range(10_000):
        plan = batcher.plan()
        if plan is None:
            assert not batcher.has_work
            return finished
        executors.follow(plan)
        for executor in batcher.budget.capacity_pages:
            # Prompts in chunks hold fewer pages than the budget has reserved, never more.
            assert executors.num_used(executor) <= batcher.budget.used(executor)
        tokens = {s.id: len(s.output_token_ids) + 1 for s, _ in batcher.sampled_rows(plan)}
        executors.done(plan)
        for sequence_id, finish in batcher.apply(plan, tokens).items():
            if finish is not None:
                finished[sequence_id] = finish.reason
    raise AssertionError("the batcher does not come to an end")


def test_a_prompt_runs_in_chunks_locally_and_is_kept_remotely() -> None:
    batcher = make_batcher({LOCAL: 8, 1: 8, 2: 8}, max_num_rows=6)
    batcher.add(make_request("a", 10, max_tokens=2))
    local, kept = Share(LOCAL, 0, 2), (Share(1, 0, 1), Share(2, 1, 2))
    first = batcher.plan()
    assert first is not None
    (span,) = first.spans
    assert (span.num_rows, span.context_tokens) == (6, 0)
    assert span.attend_on == (local,)
    assert span.store_on == (local, *kept)
    assert batcher.sampled_rows(first) == []
    batcher.apply(first, {})
    second = batcher.plan()
    assert second is not None
    assert (second.spans[0].num_rows, second.spans[0].context_tokens) == (4, 6)
    ((sequence, row),) = batcher.sampled_rows(second)
    assert row == 3
    assert batcher.apply(second, {sequence.id: 7}) == {sequence.id: None}
    third = batcher.plan()
    assert third is not None
    assert third.spans[0].attend_on == third.spans[0].store_on == kept
    assert third.releases == ((LOCAL, sequence.id),)
    (finish,) = batcher.apply(third, {sequence.id: 8}).values()
    assert finish is not None
    assert finish.reason is FinishReason.LENGTH
    last = batcher.plan()
    assert last is not None
    assert last.num_rows == 0
    assert set(last.releases) == {(1, sequence.id), (2, sequence.id)}
    batcher.apply(last, {})
    assert batcher.plan() is None
    assert not batcher.has_work


def test_monolithic_keeps_everything_local() -> None:
    batcher = make_batcher({LOCAL: 8})
    batcher.add(make_request("a", 3, max_tokens=3))
    plan = batcher.plan()
    assert plan is not None
    assert plan.spans[0].store_on == (Share(LOCAL, 0, UNITS),)
    (pair,) = batcher.sampled_rows(plan)
    batcher.apply(plan, {pair[0].id: 5})
    plan = batcher.plan()
    assert plan is not None
    assert plan.releases == ()
    assert plan.spans[0].attend_on == (Share(LOCAL, 0, UNITS),)


def test_rows_of_a_token_partition_attend_to_all_ranges() -> None:
    batcher = make_batcher({LOCAL: 8, 1: 4, 2: 4}, mode="tokens")
    batcher.add(make_request("a", 10, max_tokens=9))
    plan = batcher.plan()
    assert plan is not None
    batcher.apply(plan, {1: 5})
    plan = batcher.plan()
    assert plan is not None
    (span,) = plan.spans
    assert span.attend_on == span.store_on == (Share(1, 0, 2, 0, 12), Share(2, 0, 2, 12, None))
    assert plan.for_executor(1).spans[0].num_stored == 1
    assert plan.for_executor(2).spans == ()


@pytest.mark.parametrize("remote", [(), (1, 2)])
def test_pages_for_every_sequence_at_full_length_admit_every_sequence(
    remote: tuple[int, ...],
) -> None:
    capacity = dict.fromkeys((LOCAL, *remote), 4 * 32 // PAGE)
    batcher = make_batcher(capacity, max_num_rows=4 * 31)
    for name in "abcd":
        batcher.add(make_request(name, 31, max_tokens=1))
    plan = batcher.plan()
    assert plan is not None
    assert len(plan.spans) == 4


def test_a_page_stays_free_for_a_sequence_that_will_need_it() -> None:
    batcher = make_batcher({LOCAL: 8, 1: 16})
    batcher.add(make_request("a", 4 * PAGE, max_tokens=8))
    batcher.add(make_request("b", 4 * PAGE, max_tokens=8))
    plan = batcher.plan()
    assert plan is not None
    assert [span.sequence for span in plan.spans] == [1], "b would take the page that a needs next"


def test_a_page_stays_free_for_those_that_run_already() -> None:
    batcher = make_batcher({LOCAL: 8, 1: 16})
    batcher.add(make_request("a", 4 * PAGE, max_tokens=8))
    plan = batcher.plan()
    assert plan is not None
    batcher.apply(plan, {1: 5})
    # The fifth page of a is taken now, so of six lane pages two stay free for its sixth.
    batcher.add(make_request("b", 3 * PAGE, max_tokens=8))
    plan = batcher.plan()
    assert plan is not None
    assert [span.sequence for span in plan.spans] == [1]
    batcher.apply(plan, {1: 5})
    batcher.abort("b")
    batcher.add(make_request("c", 2 * PAGE, max_tokens=8))
    plan = batcher.plan()
    assert plan is not None
    assert [span.sequence for span in plan.spans] == [1, 3]


def test_the_youngest_is_preempted_and_recomputed_with_its_tokens() -> None:
    batcher = make_batcher({LOCAL: 8, 1: 16})
    executors = LaneExecutors(batcher)
    for name in "abc":
        batcher.add(make_request(name, 6, max_tokens=20))
    finished = drive(batcher, executors)
    assert list(finished.values()) == [FinishReason.LENGTH] * 3
    assert list(finished) == [1, 2, 3], "the oldest finish first"
    assert batcher.num_preemptions > 0
    assert executors.is_empty


def test_stop_tokens_and_min_tokens() -> None:
    batcher = make_batcher({LOCAL: 8})
    batcher.add(make_request("a", 3, max_tokens=9, stop_token_ids=(2, 5), min_tokens=3))
    finished = drive(batcher, LaneExecutors(batcher))
    assert list(finished.values()) == [FinishReason.STOP]


def test_abort_releases_pages_of_waiting_and_running_requests() -> None:
    batcher = make_batcher({LOCAL: 8, 1: 16})
    executors = LaneExecutors(batcher)
    batcher.add(make_request("a", 6))
    plan = batcher.plan()
    assert plan is not None
    executors.follow(plan)
    executors.done(plan)
    batcher.apply(plan, {1: 9})
    batcher.add(make_request("b", 6))
    assert batcher.abort("a")
    assert batcher.abort("b")
    assert not batcher.abort("b")
    assert drive(batcher, executors) == {}
    assert executors.is_empty
    assert all(batcher.budget.used(e) == 0 for e in (LOCAL, 1))


def test_pages_for_less_than_one_full_sequence_are_refused() -> None:
    with pytest.raises(CapacityError, match="less than max_model_len"):
        make_batcher({LOCAL: 8, 1: 15})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 31), st.integers(1, 31)), min_size=1, max_size=10),
    st.integers(16, 30),
    st.integers(4, 40),
    st.sampled_from([(), (1,), (1, 2), (1, 2, 3)]),
    st.sampled_from(["heads", "requests", "tokens"]),
)
def test_every_request_ends_and_every_page_comes_back(
    lengths: list[tuple[int, int]],
    pages: int,
    max_num_rows: int,
    remote: tuple[int, ...],
    mode: Mode,
) -> None:
    capacity = dict.fromkeys((LOCAL, *remote), pages)
    batcher = make_batcher(capacity, mode=mode, max_num_rows=max_num_rows)
    executors = LaneExecutors(batcher)
    for index, (num_prompt, max_tokens) in enumerate(lengths):
        batcher.add(make_request(str(index), num_prompt, max_tokens=max_tokens))
    finished = drive(batcher, executors)
    assert len(finished) == len(lengths)
    assert executors.is_empty
    assert all(batcher.budget.used(e) == 0 for e in capacity)
