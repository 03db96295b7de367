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

    __slots__ = ("attention_s", "post_s", "slices_s")

    def __init__(self) -> None:
        self.slices_s = 0.0
        """In the model's slices."""
        self.post_s = 0.0
        """Handing q, k and v to mailboxes."""
        self.attention_s = 0.0
        """Waiting for outputs (with a local executor: computing them)."""


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
            Logits, float32 [R, vocabulary]; empty for a plan without rows.

        Raises:
            PeerLost, DeadlineExceeded, ProtocolMismatch: an executor failed; the step is void.
        """
        routes = self._start(plan)
        if not plan.spans:
            return torch.empty(0, self.model.vocab_size)
        model, times = self.model, self.times
        num_layers = len(model.attention_specs)
        sends_q = [r for r in routes if r.num_attending]
        sends_kv = [r for r in routes if r.num_stored]
        clock = time.perf_counter
        start = clock()
        state = model.begin(input_ids_T, position_ids_T, logit_rows_R)
        for layer in range(num_layers):
            number = message_number(plan.step, layer, num_layers)
            deadline = time.monotonic() + self._step_deadline_s
            q = model.run_q(layer, state)
            if self._early_q:
                q_done = clock()
                for route in sends_q:
                    route.post_q(layer, number, q, deadline)
                times.post_s += clock() - q_done
                times.slices_s += q_done - start
                start = clock()
            k, v = model.run_kv(layer, state)
            kv_done = clock()
            times.slices_s += kv_done - start
            if not self._early_q:
                for route in sends_q:
                    route.post_q(layer, number, q, deadline)
            for route in sends_kv:
                route.post_kv(layer, number, k, v, deadline)
            posted = clock()
            times.post_s += posted - kv_done
            model.run_deferred(layer, state)
            deferred = clock()
            times.slices_s += deferred - posted
            state.attention_output = self._collect(sends_q, layer, number, q.shape[0], deadline)
            start = clock()
            times.attention_s += start - deferred
        logits = model.run_last(state)
        times.slices_s += clock() - start
        return logits

    def _start(self, plan: StepPlan) -> list[Route]:
        deadline = time.monotonic() + self._step_deadline_s
        executors = plan.executors()
        routes = [Route(end, plan) for e, end in self._ends.items() if e in executors]
        for route in routes:
            route.post_plan(deadline)
        return routes

    def _collect(
        self, routes: list[Route], layer: int, number: int, num_rows: int, deadline: float
    ) -> torch.Tensor:
        """The layer's attention output [T, Hq, Dv] from all executors that computed a part of it.

        In reverse order: the local one computes when it is waited for; the others already run.
        """
        spec = self.model.attention_specs[layer]
        first = routes[-1].wait_out(layer, number, deadline)
        if len(routes) == 1 and first.shape[:2] == (num_rows, spec.num_query_heads):
            return first
        out = torch.empty(num_rows, spec.num_query_heads, spec.head_dim_v, dtype=self.model.dtype)
        routes[-1].place(layer, first, out)
        for route in routes[-2::-1]:
            route.place(layer, route.wait_out(layer, number, deadline), out)
        return out
