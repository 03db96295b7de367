"""An attention executor in plain Python: what `types.ExecutorPlan` says, word by word."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import msgspec
import torch
from torch import Tensor

from lamina.attention.merge import Partial
from lamina.attention.partition import head_units, shard_specs
from lamina.attention.reference import reference_attention
from lamina.attention.spec import AttentionSpec
from lamina.errors import DeadlineExceeded
from lamina.transport.inproc import inproc_pair
from lamina.transport.native import NativeLink
from lamina.transport.topology import (
    PLAN_MAILBOX,
    message_number,
    plan_mailbox_bytes,
    step_mailboxes,
)
from lamina.types import ExecutorPlan, ExecutorSpan
from lamina.workers.plans import PlanEnd
from lamina.workers.routes import ExecutorEnd

_decode = msgspec.msgpack.Decoder(ExecutorPlan).decode

Lane = tuple[int, int]
"""A sequence and its first head unit here."""


class _Step:
    def __init__(self, plan: ExecutorPlan, num_layers: int) -> None:
        self.plan = plan
        self.layer = 0
        self.num_layers = num_layers
        self.q: Tensor | None = None
        self.times: list[float] = []
        self.needs_q = any(span.num_attending for span in plan.spans)
        self.needs_kv = any(span.num_stored for span in plan.spans)

    @property
    def number(self) -> int:
        return message_number(self.plan.step, self.layer, self.num_layers)


class PythonExecutor:
    """The executor's side of a pumped link: everything happens in the model worker's waits."""

    def __init__(
        self,
        executor: int,
        specs: Sequence[AttentionSpec],
        *,
        page_units: int,
        dtype: torch.dtype = torch.float32,
        max_rows: int = 64,
        max_spans: int = 16,
        num_micro_batches: int = 1,
    ) -> None:
        self.specs = specs
        self.num_units = head_units(specs)
        self.page_units = page_units
        self.dtype = dtype
        self.lanes: dict[Lane, list[tuple[Tensor, Tensor]]] = {}
        """Per layer k and v [tokens, heads, size]."""
        ours, theirs = inproc_pair("model-worker", f"worker-{executor}", self.pump)
        self.link = ours
        boxes = step_mailboxes(specs, dtype.itemsize, max_rows, num_micro_batches)
        self._inboxes(theirs, boxes, max_spans)
        self.end = ExecutorEnd(
            executor, ours, specs, dtype=dtype, max_rows=max_rows, page_units=page_units,
            num_micro_batches=num_micro_batches,
        )  # fmt: skip
        self.plan_end = PlanEnd(executor, ours, boxes, max_spans=max_spans, on_plan=self.take_plan)
        self.steps: dict[int, _Step] = {}
        self.num_plans = 0

    def _inboxes(self, link: NativeLink, boxes: Sequence[tuple[int, ...]], max_spans: int) -> None:
        self._plans = link.inbox(PLAN_MAILBOX, plan_mailbox_bytes(max_spans))
        self._q = [link.inbox(b[0], b[4]) for b in boxes]
        self._kv = [link.inbox(b[1], b[5]) for b in boxes]
        self._out = [link.outbox(b[2], b[6]) for b in boxes]
        self._reports = [link.outbox(b[3], b[7]) for b in boxes]

    def take_plan(self) -> None:
        self.num_plans += 1
        payload = self._plans.wait(self.num_plans, time.monotonic())
        plan = _decode(payload.numpy().tobytes())
        for sequence in plan.releases:
            for lane in [lane for lane in self.lanes if lane[0] == sequence]:
                del self.lanes[lane]
        if plan.spans:
            assert plan.micro_batch not in self.steps, "the step before is through"
            self.steps[plan.micro_batch] = _Step(plan, len(self.specs))

    def pump(self) -> None:
        did = False
        for micro_batch, step in list(self.steps.items()):
            did |= self._serve(micro_batch, step)
        if not did:
            raise DeadlineExceeded("nothing is there to serve", peer="model-worker")

    def _serve(self, micro_batch: int, step: _Step) -> bool:
        if step.needs_q and step.q is None:
            if not self._q[micro_batch].native.holds(step.number):
                return False
            step.q = self._q[micro_batch].wait(step.number, 0.0).view(self.dtype).clone()
            step.times += [time.monotonic()]
        kv = torch.empty(0, dtype=self.dtype)
        if step.needs_kv:
            if not self._kv[micro_batch].native.holds(step.number):
                return False
            kv = self._kv[micro_batch].wait(step.number, 0.0).view(self.dtype)
        self._append(step, kv)
        if step.needs_q:
            self._attend(micro_batch, step)
        now = time.monotonic()
        step.times += [now, now, now] if step.needs_q else [0.0, 0.0, now, now]
        step.q = None
        step.layer += 1
        if step.layer == step.num_layers:
            del self.steps[micro_batch]
            times = torch.tensor(step.times, dtype=torch.float64)
            self._reports[micro_batch].post(step.plan.step, times, deadline=time.monotonic() + 1)
        return True

    def _lanes(
        self, step: _Step, count: Callable[[ExecutorSpan], int]
    ) -> Iterable[tuple[ExecutorSpan, Lane, AttentionSpec, int]]:
        for span in step.plan.spans:
            for unit in range(span.unit_start, span.unit_stop, self.page_units):
                (spec,) = shard_specs(
                    [self.specs[step.layer]], unit, unit + self.page_units, self.num_units
                )
                if count(span):
                    yield span, (span.sequence, unit), spec, count(span)

    def _append(self, step: _Step, kv: Tensor) -> None:
        lanes = list(self._lanes(step, lambda span: span.num_stored))
        new = {lane: [] for _, lane, _, _ in lanes}  # type: dict[Lane, list[Tensor]]
        offset = 0
        for size in ("head_dim_k", "head_dim_v"):
            for _, lane, spec, count in lanes:
                shape = (count, spec.num_kv_heads, getattr(spec, size))
                length = count * shape[1] * shape[2]
                new[lane].append(kv[offset : offset + length].view(shape).clone())
                offset += length
        assert offset == len(kv), "k and v have the length that the plan says"
        for span, lane, _, _ in lanes:
            layers = self.lanes.setdefault(lane, [])
            k, v = new[lane]
            if len(layers) <= step.layer:
                assert len(layers) == step.layer
                layers.append((k[:0], v[:0]))
            known_k, known_v = (t[: span.context_tokens] for t in layers[step.layer])
            assert len(known_k) == span.context_tokens, "the tokens before are here"
            layers[step.layer] = torch.cat([known_k, k]), torch.cat([known_v, v])

    def _attend(self, micro_batch: int, step: _Step) -> None:
        assert step.q is not None
        outs: list[Partial] = []
        offset = 0
        for span, lane, spec, count in self._lanes(step, lambda span: span.num_attending):
            length = count * spec.num_query_heads * spec.head_dim_k
            q = step.q[offset : offset + length].view(count, -1, spec.head_dim_k)
            offset += length
            k, v = self.lanes[lane][step.layer]
            outs.append(reference_attention(spec, q, k, v, context_tokens=span.first_position))
        assert offset == len(step.q), "q has the length that the plan says"
        if step.plan.is_partial:
            parts = [p.out.flatten() for p in outs] + [p.lse.flatten() for p in outs]
        else:
            parts = [p.out.to(self.dtype).flatten() for p in outs]
        payload = torch.cat(parts)
        self._out[micro_batch].post(step.number, payload, deadline=time.monotonic() + 1)
