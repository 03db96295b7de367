"""What an executor does with plans: pages, replays, errors. Numbers are tests/numerics' concern."""

from __future__ import annotations

import pytest
import torch

from lamina.attention.executor import AttentionExecutor
from lamina.errors import CapacityError, ProtocolMismatch
from lamina.types import ExecutorPlan
from support.attention import Rows, make_spec, plan_of, run_step

SPECS = (make_spec(0), make_spec(1, window=3), make_spec(2), make_spec(3, window=3, softcap=1.0))


def make_executor(num_pages: int = 6) -> AttentionExecutor:
    return AttentionExecutor(
        SPECS, (None,) * len(SPECS), dtype=torch.float32, num_pages=num_pages, page_tokens=4
    )


def rows_for(plan: ExecutorPlan) -> list[Rows]:
    return [Rows(spec, plan, torch.float32) for spec in SPECS]


def test_a_replayed_step_gives_the_same_bits_and_the_same_pages() -> None:
    executor = make_executor()
    prompt = plan_of((1, 7, 0), (2, 2, 0))
    run_step(executor, prompt, rows_for(prompt))
    decode = plan_of((1, 1, 7), (2, 3, 2), step=2)
    layers = rows_for(decode)
    first = run_step(executor, decode, layers)
    free = executor.num_free_pages
    again = run_step(executor, decode, layers)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert executor.num_free_pages == free
    assert (executor.length(1), executor.length(2)) == (8, 5)


def test_a_step_given_up_half_way_can_be_replayed() -> None:
    executor, undisturbed = make_executor(), make_executor()
    prompt = plan_of((1, 7, 0))
    layers = rows_for(prompt)
    for each in (executor, undisturbed):
        run_step(each, prompt, layers)
    decode = plan_of((1, 2, 7), step=2)
    layers = rows_for(decode)
    executor.begin(decode)
    executor.attend_cached(0, layers[0].attending_q)
    executor.finish(0, layers[0].k + 1, layers[0].v - 1)
    executor.attend_cached(1, layers[1].attending_q + 1)
    first = run_step(executor, decode, layers)
    second = run_step(undisturbed, decode, layers)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_full_executor_can_replay_its_last_step() -> None:
    executor = make_executor(num_pages=3)
    plan = plan_of((1, 8, 0), (2, 4, 0))
    run_step(executor, plan, rows_for(plan))
    assert executor.num_free_pages == 0
    run_step(executor, plan, rows_for(plan))
    # Sequence 1 shrinks in the same step in which sequence 2 needs its page, and comes first last.
    swap = plan_of((2, 4, 4), (1, 1, 3), step=2)
    run_step(executor, swap, rows_for(swap))
    assert executor.num_free_pages == 0
    assert executor.check_integrity() == []


def test_releases_run_first_and_are_idempotent() -> None:
    executor = make_executor(num_pages=2)
    plan = plan_of((1, 8, 0))
    run_step(executor, plan, rows_for(plan))
    successor = plan_of((2, 8, 0), step=2, releases=(1, 1, 77))
    run_step(executor, successor, rows_for(successor))
    assert executor.sequences == (2,)
    executor.begin(plan_of(step=3, releases=(2,)))
    assert (executor.sequences, executor.num_free_pages) == ((), 2)


def test_a_sequence_released_and_begun_again_in_one_plan_starts_empty() -> None:
    executor = make_executor()
    plan = plan_of((1, 8, 0))
    run_step(executor, plan, rows_for(plan))
    restart = plan_of((1, 3, 0), step=2, releases=(1,))
    run_step(executor, restart, rows_for(restart))
    assert executor.length(1) == 3
    with pytest.raises(
        ProtocolMismatch, match=r"sequence 1 \(from head unit 0\) after 3 tokens, but 0 are stored"
    ):
        executor.begin(plan_of((1, 1, 3), step=3, releases=(1,)))


@pytest.mark.parametrize(
    "plan", [plan_of((5, 1, 1), step=9), plan_of((1, 1, 9), step=9)], ids=["unknown", "too short"]
)
def test_a_plan_that_builds_on_missing_tokens_is_refused(plan: ExecutorPlan) -> None:
    executor = make_executor()
    prompt = plan_of((1, 8, 0))
    run_step(executor, prompt, rows_for(prompt))
    span = plan.spans[0]
    with pytest.raises(
        ProtocolMismatch, match=rf"step 9 continues sequence {span.sequence} .* after"
    ):
        executor.begin(plan)
    assert executor.length(1) == 8
    assert executor.sequences == (1,)


def test_too_few_pages_are_a_capacity_error_and_the_books_stay_sound() -> None:
    executor = make_executor(num_pages=2)
    with pytest.raises(CapacityError, match=r"sequence 2 .* needs 2 more KV pages for 5 tokens"):
        executor.begin(plan_of((1, 4, 0), (2, 5, 0)))
    assert executor.check_integrity() == []
    executor.begin(plan_of(step=2, releases=(1, 2)))
    assert executor.num_free_pages == 2


def test_a_plan_without_attending_rows_stores_and_returns_nothing() -> None:
    executor = make_executor()
    plan = plan_of((1, 5, 0, False), (2, 1, 0, False))
    for layer, rows in enumerate(rows_for(plan)):
        if layer == 0:
            executor.begin(plan)
        out = executor.finish(layer, rows.k, rows.v)
        assert out.shape == (0, SPECS[layer].num_query_heads, SPECS[layer].head_dim_v)
    assert (executor.length(1), executor.length(2)) == (5, 1)


def test_an_empty_plan_runs() -> None:
    plan = plan_of()
    assert all(len(out) == 0 for out in run_step(make_executor(), plan, rows_for(plan)))


def test_the_callers_buffers_may_be_reused_after_finish() -> None:
    executor, careful = make_executor(), make_executor()
    prompt = plan_of((1, 5, 0))
    layers = rows_for(prompt)
    run_step(careful, prompt, layers)
    executor.begin(prompt)
    for layer, rows in enumerate(layers):
        k, v = rows.k.clone(), rows.v.clone()
        executor.attend_cached(layer, rows.attending_q)
        executor.finish(layer, k, v)
        k.fill_(torch.nan)
        v.fill_(torch.nan)
    decode = plan_of((1, 1, 5), step=2)
    layers = rows_for(decode)
    for got, want in zip(
        run_step(executor, decode, layers), run_step(careful, decode, layers), strict=True
    ):
        assert torch.equal(got, want)


def test_finish_without_q_is_a_broken_invariant() -> None:
    executor = make_executor()
    plan = plan_of((1, 1, 0))
    rows = rows_for(plan)
    executor.begin(plan)
    with pytest.raises(AssertionError, match="attend_cached"):
        executor.finish(0, rows[0].k, rows[0].v)


def test_inputs_need_not_be_contiguous() -> None:
    executor, plain = make_executor(), make_executor()
    for plan in (plan_of((1, 5, 0), (2, 1, 0)), plan_of((2, 1, 1), (1, 1, 5), step=2)):
        layers = rows_for(plan)
        expected = run_step(plain, plan, layers)
        executor.begin(plan)
        for layer, rows in enumerate(layers):
            # Heads outermost in memory, as a model's projections may leave them.
            q, k, v = (
                x.transpose(0, 1).contiguous().transpose(0, 1)
                for x in (rows.attending_q, rows.k, rows.v)
            )
            executor.attend_cached(layer, q)
            torch.testing.assert_close(executor.finish(layer, k, v), expected[layer])
