"""An executor's server in a thread, and the engine's and the model ranks' ends of its links.

What the model side does is done by hand here, as `types.ExecutorPlan` and `transport/topology.py`
say: plans and payloads go out, outputs and reports come back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import msgspec
import torch
from torch import Tensor

from lamina.attention.executor import AttentionExecutor
from lamina.attention.partition import shard_specs
from lamina.attention.spec import AttentionSpec
from lamina.errors import DeadlineExceeded, TransportError
from lamina.transport.mailbox import Link
from lamina.transport.native import NativeLink
from lamina.transport.topology import (
    PLAN_MAILBOX,
    channel_of,
    message_number,
    plan_mailbox_bytes,
    step_mailboxes,
)
from lamina.types import ExecutorPlan
from lamina.workers.serving import ExecutorServer
from support.attention import Rows, unpack

MAX_ROWS = 64
MAX_SPANS = 8
PAGE = 4
Pair = tuple[NativeLink, NativeLink]


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


class Serving:
    """An executor's server in a thread; its error, if any, is kept."""

    def __init__(self, server: ExecutorServer) -> None:
        self.server = server
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

    def wait_for_plans(self, count: int) -> None:
        """Until the server has taken up so many plans."""
        deadline = soon()
        while self.server.num_plans < count:
            assert self.thread.is_alive(), self.error
            assert time.monotonic() < deadline, "no plan has come"
            time.sleep(0.001)


class ModelSide:
    """The engine's end and the ends of all ranks.

    Args:
        plan_link: the engine's end of the plan link.
        tensor_links: their ends per replica and rank; empty: the plan link is for tensors too.
    """

    def __init__(
        self,
        plan_link: Link,
        specs: tuple[AttentionSpec, ...],
        *,
        num_micro_batches: int = 1,
        num_ranks: int = 1,
        tensor_links: Sequence[Sequence[Link]] = (),
        units: int = 1,
        page_units: int = 1,
        wait_s: float = 5.0,
    ) -> None:
        self.specs = specs
        self.units, self.page_units = units, page_units
        self.num_ranks = num_ranks
        self.wait_s = wait_s
        self._plans = plan_link.outbox(PLAN_MAILBOX, plan_mailbox_bytes(MAX_SPANS))
        self._num_plans = 0
        replicas = tensor_links or [[plan_link]]
        self.num_replicas = len(replicas)
        rank_specs = shard_specs(specs, 0, units // num_ranks, units)
        boxes = step_mailboxes(rank_specs, 4, MAX_ROWS, num_micro_batches)
        self._ends = {
            (replica, rank, m): (
                link.outbox(box.q, box.q_bytes),
                link.outbox(box.kv, box.kv_bytes),
                link.inbox(box.out, box.out_bytes),
            )
            for replica, links in enumerate(replicas)
            for rank, link in enumerate(links)
            for m, box in enumerate(boxes)
        }
        reports = step_mailboxes(specs, 4, MAX_ROWS, num_micro_batches * num_ranks)
        self.reports = [plan_link.inbox(box.report, box.report_bytes) for box in reports]
        self.looks_for_reports = True
        """Before the next plan of the micro-batch, as the engine does."""
        self._taken: dict[tuple[int, int], Tensor] = {}
        self._last_steps: dict[int, int] = {}

    def post_plan(self, plan: ExecutorPlan) -> None:
        self._num_plans += 1
        last = self._last_steps.get(plan.micro_batch)
        if last is not None and self.looks_for_reports:
            for rank in range(self.num_ranks):
                with suppress(DeadlineExceeded):
                    self._take(last, plan.micro_batch, rank, time.monotonic())
        self._last_steps[plan.micro_batch] = plan.step
        payload = torch.frombuffer(bytearray(msgspec.msgpack.encode(plan)), dtype=torch.uint8)
        self._plans.post(self._num_plans, payload, deadline=soon(self.wait_s))

    def rows(self, plan: ExecutorPlan) -> list[Rows]:
        """Random q, k and v of every layer for a plan."""
        return [Rows(spec, plan, torch.float32, self.units, self.page_units) for spec in self.specs]

    def rank_units(self, rank: int) -> range:
        size = self.units // self.num_ranks
        return range(rank * size, (rank + 1) * size)

    def post_q(self, plan: ExecutorPlan, layer: int, rows: Rows) -> None:
        for rank in range(self.num_ranks):
            q, _, _ = rows.payloads(self.rank_units(rank))
            if len(q):
                outbox, _, _ = self._end(plan, layer, rank)
                outbox.post(self._number(plan, layer), q, deadline=soon(self.wait_s))

    def post_kv(self, plan: ExecutorPlan, layer: int, rows: Rows) -> None:
        for rank in range(self.num_ranks):
            _, k, v = rows.payloads(self.rank_units(rank))
            if len(k):
                _, outbox, _ = self._end(plan, layer, rank)
                outbox.post(self._number(plan, layer), k, v, deadline=soon(self.wait_s))

    def wait_out(self, plan: ExecutorPlan, layer: int, rows: Rows) -> Tensor:
        """The layer's output [A, Hq, Dv] of all ranks; if partial [A, Hq, Dv + 1], LSE last."""
        spec = self.specs[layer]
        heads = spec.num_query_heads * self.page_units // self.units
        whole: list[list[Tensor]] = [[] for span in plan.spans if span.num_attending]
        for rank in range(self.num_ranks):
            units = self.rank_units(rank)
            num_rows = len(rows.payloads(units)[0])
            if not num_rows:
                continue
            _, _, inbox = self._end(plan, layer + 1, rank)
            number, size = self._number(plan, layer), num_rows * heads
            num_bytes = 4 * size * (spec.head_dim_v + plan.is_partial)
            payload = inbox.wait(number, soon(self.wait_s), num_bytes=num_bytes)
            values = payload.view(torch.float32)
            out = values[: size * spec.head_dim_v].view(num_rows, heads, spec.head_dim_v)
            if plan.is_partial:
                lse = values[size * spec.head_dim_v :].view(num_rows, heads, 1)
                out = torch.cat([out, lse], dim=2)
            for pieces, piece in zip(whole, unpack(plan, out, self.page_units, units), strict=True):
                pieces.append(piece.clone())
        return torch.cat([torch.cat(pieces, dim=1) for pieces in whole])

    def run_step(self, plan: ExecutorPlan, layers: list[Rows]) -> list[Tensor]:
        """Post the plan, exchange all layers; the output of each."""
        self.post_plan(plan)
        return [self.exchange(plan, layer, rows) for layer, rows in enumerate(layers)]

    def exchange(self, plan: ExecutorPlan, layer: int, rows: Rows) -> Tensor:
        self.post_q(plan, layer, rows)
        self.post_kv(plan, layer, rows)
        spec = self.specs[layer]
        if not any(span.num_attending for span in plan.spans):
            return torch.empty(0, spec.num_query_heads, spec.head_dim_v)
        return self.wait_out(plan, layer, rows)

    def take_report(self, plan: ExecutorPlan, rank: int = 0) -> Tensor:
        """When what happened, float64 [layers, 4]."""
        return self._take(plan.step, plan.micro_batch, rank, soon(self.wait_s))

    def _take(self, step: int, micro_batch: int, rank: int, deadline: float) -> Tensor:
        report = self._taken.get((step, rank))
        if report is None:
            inbox = self.reports[channel_of(micro_batch, rank, self.num_ranks)]
            payload = inbox.wait(step, deadline, num_bytes=32 * len(self.specs))
            report = self._taken[step, rank] = payload.view(torch.float64).view(-1, 4).clone()
        return report

    def _end(self, plan: ExecutorPlan, layer: int, rank: int):  # type: ignore[no-untyped-def]
        return self._ends[(plan.micro_batch + layer) % self.num_replicas, rank, plan.micro_batch]

    def _number(self, plan: ExecutorPlan, layer: int) -> int:
        return message_number(plan.step, layer, len(self.specs))


def make_server(
    link: NativeLink,
    executor: AttentionExecutor,
    *,
    num_micro_batches: int = 1,
    tensor_links: Sequence[Sequence[NativeLink]] = (),
    step_deadline_s: float = 5.0,
) -> ExecutorServer:
    return ExecutorServer(
        link,
        executor,
        dtype=torch.float32,
        max_rows=MAX_ROWS,
        max_spans=MAX_SPANS,
        step_deadline_s=step_deadline_s,
        num_micro_batches=num_micro_batches,
        tensor_links=tensor_links,
    )


@contextmanager
def serving(server: ExecutorServer, *links: NativeLink) -> Iterator[Serving]:
    """The server in a thread; its links are closed in the end."""
    thread = Serving(server)
    try:
        yield thread
    finally:
        thread.stop = True
        for link in links:
            link.close()
        thread.thread.join()
