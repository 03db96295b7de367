"""The model worker: runs the slices of one step and exchanges q, k, v and outputs with executors.

It holds weights and no request state. Local and remote executors differ only in the link.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from lamina.convert.slices import SlicedModel
from lamina.transport.topology import message_number
from lamina.types import LOCAL, StepPlan
from lamina.workers.routes import ExecutorEnd, Route


class StepTimes:
    """Seconds that the model worker spent, summed over steps."""

    __slots__ = ("attention_s", "post_s", "slices_s", "steps_s")

    def __init__(self) -> None:
        self.slices_s = 0.0
        """In the model's slices."""
        self.post_s = 0.0
        """Handing q, k and v to mailboxes."""
        self.attention_s = 0.0
        """Waiting for outputs (with a local executor: computing them)."""
        self.steps_s = 0.0
        """In steps, all in all."""

    @property
    def other_s(self) -> float:
        """What the phases leave over: routes, plans, and the loop over layers."""
        return self.steps_s - self.slices_s - self.post_s - self.attention_s


class ModelWorker:
    """Runs step plans over a sliced model."""

    def __init__(
        self,
        model: SlicedModel,
        ends: Sequence[ExecutorEnd],
        *,
        early_q: bool,
        step_deadline_s: float,
    ) -> None:
        self.model = model
        self.times = StepTimes()
        # The local executor last: the others get their q, k and v first.
        self._ends = {end.executor: end for end in sorted(ends, key=lambda e: e.executor == LOCAL)}
        self._early_q = early_q
        self._step_deadline_s = step_deadline_s

    @torch.inference_mode()
    def run(
        self,
        plan: StepPlan,
        input_ids_T: torch.Tensor,
        position_ids_T: torch.Tensor,
        logit_rows_R: torch.Tensor,
    ) -> torch.Tensor:
        """Run one step through all slices.

        Args:
            plan: posted to every executor that takes part, ahead of layer 0.
            input_ids_T, position_ids_T: int64, one per row of the plan.
            logit_rows_R: int64, the rows whose logits are wanted.

        Returns:
            Logits [R, vocabulary] in the model's dtype; empty for a plan without rows.

        Raises:
            PeerLost, DeadlineExceeded, ProtocolMismatch: an executor failed; the step is void.
        """
        step_start = time.perf_counter()
        routes = self._start(plan)
        if not plan.spans:
            return torch.empty(0, self.model.vocab_size, dtype=self.model.dtype)
        model, times = self.model, self.times
        num_layers = len(model.attention_specs)
        sends_q = [r for r in routes if r.attends]
        sends_kv = [r for r in routes if r.stores]
        outputs = _Outputs(model, sends_q, plan.num_rows)
        first_number = message_number(plan.step, 0, num_layers)
        early_q, step_deadline_s = self._early_q, self._step_deadline_s
        clock, monotonic = time.perf_counter, time.monotonic
        slices_s = post_s = attention_s = 0.0
        start = clock()
        state = model.begin(input_ids_T, position_ids_T, logit_rows_R)
        for layer in range(num_layers):
            number = first_number + layer
            deadline = monotonic() + step_deadline_s
            q = model.run_q(layer, state)
            if early_q:
                q_done = clock()
                for route in sends_q:
                    route.post_q(layer, number, q, deadline)
                slices_s += q_done - start
                start = clock()
                post_s += start - q_done
            k, v = model.run_kv(layer, state)
            kv_done = clock()
            if not early_q:
                for route in sends_q:
                    route.post_q(layer, number, q, deadline)
            for route in sends_kv:
                route.post_kv(layer, number, k, v, deadline)
            posted = clock()
            model.run_deferred(layer, state)
            deferred = clock()
            state.attention_output = outputs.wait(layer, number, deadline)
            waited = clock()
            slices_s += kv_done - start + deferred - posted
            post_s += posted - kv_done
            attention_s += waited - deferred
            start = waited
        logits = model.run_last(state)
        end = clock()
        times.slices_s += slices_s + end - start
        times.post_s += post_s
        times.attention_s += attention_s
        times.steps_s += end - step_start
        return logits

    def _start(self, plan: StepPlan) -> list[Route]:
        deadline = time.monotonic() + self._step_deadline_s
        executors = plan.executors()
        ends = [end for executor, end in self._ends.items() if executor in executors]
        for end in ends:
            end.post_plan(plan, deadline)
        return [Route(end, plan) for end in ends]


class _Outputs:
    """The attention outputs of one step, layer by layer: [T, Hq, Dv]."""

    def __init__(self, model: SlicedModel, routes: Sequence[Route], num_rows: int) -> None:
        self._routes = routes
        self._shapes = [
            torch.Size((num_rows, s.num_query_heads, s.head_dim_v)) for s in model.attention_specs
        ]
        # One executor that computes all rows and heads: its output is used where it lies.
        self._is_whole = len(routes) == 1 and routes[0].attends_everywhere
        self._dtype = model.dtype
        self._buffers: dict[tuple[int, torch.Size], torch.Tensor] = {}

    def wait(self, layer: int, number: int, deadline: float) -> torch.Tensor:
        """The layer's output; overwritten when that of the second layer after it is waited for.

        In reverse order: the local executor computes when it is waited for; the others already run.
        """
        shape = self._shapes[layer]
        if self._is_whole:
            return self._routes[0].view_out(layer, number, shape, deadline)
        key = (layer % 2, shape)
        out = self._buffers.get(key)
        if out is None:
            out = self._buffers[key] = torch.empty(shape, dtype=self._dtype)
        for route in reversed(self._routes):
            route.collect_out(layer, number, out, deadline)
        return out
