"""The executor's side of a link: plans, q, k and v in, outputs out.

The same code serves the local executor (called from the model worker's wait) and a remote one (the
loop of an attention worker's process).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import torch

from lamina.attention.executor import AttentionExecutor
from lamina.attention.spec import AttentionSpec
from lamina.errors import ProtocolMismatch
from lamina.transport.mailbox import Inbox, Link
from lamina.transport.topology import MailboxId, mailbox_capacity_bytes, message_number
from lamina.types import ExecutorPlan

_decode_plan = msgspec.msgpack.Decoder(ExecutorPlan).decode


class ExecutorServer:
    """Serves one attention executor over the mailboxes of one link, one layer at a time."""

    def __init__(
        self,
        link: Link,
        executor: AttentionExecutor,
        specs: Sequence[AttentionSpec],
        *,
        dtype: torch.dtype,
        max_rows: int,
        max_spans: int,
        step_deadline_s: float,
    ) -> None:
        self.executor = executor
        self.busy_s = 0.0
        """Seconds spent computing attention, summed over steps."""
        self._link = link
        self._specs = tuple(specs)
        self._dtype = dtype
        self._step_deadline_s = step_deadline_s
        capacity = mailbox_capacity_bytes(specs, dtype.itemsize, max_rows, max_spans)
        self._plans = link.inbox(MailboxId.PLAN, capacity[MailboxId.PLAN])
        self._q = link.inbox(MailboxId.Q, capacity[MailboxId.Q])
        self._kv = link.inbox(MailboxId.KV, capacity[MailboxId.KV])
        self._out = link.outbox(MailboxId.OUT, capacity[MailboxId.OUT])
        self.num_plans = 0
        self._plan: ExecutorPlan | None = None
        self._layer = 0
        self._num_rows = self._num_attending = 0

    @property
    def in_step(self) -> bool:
        """Whether layers of a step are still to be served."""
        return self._plan is not None

    def begin_step(self, deadline: float) -> None:
        """Wait for the next plan and prepare it. A plan without rows is done at once.

        Raises:
            DeadlineExceeded: no plan came; call again.
        """
        payload = self._plans.wait(self.num_plans + 1, deadline)
        self.num_plans += 1
        try:
            plan = _decode_plan(payload.numpy().data)
        except msgspec.DecodeError as error:
            raise ProtocolMismatch(
                f"unreadable step plan: {error}", peer=self._link.peer
            ) from error
        self.executor.begin(plan)
        self._num_rows, self._num_attending = plan.num_rows, plan.num_attending_rows
        self._plan = plan if self._num_rows else None
        self._layer = 0

    @torch.inference_mode()
    def serve_layer(self) -> None:
        """Wait for q (start on the cached tokens), then for k and v; post the output.

        Raises:
            DeadlineExceeded: the model worker fell silent; the step is given up.
        """
        plan = self._plan
        assert plan is not None, "begin_step comes first"
        layer, spec = self._layer, self._specs[self._layer]
        number = message_number(plan.step, layer, len(self._specs))
        self._plan = None  # given up unless the layer succeeds
        deadline = time.monotonic() + self._step_deadline_s
        num_attending, num_rows = self._num_attending, self._num_rows
        if num_attending:
            q = self._receive(self._q, number, deadline, num_attending,
                              ((spec.num_query_heads, spec.head_dim_k),))[0]  # fmt: skip
            start = time.perf_counter()
            self.executor.attend_cached(layer, q)
            self.busy_s += time.perf_counter() - start
        k, v = self._receive(
            self._kv, number, deadline, num_rows,
            ((spec.num_kv_heads, spec.head_dim_k), (spec.num_kv_heads, spec.head_dim_v)),
        )  # fmt: skip
        start = time.perf_counter()
        out = self.executor.finish(layer, k, v)
        self.busy_s += time.perf_counter() - start
        if num_attending:
            self._out.post(number, out, deadline=deadline)
        self._layer += 1
        if self._layer < len(self._specs):
            self._plan = plan

    def pump(self) -> None:
        """Serve the next thing that is due, for a link whose sender runs in this very thread."""
        if self.in_step:
            self.serve_layer()
        else:
            self.begin_step(deadline=time.monotonic())

    def _receive(
        self,
        inbox: Inbox,
        number: int,
        deadline: float,
        num_rows: int,
        shapes: tuple[tuple[int, int], ...],
    ) -> list[torch.Tensor]:
        """The message's tensors [num_rows, *shape], one after the other, views of the mailbox."""
        sizes = [num_rows * heads * dim for heads, dim in shapes]
        payload = inbox.wait(number, deadline, num_bytes=sum(sizes) * self._dtype.itemsize)
        parts = torch.split(payload.view(self._dtype), sizes)
        return [p.view(num_rows, h, d) for p, (h, d) in zip(parts, shapes, strict=True)]
