"""An executor's server over one link, driven by hand, with faults in between."""

from __future__ import annotations

import time

import pytest
import torch

from lamina.attention.executor import AttentionExecutor
from lamina.attention.spec import AttentionSpec
from lamina.errors import DeadlineExceeded, PeerLost, ProtocolMismatch
from lamina.transport.faulty import Fault, FaultyLink
from lamina.transport.inproc import inproc_pair
from lamina.transport.native import NativeLink
from lamina.transport.topology import PLAN_MAILBOX, plan_mailbox_bytes
from lamina.types import ExecutorPlan
from support.attention import Oracle, assert_outputs_match, make_spec, plan_of
from support.serving import MAX_SPANS, ModelSide, make_server, serving, soon

SPECS = (make_spec(),)
WAIT_S = 0.4


def make_executor(specs: tuple[AttentionSpec, ...] = SPECS) -> AttentionExecutor:
    return AttentionExecutor(
        specs, (None,) * len(specs), dtype=torch.float32, num_pages=8, page_tokens=4
    )


def prompt_plan(step: int = 1) -> ExecutorPlan:
    return plan_of((1, 5, 0), step=step)


def check_step(model: ModelSide, plan: ExecutorPlan, oracle: Oracle | None = None) -> None:
    layers = model.rows(plan)
    outputs = model.run_step(plan, layers)
    oracle = oracle or Oracle(model.specs, (None,) * len(model.specs))
    assert_outputs_match(outputs, oracle.run_step(plan, layers), model.specs, torch.float32)


def faulty_pair(*faults: Fault) -> tuple[NativeLink, NativeLink]:
    """Of which the executor's end is faulty."""
    ours, theirs = inproc_pair("engine", "worker")
    return ours, FaultyLink(theirs, *faults)


def test_rows_that_attend_and_rows_that_are_only_stored() -> None:
    ours, theirs = inproc_pair("engine", "worker")
    executor = make_executor()
    with serving(make_server(theirs, executor), theirs):
        model = ModelSide(ours, SPECS)
        oracle = Oracle(SPECS, (None,))
        check_step(model, plan_of((2, 3, 0, False), (1, 5, 0)), oracle)
        check_step(model, plan_of((1, 1, 5), (2, 2, 3), step=2), oracle)
        assert executor.length(2) == 5


def test_a_pumped_link_is_a_function_call() -> None:
    ours, theirs = inproc_pair("engine", "local", lambda: server.loop.pump())
    executor = make_executor()
    server = make_server(theirs, executor)
    model = ModelSide(ours, SPECS)
    layers = model.rows(prompt_plan())
    model.post_plan(prompt_plan())
    server.take_plan()
    out = model.exchange(prompt_plan(), 0, layers[0])
    wanted = Oracle(SPECS, (None,)).run_step(prompt_plan(), layers)
    assert_outputs_match([out], wanted, SPECS, torch.float32)
    for step in range(2, 8):
        model.post_plan(plan_of(step=step, releases=(step,)))
        server.take_plan()
    model.post_plan(plan_of(step=8, releases=(1,)))
    server.take_plan()
    assert executor.num_free_pages == executor.num_pages


def test_a_delayed_message_changes_nothing() -> None:
    ours, theirs = faulty_pair(Fault(kind="delay", delay_s=0.1, count=1))
    with serving(make_server(theirs, make_executor()), theirs):
        check_step(ModelSide(ours, SPECS), prompt_plan())


def test_a_lost_output_is_a_deadline_and_the_step_can_be_replayed() -> None:
    ours, theirs = faulty_pair(Fault(kind="drop", count=1))
    executor = make_executor()
    with serving(make_server(theirs, executor), theirs):
        model = ModelSide(ours, SPECS, wait_s=WAIT_S)
        with pytest.raises(DeadlineExceeded, match="worker"):
            check_step(model, prompt_plan())
        check_step(model, prompt_plan(step=2))
        assert executor.length(1) == 5, "the replay changed nothing"


def test_a_truncated_output_is_a_mismatch() -> None:
    ours, theirs = faulty_pair(Fault(kind="truncate", count=1))
    with (
        serving(make_server(theirs, make_executor()), theirs),
        pytest.raises(ProtocolMismatch, match="worker"),
    ):
        check_step(ModelSide(ours, SPECS), prompt_plan())


def test_a_closed_connection_is_a_lost_peer() -> None:
    ours, theirs = faulty_pair(Fault(kind="close", count=1))
    with (
        serving(make_server(theirs, make_executor()), theirs),
        pytest.raises(PeerLost, match="worker"),
    ):
        check_step(ModelSide(ours, SPECS), prompt_plan())


def test_a_silent_model_worker_is_a_deadline() -> None:
    ours, theirs = inproc_pair("engine", "worker")
    with serving(make_server(theirs, make_executor(), step_deadline_s=0.1), theirs) as worker:
        model = ModelSide(ours, SPECS)
        model.post_plan(prompt_plan())
        worker.thread.join(2.0)
        assert isinstance(worker.error, DeadlineExceeded)
        assert "engine" in str(worker.error)


def test_a_plan_that_cannot_be_read_is_a_mismatch() -> None:
    ours, theirs = inproc_pair("engine", "worker")
    server = make_server(theirs, make_executor())
    box = ours.outbox(PLAN_MAILBOX, plan_mailbox_bytes(MAX_SPANS))
    box.post(1, torch.full((3,), 255, dtype=torch.uint8), deadline=soon())
    with pytest.raises(ProtocolMismatch, match="unreadable step plan"):
        server.serve(soon())


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (plan_of((9, 1, 7)), "sequence 9"),
        (ExecutorPlan(1, 3, ()), "micro-batch 3"),
        (plan_of((1, 1, 0), units=(0, 2)), "head units 0 to 2"),
    ],
)
def test_a_plan_that_does_not_fit_is_a_mismatch(plan: ExecutorPlan, reason: str) -> None:
    ours, theirs = inproc_pair("engine", "worker")
    with serving(make_server(theirs, make_executor()), theirs) as worker:
        ModelSide(ours, SPECS).post_plan(plan)
        worker.thread.join(2.0)
        assert isinstance(worker.error, ProtocolMismatch)
        assert reason in str(worker.error)


def test_attention_over_cached_tokens_starts_before_k_and_v_are_there() -> None:
    ours, theirs = inproc_pair("engine", "worker")
    with serving(make_server(theirs, make_executor()), theirs):
        model = ModelSide(ours, SPECS)
        check_step(model, prompt_plan())
        plan = plan_of((1, 1, 5), step=2)
        (rows,) = model.rows(plan)
        model.post_plan(plan)
        model.post_q(plan, 0, rows)
        time.sleep(0.1)
        posted_at = time.monotonic()
        model.post_kv(plan, 0, rows)
        model.wait_out(plan, 0, rows)
        ((attend_begin, attend_end, finish_begin, finish_end),) = model.take_report(plan).tolist()
        assert attend_begin <= attend_end < posted_at <= finish_begin <= finish_end


def test_a_new_plan_replaces_a_step_that_was_given_up() -> None:
    ours, theirs = inproc_pair("engine", "worker")
    with serving(make_server(theirs, make_executor()), theirs) as worker:
        model = ModelSide(ours, SPECS)
        model.post_plan(prompt_plan())
        model.post_plan(prompt_plan(step=2))
        model.post_q(prompt_plan(step=2), 0, model.rows(prompt_plan())[0])
        check_step(model, prompt_plan(step=3))
        assert worker.error is None


def test_the_layers_of_a_step_without_outputs_may_come_after_the_next_plan() -> None:
    """Nobody waits for a step that only stores: the next plan may be here before it is served."""
    ours, theirs = inproc_pair("engine", "worker")
    server = make_server(theirs, make_executor())
    model = ModelSide(ours, SPECS)
    oracle = Oracle(SPECS, (None,))
    stored, decode = plan_of((1, 5, 0, False)), plan_of((1, 1, 5), step=2)
    (rows,) = model.rows(stored)
    oracle.run_step(stored, [rows])
    model.post_plan(stored)
    server.serve(time.monotonic())
    model.post_kv(stored, 0, rows)
    model.post_plan(decode)
    server.serve(time.monotonic())
    model.take_report(stored)
    with serving(server, theirs):
        (rows,) = model.rows(decode)
        out = model.exchange(decode, 0, rows)
        assert_outputs_match([out], oracle.run_step(decode, [rows]), SPECS, torch.float32)
