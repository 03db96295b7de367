"""The batcher against executors that are plain page allocators."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import CapacityError
from lamina.kv.pages import PageAllocator
from lamina.sched.admission import PageBudget
from lamina.sched.batcher import Batcher
from lamina.types import LOCAL, EngineRequest, FinishReason, SamplingParams, StepPlan

PAGE = 4


def make_batcher(
    capacity: dict[int, int],
    *,
    by_requests: bool = False,
    max_num_seqs: int = 4,
    max_num_rows: int = 16,
    max_model_len: int = 32,
) -> Batcher:
    return Batcher(
        PageBudget(PAGE, capacity),
        by_requests=by_requests,
        max_num_seqs=max_num_seqs,
        max_num_rows=max_num_rows,
        max_model_len=max_model_len,
    )


def request(name: str, num_prompt: int, **sampling: object) -> EngineRequest:
    return EngineRequest(
        request_id=name,
        prompt_token_ids=tuple(range(1, num_prompt + 1)),
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
        seed=0,
        eos_token_ids=(0,),
    )


class Executors:
    """Allocators that follow the plans as real executors would, and check them."""

    def __init__(self, capacity: dict[int, int]) -> None:
        self.allocators = {e: PageAllocator(pages, PAGE) for e, pages in capacity.items()}

    def follow(self, plan: StepPlan) -> None:
        for executor, allocator in self.allocators.items():
            part = plan.for_executor(executor)
            for sequence in part.releases:
                allocator.release(sequence)
            for span in part.spans:
                assert span.context_tokens == 0 or (
                    allocator.length(span.sequence) >= span.context_tokens
                ), "rows must follow what the executor holds"
                allocator.resize(span.sequence, span.context_tokens + span.num_rows)


def drive(batcher: Batcher, executors: Executors) -> dict[int, FinishReason]:
    """Run until nothing is left; sampled tokens are 1, 2, 3, ... of each sequence."""
    finished: dict[int, FinishReason] = {}
    for _ in range(10_000):
        plan = batcher.plan()
        if plan is None:
            return finished
        executors.follow(plan)
        for executor, allocator in executors.allocators.items():
            # Prompts in chunks hold fewer pages than the budget has reserved, never more.
            assert allocator.num_used <= batcher.budget.used(executor)
        tokens = {s.id: len(s.output_token_ids) + 1 for s, _ in batcher.sampled_rows(plan)}
        for sequence_id, finish in batcher.apply(plan, tokens).items():
            if finish is not None:
                finished[sequence_id] = finish.reason
    raise AssertionError("the batcher does not come to an end")


def test_a_prompt_runs_in_chunks_locally_and_is_kept_remotely() -> None:
    batcher = make_batcher({LOCAL: 8, 1: 8, 2: 8}, max_num_rows=6)
    batcher.add(request("a", 10, max_tokens=2))
    first = batcher.plan()
    assert first is not None
    (span,) = first.spans
    assert (span.num_rows, span.context_tokens) == (6, 0)
    assert span.attend_on == (LOCAL,)
    assert span.store_on == (LOCAL, 1, 2)
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
    assert third.spans[0].attend_on == third.spans[0].store_on == (1, 2)
    assert third.releases == ((LOCAL, sequence.id),)
    (finish,) = batcher.apply(third, {sequence.id: 8}).values()
    assert finish is not None
    assert finish.reason is FinishReason.LENGTH
    last = batcher.plan()
    assert last is not None
    assert last.num_rows == 0
    assert set(last.releases) == {(1, sequence.id), (2, sequence.id)}
    assert batcher.plan() is None


def test_monolithic_keeps_everything_local() -> None:
    batcher = make_batcher({LOCAL: 8})
    batcher.add(request("a", 3, max_tokens=3))
    plan = batcher.plan()
    assert plan is not None
    assert plan.spans[0].store_on == (LOCAL,)
    (pair,) = batcher.sampled_rows(plan)
    batcher.apply(plan, {pair[0].id: 5})
    plan = batcher.plan()
    assert plan is not None
    assert plan.releases == ()
    assert plan.spans[0].attend_on == (LOCAL,)


def test_partition_by_requests_balances_free_pages() -> None:
    batcher = make_batcher({LOCAL: 16, 1: 8, 2: 8}, by_requests=True)
    for name, length in (("a", 12), ("b", 4), ("c", 4)):
        batcher.add(request(name, length))
    while any(not s.placement for s in batcher.sequences()):
        plan = batcher.plan()
        assert plan is not None
        batcher.apply(plan, {s.id: 9 for s, _ in batcher.sampled_rows(plan)})
    assert [s.placement for s in batcher.sequences()] == [(1,), (2,), (2,)]


@pytest.mark.parametrize("remote", [(), (1, 2)])
def test_pages_for_every_sequence_at_full_length_admit_every_sequence(
    remote: tuple[int, ...],
) -> None:
    capacity = dict.fromkeys((LOCAL, *remote), 4 * 32 // PAGE)
    batcher = make_batcher(capacity, max_num_rows=4 * 31)
    for name in "abcd":
        batcher.add(request(name, 31, max_tokens=1))
    plan = batcher.plan()
    assert plan is not None
    assert len(plan.spans) == 4


def test_a_page_stays_free_for_a_sequence_that_will_need_it() -> None:
    batcher = make_batcher({LOCAL: 8, 1: 8})
    batcher.add(request("a", 4 * PAGE, max_tokens=8))
    batcher.add(request("b", 4 * PAGE, max_tokens=8))
    plan = batcher.plan()
    assert plan is not None
    assert [span.sequence for span in plan.spans] == [1], "b would take the page that a needs next"


def test_the_youngest_is_preempted_and_recomputed_with_its_tokens() -> None:
    capacity = {LOCAL: 8, 1: 8}
    batcher, executors = make_batcher(capacity), Executors(capacity)
    for name in "abc":
        batcher.add(request(name, 6, max_tokens=20))
    finished = drive(batcher, executors)
    assert list(finished.values()) == [FinishReason.LENGTH] * 3
    assert list(finished) == [1, 2, 3], "the oldest finish first"
    assert batcher.num_preemptions > 0
    assert all(a.num_used == 0 for a in executors.allocators.values())


def test_stop_tokens_and_min_tokens() -> None:
    batcher, executors = make_batcher({LOCAL: 8}), Executors({LOCAL: 8})
    batcher.add(request("a", 3, max_tokens=9, stop_token_ids=(2, 5), min_tokens=3))
    finished = drive(batcher, executors)
    assert list(finished.values()) == [FinishReason.STOP]


def test_abort_releases_pages_of_waiting_and_running_requests() -> None:
    batcher, executors = make_batcher({LOCAL: 8, 1: 8}), Executors({LOCAL: 8, 1: 8})
    batcher.add(request("a", 6))
    plan = batcher.plan()
    assert plan is not None
    executors.follow(plan)
    batcher.apply(plan, {1: 9})
    batcher.add(request("b", 6))
    assert batcher.abort("a")
    assert batcher.abort("b")
    assert not batcher.abort("b")
    assert drive(batcher, executors) == {}
    assert all(a.num_used == 0 for a in executors.allocators.values())
    assert all(batcher.budget.used(e) == 0 for e in (LOCAL, 1))


def test_pages_for_less_than_one_full_sequence_are_refused() -> None:
    with pytest.raises(CapacityError, match="less than max_model_len"):
        make_batcher({LOCAL: 8, 1: 7})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 31), st.integers(1, 31)), min_size=1, max_size=10),
    st.integers(8, 20),
    st.integers(4, 40),
    st.sampled_from([(), (1,), (1, 2), (1, 2, 3)]),
    st.booleans(),
)
def test_every_request_ends_and_every_page_comes_back(
    lengths: list[tuple[int, int]],
    pages: int,
    max_num_rows: int,
    remote: tuple[int, ...],
    by_requests: bool,
) -> None:
    capacity = dict.fromkeys((LOCAL, *remote), pages)
    batcher = make_batcher(capacity, by_requests=by_requests, max_num_rows=max_num_rows)
    executors = Executors(capacity)
    for index, (num_prompt, max_tokens) in enumerate(lengths):
        batcher.add(request(str(index), num_prompt, max_tokens=max_tokens))
    finished = drive(batcher, executors)
    assert len(finished) == len(lengths)
    for executor, allocator in executors.allocators.items():
        assert allocator.check_integrity() == []
        assert allocator.num_used == 0
        assert batcher.budget.used(executor) == 0
