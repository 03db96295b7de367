"""A model worker's routes and an executor's server over real links, with faults in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from lamina.attention.executor import AttentionExecutor
from lamina.attention.spec import AttentionSpec
from lamina.errors import DeadlineExceeded, PeerLost, ProtocolMismatch, TransportError
from lamina.transport.faulty import Fault, FaultyLink
from lamina.transport.inproc import inproc_pair
from lamina.transport.mailbox import Link
from lamina.transport.topology import MailboxId, message_number
from lamina.types import LOCAL, Span, StepPlan
from lamina.workers.routes import ExecutorEnd, Route
from lamina.workers.serving import ExecutorServer

SPEC = AttentionSpec(
    layer=0, num_query_heads=4, num_kv_heads=2, head_dim_k=8, head_dim_v=8, scale=0.3
)
MAX_ROWS = 16
WAIT_S = 0.4


def make_executor(spec: AttentionSpec = SPEC) -> AttentionExecutor:
    return AttentionExecutor((spec,), (None,), dtype=torch.float32, num_pages=8, page_tokens=4)


def make_end(executor: int, link: Link, kv_heads: slice = slice(0, 2)) -> ExecutorEnd:
    spec = SPEC.shard(kv_heads.start, kv_heads.stop)
    query_heads = slice(kv_heads.start * 2, kv_heads.stop * 2)
    return ExecutorEnd(
        executor, link, (spec,), [query_heads], [kv_heads],
        dtype=torch.float32, max_rows=MAX_ROWS, max_spans=4,
    )  # fmt: skip


def make_server(
    link: Link, executor: AttentionExecutor, spec: AttentionSpec = SPEC
) -> ExecutorServer:
    return ExecutorServer(
        link, executor, (spec,), dtype=torch.float32, max_rows=MAX_ROWS, max_spans=4,
        step_deadline_s=WAIT_S,
    )  # fmt: skip


class Serving:
    """An executor's server in a thread; its error, if any, is kept."""

    def __init__(self, link: Link, spec: AttentionSpec = SPEC) -> None:
        self.executor = make_executor(spec)
        self.server = make_server(link, self.executor, spec)
        self.error: TransportError | None = None
        self.stop = False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while not self.stop:
            try:
                self.server.begin_step(time.monotonic() + 0.01)
            except DeadlineExceeded:
                continue
            except TransportError as error:
                self.error = error
                return
            try:
                while self.server.in_step:
                    self.server.serve_layer()
            except TransportError as error:
                self.error = error
                return


@contextmanager
def serving(link: Link, spec: AttentionSpec = SPEC) -> Iterator[Serving]:
    thread = Serving(link, spec)
    try:
        yield thread
    finally:
        thread.stop = True
        link.close()
        thread.thread.join()


def post_plan(end: ExecutorEnd, plan: StepPlan) -> Route:
    route = Route(end, plan)
    route.post_plan(time.monotonic() + WAIT_S)
    return route


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
    return route.wait_out(0, number, deadline).clone()


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
    for executor, heads in ((1, slice(0, 1)), (2, slice(1, 2))):
        ours, theirs = inproc_pair("engine", "worker")
        plan = StepPlan(
            1, 0,
            (Span(2, 3, 0, (LOCAL,), (LOCAL, 1, 2)), Span(1, 5, 0, (1, 2), (1, 2))),
        )  # fmt: skip
        with serving(theirs, SPEC.shard(heads.start, heads.stop)) as worker:
            end = make_end(executor, ours, heads)
            route = post_plan(end, plan)
            number = message_number(1, 0, 1)
            deadline = time.monotonic() + WAIT_S
            route.post_q(0, number, qkv[0], deadline)
            route.post_kv(0, number, qkv[1], qkv[2], deadline)
            route.place(0, route.wait_out(0, number, deadline), out)
            assert worker.executor.length(2) == 3
    torch.testing.assert_close(out[3:], expected(tuple(t[3:] for t in qkv)))
    assert not out[:3].any()


def test_a_pumped_link_is_a_function_call() -> None:
    ours, theirs = inproc_pair("engine", "local", lambda: server.pump())
    executor = make_executor()
    server = make_server(theirs, executor)
    end = make_end(LOCAL, ours)
    qkv = tensors(5)
    out = exchange(end, prompt_plan(executor=LOCAL), qkv)
    torch.testing.assert_close(out, expected(qkv))
    for step in range(2, 8):
        post_plan(end, StepPlan(step, 0, (), ((LOCAL, step),)))
    post_plan(end, StepPlan(8, 0, (), ((LOCAL, 1),)))
    while server.num_plans < end.num_plans:
        server.pump()
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
    box = ours.outbox(MailboxId.PLAN, 64)
    box.post(1, torch.full((3,), 255, dtype=torch.uint8), deadline=time.monotonic() + 1)
    with pytest.raises(ProtocolMismatch, match="unreadable step plan"):
        server.begin_step(time.monotonic() + 1)


def test_a_plan_on_unknown_tokens_is_a_mismatch() -> None:
    ours, theirs = inproc_pair("engine", "worker")
    with serving(theirs) as worker:
        post_plan(make_end(1, ours), StepPlan(1, 0, (Span(9, 1, 7, (1,), (1,)),)))
        worker.thread.join(2.0)
        assert isinstance(worker.error, ProtocolMismatch)
        assert "sequence 9" in str(worker.error)
