"""A model worker's routes and an executor's server over real links, with faults in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from lamina.attention.executor import AttentionExecutor
from lamina.attention.spec import AttentionSpec
from lamina.errors import DeadlineExceeded, PeerLost, ProtocolMismatch, TransportError
from lamina.transport.faulty import Fault, FaultyLink
from lamina.transport.inproc import inproc_pair
from lamina.transport.native import NativeLink
from lamina.transport.topology import PLAN_MAILBOX, message_number, plan_mailbox_bytes
from lamina.types import LOCAL, Span, StepPlan
from lamina.workers.routes import ExecutorEnd, Route, Share
from lamina.workers.serving import ExecutorServer

SPEC = AttentionSpec(
    layer=0, num_query_heads=4, num_kv_heads=2, head_dim_k=8, head_dim_v=8, scale=0.3
)
MAX_ROWS = 16
WAIT_S = 0.4


def make_executor(spec: AttentionSpec = SPEC) -> AttentionExecutor:
    return AttentionExecutor((spec,), (None,), dtype=torch.float32, num_pages=8, page_tokens=4)


def make_end(
    executor: int,
    link: NativeLink,
    share: Share = (0, 1, 1),
    on_plan: Callable[[], None] | None = None,
) -> ExecutorEnd:
    return ExecutorEnd(
        executor, link, (SPEC,), share,
        dtype=torch.float32, max_rows=MAX_ROWS, max_spans=4, on_plan=on_plan,
    )  # fmt: skip


def make_server(
    link: NativeLink, executor: AttentionExecutor, spec: AttentionSpec = SPEC
) -> ExecutorServer:
    return ExecutorServer(
        link, executor, (spec,), dtype=torch.float32, max_rows=MAX_ROWS, max_spans=4,
        step_deadline_s=WAIT_S,
    )  # fmt: skip


class Serving:
    """An executor's server in a thread; its error, if any, is kept."""

    def __init__(self, link: NativeLink, spec: AttentionSpec = SPEC) -> None:
        self.executor = make_executor(spec)
        self.server = make_server(link, self.executor, spec)
        self.error: TransportError | None = None
        self.stop = False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while not self.stop:
            try:
                self.server.serve(time.monotonic() + 0.01)
            except TransportError as error:
                self.error = error
                return


@contextmanager
def serving(link: NativeLink, spec: AttentionSpec = SPEC) -> Iterator[Serving]:
    thread = Serving(link, spec)
    try:
        yield thread
    finally:
        thread.stop = True
        link.close()
        thread.thread.join()


def post_plan(end: ExecutorEnd, plan: StepPlan) -> Route:
    end.post_plan(plan, time.monotonic() + WAIT_S)
    return Route(end, plan)


def tensors(num_rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_rows, 4, 8), (num_rows, 2, 8), (num_rows, 2, 8))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def exchange(
    end: ExecutorEnd, plan: StepPlan, qkv: tuple[torch.Tensor, ...], wait_s: float = WAIT_S
) -> torch.Tensor:
    route = post_plan(end, plan)
    number = message_number(plan.step, 0, 1)
    deadline = time.monotonic() + wait_s
    route.post_q(0, number, qkv[0], deadline)
    route.post_kv(0, number, qkv[1], qkv[2], deadline)
    return route.view_out(0, number, qkv[0].shape, deadline).clone()


def prompt_plan(step: int = 1, rows: int = 5, executor: int = 1) -> StepPlan:
    return StepPlan(step, 0, (Span(1, rows, 0, (executor,), (executor,)),))


def expected(qkv: tuple[torch.Tensor, ...]) -> torch.Tensor:
    q, k, v = (t.transpose(0, 1) for t in qkv)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=SPEC.scale, enable_gqa=True
    )
    return out.transpose(0, 1)


def test_rows_and_heads_go_to_their_executors_and_come_back() -> None:
    """Two executors with one KV head each; the rows of sequence 2 are only stored."""
    qkv = tensors(8)
    out = torch.zeros(8, 4, 8)
    for executor in (1, 2):
        ours, theirs = inproc_pair("engine", "worker")
        plan = StepPlan(
            1, 0,
            (Span(2, 3, 0, (LOCAL,), (LOCAL, 1, 2)), Span(1, 5, 0, (1, 2), (1, 2))),
        )  # fmt: skip
        with serving(theirs, SPEC.shard(0, 1)) as worker:
            end = make_end(executor, ours, (executor - 1, executor, 2))
            route = post_plan(end, plan)
            number = message_number(1, 0, 1)
            deadline = time.monotonic() + WAIT_S
            route.post_q(0, number, qkv[0], deadline)
            route.post_kv(0, number, qkv[1], qkv[2], deadline)
            route.collect_out(0, number, out, deadline)
            assert worker.executor.length(2) == 3
    torch.testing.assert_close(out[3:], expected(tuple(t[3:] for t in qkv)))
    assert not out[:3].any()


def test_a_pumped_link_is_a_function_call() -> None:
    ours, theirs = inproc_pair("engine", "local", lambda: server.loop.pump())
    executor = make_executor()
    server = make_server(theirs, executor)
    end = make_end(LOCAL, ours, on_plan=server.take_plan)
    qkv = tensors(5)
    out = exchange(end, prompt_plan(executor=LOCAL), qkv)
    torch.testing.assert_close(out, expected(qkv))
    for step in range(2, 8):
        post_plan(end, StepPlan(step, 0, (), ((LOCAL, step),)))
    post_plan(end, StepPlan(8, 0, (), ((LOCAL, 1),)))
    assert executor.num_free_pages == executor.num_pages


def test_a_delayed_message_changes_nothing() -> None:
    ours, theirs = inproc_pair("engine", "worker")
    qkv = tensors(5)
    with serving(FaultyLink(theirs, Fault(kind="delay", delay_s=0.1, count=1))):
        out = exchange(make_end(1, ours), prompt_plan(), qkv)
    torch.testing.assert_close(out, expected(qkv))


def test_a_lost_output_is_a_deadline_and_the_step_can_be_replayed() -> None:
    ours, theirs = inproc_pair("engine", "worker")
    qkv = tensors(5)
    link = FaultyLink(theirs, Fault(kind="drop", count=1))
    with serving(link) as worker:
        end = make_end(1, ours)
        with pytest.raises(DeadlineExceeded, match="worker"):
            exchange(end, prompt_plan(), qkv, wait_s=0.2)
        out = exchange(end, prompt_plan(step=2), qkv)
        torch.testing.assert_close(out, expected(qkv))
        assert worker.executor.length(1) == 5, "the replay changed nothing"


def test_a_truncated_output_is_a_mismatch() -> None:
    ours, theirs = inproc_pair("engine", "worker")
    with (
        serving(FaultyLink(theirs, Fault(kind="truncate", count=1))),
        pytest.raises(ProtocolMismatch, match="worker"),
    ):
        exchange(make_end(1, ours), prompt_plan(), tensors(5))


def test_a_closed_connection_is_a_lost_peer() -> None:
    ours, theirs = inproc_pair("engine", "worker")
    with (
        serving(FaultyLink(theirs, Fault(kind="close", count=1))),
        pytest.raises(PeerLost, match="worker"),
    ):
        exchange(make_end(1, ours), prompt_plan(), tensors(5))


def test_a_plan_that_cannot_be_read_is_a_mismatch() -> None:
    ours, theirs = inproc_pair("engine", "worker")
    server = make_server(theirs, make_executor())
    box = ours.outbox(PLAN_MAILBOX, plan_mailbox_bytes(4))
    box.post(1, torch.full((3,), 255, dtype=torch.uint8), deadline=time.monotonic() + 1)
    with pytest.raises(ProtocolMismatch, match="unreadable step plan"):
        server.serve(time.monotonic() + 1)


def test_a_plan_on_unknown_tokens_is_a_mismatch() -> None:
    ours, theirs = inproc_pair("engine", "worker")
    with serving(theirs) as worker:
        post_plan(make_end(1, ours), StepPlan(1, 0, (Span(9, 1, 7, (1,), (1,)),)))
        worker.thread.join(2.0)
        assert isinstance(worker.error, ProtocolMismatch)
        assert "sequence 9" in str(worker.error)


def test_attention_over_cached_tokens_starts_before_k_and_v_are_there() -> None:
    ours, theirs = inproc_pair("engine", "worker")
    with serving(theirs) as worker:
        end = make_end(1, ours)
        exchange(end, prompt_plan(), tensors(5))
        route = post_plan(end, StepPlan(2, 0, (Span(1, 1, 5, (1,), (1,)),)))
        number = message_number(2, 0, 1)
        deadline = time.monotonic() + 5.0
        q, k, v = tensors(1)
        route.post_q(0, number, q, deadline)
        while worker.server.loop.times()[0] == 0.0 or len(worker.server.loop.events()) < 1:
            time.sleep(0.001)
        time.sleep(0.05)
        posted_at = time.monotonic()
        route.post_kv(0, number, k, v, deadline)
        route.view_out(0, number, q.shape, deadline)
        while len(worker.server.loop.events()) < 2:
            time.sleep(0.001)
        seen, attend_begin, attend_end, finish_begin, finish_end = worker.server.loop.events()[-1]
        assert seen == number
        assert attend_begin <= attend_end < posted_at <= finish_begin <= finish_end


def test_a_new_plan_replaces_a_step_that_was_given_up() -> None:
    ours, theirs = inproc_pair("engine", "worker")
    qkv = tensors(5)
    with serving(theirs) as worker:
        end = make_end(1, ours)
        post_plan(end, prompt_plan())
        route = post_plan(end, prompt_plan(step=2))
        route.post_q(0, message_number(2, 0, 1), qkv[0], time.monotonic() + 1)
        out = exchange(end, prompt_plan(step=3), qkv)
        torch.testing.assert_close(out, expected(qkv))
        assert worker.error is None


def test_a_plan_does_not_overtake_the_layers_of_a_step_without_outputs() -> None:
    """Nobody waits for a step that only stores: the next plan may be here before it is served."""
    ours, theirs = inproc_pair("engine", "worker")
    executor = make_executor()
    server = make_server(theirs, executor)
    end = make_end(1, ours)
    _, k, v = tensors(5)
    stored = StepPlan(1, 0, (Span(1, 5, 0, (LOCAL,), (LOCAL, 1)),))
    route = post_plan(end, stored)
    server.serve(time.monotonic())
    route.post_kv(0, message_number(1, 0, 1), k, v, time.monotonic() + WAIT_S)
    post_plan(end, StepPlan(2, 0, (Span(1, 1, 5, (1,), (1,)),)))
    server.serve(time.monotonic())
    assert [event[0] for event in server.loop.events()] == [message_number(1, 0, 1)]
    assert server.num_plans == 2
