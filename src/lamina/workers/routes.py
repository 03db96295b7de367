"""One executor's part of a step on the model worker's side, resolved once per step.

Shapes: T rows of the step, A of them attending on this executor, N stored on it; Hq, Hkv heads of
the layer, hq, hkv of the executor's share.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from lamina.attention.spec import AttentionSpec
from lamina.transport.mailbox import Link
from lamina.transport.topology import MailboxId, mailbox_capacity_bytes
from lamina.types import StepPlan

RowSelector = slice | torch.Tensor


class ExecutorEnd:
    """The model worker's end of the link to one attention executor, and the share it computes."""

    def __init__(
        self,
        executor: int,
        link: Link,
        specs: Sequence[AttentionSpec],
        query_heads: Sequence[slice],
        kv_heads: Sequence[slice],
        *,
        dtype: torch.dtype,
        max_rows: int,
        max_spans: int,
    ) -> None:
        """
        Args:
            specs: every layer, cut to the executor's share.
            query_heads, kv_heads: the share's place among the layer's heads, per layer.
        """
        self.executor = executor
        self.link = link
        self.query_heads = tuple(query_heads)
        self.kv_heads = tuple(kv_heads)
        self.out_shapes = tuple((s.num_query_heads, s.head_dim_v) for s in specs)
        self.dtype = dtype
        capacity = mailbox_capacity_bytes(specs, dtype.itemsize, max_rows, max_spans)
        self.plans = link.outbox(MailboxId.PLAN, capacity[MailboxId.PLAN])
        self.q = link.outbox(MailboxId.Q, capacity[MailboxId.Q])
        self.kv = link.outbox(MailboxId.KV, capacity[MailboxId.KV])
        self.out = link.inbox(MailboxId.OUT, capacity[MailboxId.OUT])
        self.num_plans = 0


class Route:
    """What goes to and comes from one executor in each layer of one step."""

    def __init__(self, end: ExecutorEnd, plan: StepPlan) -> None:
        self.end = end
        self.plan = plan.for_executor(end.executor)
        attending: list[int] = []
        stored: list[int] = []
        row = 0
        for span in plan.spans:
            rows = range(row, row + span.num_rows)
            if end.executor in span.attend_on:
                attending.extend(rows)
            if end.executor in span.store_on:
                stored.extend(rows)
            row += span.num_rows
        self.num_attending = len(attending)
        self.num_stored = len(stored)
        self._attending_rows = _selector(attending)
        self._stored_rows = _selector(stored)

    def post_plan(self, deadline: float) -> None:
        """Send the executor its part of the plan, ahead of layer 0."""
        end = self.end
        payload = bytearray(msgspec.msgpack.encode(self.plan))
        end.num_plans += 1
        end.plans.post(
            end.num_plans, torch.frombuffer(payload, dtype=torch.uint8), deadline=deadline
        )

    def post_q(self, layer: int, number: int, q_THD: torch.Tensor, deadline: float) -> None:
        """Send the attending rows of q [T, Hq, Dk]."""
        part = q_THD[self._attending_rows][:, self.end.query_heads[layer]].contiguous()
        self.end.q.post(number, part, deadline=deadline)

    def post_kv(
        self, layer: int, number: int, k_THD: torch.Tensor, v_THD: torch.Tensor, deadline: float
    ) -> None:
        """Send the stored rows of k [T, Hkv, Dk] and v [T, Hkv, Dv]."""
        heads = self.end.kv_heads[layer]
        k = k_THD[self._stored_rows][:, heads].contiguous()
        v = v_THD[self._stored_rows][:, heads].contiguous()
        self.end.kv.post(number, k, v, deadline=deadline)

    def wait_out(self, layer: int, number: int, deadline: float) -> torch.Tensor:
        """The executor's output [A, hq, Dv], a view of the mailbox."""
        heads, dim = self.end.out_shapes[layer]
        num_bytes = self.num_attending * heads * dim * self.end.dtype.itemsize
        payload = self.end.out.wait(number, deadline, num_bytes=num_bytes)
        return payload.view(self.end.dtype).view(self.num_attending, heads, dim)

    def place(self, layer: int, part_AHD: torch.Tensor, out_THD: torch.Tensor) -> None:
        """Copy the executor's output to its rows and heads of the layer's output [T, Hq, Dv]."""
        out_THD[self._attending_rows, self.end.query_heads[layer]] = part_AHD


def _selector(rows: list[int]) -> RowSelector:
    """A slice where the rows are consecutive (no copy), else their indices."""
    if not rows:
        return slice(0, 0)
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, dtype=torch.int64)
