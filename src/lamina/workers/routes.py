"""The model worker's end of each link to an attention executor.

Which rows go where is resolved once per step (`Route`); per layer, native code packs the rows and
heads of q, k and v straight from the slices' tensors into mailbox slots.

Shapes: T rows of the step, A of them attending on this executor, N stored on it; Hq, Hkv heads of
the layer, hq, hkv of the executor's share.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import msgspec
import torch

from lamina import _native
from lamina.attention.partition import kv_head_range, query_head_range, shard_specs
from lamina.attention.spec import AttentionSpec
from lamina.transport.native import NativeLink
from lamina.transport.topology import PLAN_MAILBOX, plan_mailbox_bytes, step_mailboxes
from lamina.types import StepPlan

Share = tuple[int, int, int]
"""Head units [start, stop) of how many: an executor's part of every layer."""

_encode_plan = msgspec.msgpack.Encoder().encode


class ExecutorEnd:
    """The model worker's end of the link to one attention executor, and the share it computes."""

    def __init__(
        self,
        executor: int,
        link: NativeLink,
        specs: Sequence[AttentionSpec],
        share: Share,
        *,
        dtype: torch.dtype,
        max_rows: int,
        max_spans: int,
        on_plan: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            specs: every layer, whole.
            share: the executor's part of them.
            on_plan: called after a plan is posted; runs the executor's side of it where that side
                lives in this very thread.
        """
        self.executor = executor
        self.link = link
        self.dtype = dtype
        self.native = _native.ExecutorEnd(
            link.native,
            [_layer_shares(spec, share, dtype.itemsize) for spec in specs],
            step_mailboxes(shard_specs(specs, *share), dtype.itemsize, max_rows),
        )
        self._plans = link.outbox(PLAN_MAILBOX, plan_mailbox_bytes(max_spans))
        self._on_plan = on_plan
        self.num_plans = 0
        """Plans posted so far."""

    def post_plan(self, plan: StepPlan, deadline: float) -> None:
        """Send the executor its part of a step's plan, ahead of layer 0."""
        payload = bytearray(_encode_plan(plan.for_executor(self.executor)))
        self.num_plans += 1
        part = torch.frombuffer(payload, dtype=torch.uint8)
        self._plans.post(self.num_plans, part, deadline=deadline)
        if self._on_plan is not None:
            self._on_plan()


class Route:
    """What goes to and comes from one executor in each layer of one step."""

    def __init__(self, end: ExecutorEnd, plan: StepPlan) -> None:
        attending: list[tuple[int, int]] = []
        stored: list[tuple[int, int]] = []
        row = 0
        for span in plan.spans:
            if end.executor in span.attend_on:
                _append_run(attending, row, span.num_rows)
            if end.executor in span.store_on:
                _append_run(stored, row, span.num_rows)
            row += span.num_rows
        self.attends = bool(attending)
        self.stores = bool(stored)
        self.attends_everywhere = attending == [(0, row)]
        """Every row of the step attends here."""
        self._micro_batch = plan.micro_batch
        self._end = end.native
        self._dtype = end.dtype
        self._views: dict[tuple[int, torch.Size], torch.Tensor] = {}
        self._end.begin(plan.micro_batch, attending, stored)

    def post_q(self, layer: int, number: int, q_THD: torch.Tensor, deadline: float) -> None:
        """Send the attending rows of q [T, Hq, Dk], contiguous."""
        self._end.post_q(self._micro_batch, layer, number, q_THD.data_ptr(), deadline)

    def post_kv(
        self, layer: int, number: int, k_THD: torch.Tensor, v_THD: torch.Tensor, deadline: float
    ) -> None:
        """Send the stored rows of k [T, Hkv, Dk] and v [T, Hkv, Dv], contiguous."""
        self._end.post_kv(
            self._micro_batch, layer, number, k_THD.data_ptr(), v_THD.data_ptr(), deadline
        )

    def view_out(self, layer: int, number: int, shape: torch.Size, deadline: float) -> torch.Tensor:
        """The executor's output [A, hq, Dv], in the mailbox: valid until the next layer's."""
        address = self._end.wait_out(self._micro_batch, layer, number, deadline)
        view = self._views.get((address, shape))
        if view is None:
            memory = (ctypes.c_char * (shape.numel() * self._dtype.itemsize)).from_address(address)
            view = torch.frombuffer(memory, dtype=self._dtype).view(shape)
            self._views[address, shape] = view
        return view

    def collect_out(self, layer: int, number: int, out_THD: torch.Tensor, deadline: float) -> None:
        """Copy the executor's output to its rows and heads of the layer's output [T, Hq, Dv]."""
        self._end.collect_out(self._micro_batch, layer, number, out_THD.data_ptr(), deadline)


def _append_run(runs: list[tuple[int, int]], start: int, count: int) -> None:
    """Add rows, as a part of the last run where they follow it."""
    if runs and sum(runs[-1]) == start:
        runs[-1] = (runs[-1][0], runs[-1][1] + count)
    else:
        runs.append((start, count))


_HeadShare = tuple[int, int, int]


def _layer_shares(
    spec: AttentionSpec, share: Share, itemsize: int
) -> tuple[_HeadShare, _HeadShare, _HeadShare, _HeadShare]:
    """Row size, offset and size in bytes of the share, for q, k, v and out."""

    def head_share(num_heads: int, heads: tuple[int, int], dim: int) -> _HeadShare:
        size = dim * itemsize
        return (num_heads * size, heads[0] * size, (heads[1] - heads[0]) * size)

    query_heads, kv_heads = query_head_range(spec, *share), kv_head_range(spec, *share)
    return (
        head_share(spec.num_query_heads, query_heads, spec.head_dim_k),
        head_share(spec.num_kv_heads, kv_heads, spec.head_dim_k),
        head_share(spec.num_kv_heads, kv_heads, spec.head_dim_v),
        head_share(spec.num_query_heads, query_heads, spec.head_dim_v),
    )
