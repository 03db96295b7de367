"""A pipeline whose slices run in model ranks' processes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from lamina import _native
from lamina.convert import SlicedModel
from lamina.errors import DeadlineExceeded, PeerLost
from lamina.transport.topology import STEP_MAILBOX, result_mailbox, step_mailbox_bytes
from lamina.types import LOCAL, StepPlan
from lamina.workers.model import StepInputs
from lamina.workers.pipeline import Finished, executor_parts
from lamina.workers.plans import PlanEnd, Report, Times
from lamina.workers.rank_messages import RankResult, pack_step, result_bytes, unpack_result
from lamina.workers.ranks import ModelRanks
from lamina.workers.steptimes import StepTimes


class _InFlight:
    """A step that the ranks work on."""

    def __init__(
        self,
        plan: StepPlan,
        executors: frozenset[int],
        *,
        num_logit_rows: int,
        ranks: Iterable[str],
        deadline: float,
    ) -> None:
        self.plan = plan
        self.executors = executors
        self.num_logit_rows = num_logit_rows
        self.waiting = list(ranks)
        self.results: dict[str, RankResult] = {}
        self.deadline = deadline


class RemotePipeline:
    """Sends every step to all ranks and collects what they return (a `Pipeline`)."""

    runs_ahead = True

    def __init__(
        self,
        ranks: ModelRanks,
        model: SlicedModel,
        plan_ends: Sequence[PlanEnd],
        *,
        num_micro_batches: int,
        max_rows: int,
        max_spans: int,
        max_shares: int,
        step_deadline_s: float,
    ) -> None:
        """
        Args:
            ranks: connected.
            model: its structure is enough.
            plan_ends: of the attention workers.
            max_rows, max_spans, max_shares: most of one step.
        """
        self.num_micro_batches = num_micro_batches
        self.times = StepTimes()
        self._ranks = ranks
        self._model = model
        self._plan_ends = {end.executor: end for end in plan_ends}
        self._step_deadline_s = step_deadline_s
        # A slice waits for a context and an output; the engine's patience covers a whole step.
        self._result_deadline_s = step_deadline_s * (model.num_layers + 1)
        step_bytes = step_mailbox_bytes(max_rows, max_spans, max_shares)
        capacity = result_bytes(
            model.num_layers, max_rows * model.vocab_size * model.dtype.itemsize
        )
        self._steps = {n: link.outbox(STEP_MAILBOX, step_bytes) for n, link in ranks.links.items()}
        self._results = {
            name: [link.inbox(result_mailbox(m), capacity) for m in range(num_micro_batches)]
            for name, link in ranks.links.items()
        }
        self._in_flight: dict[int, _InFlight] = {}
        self._through: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan, inputs: StepInputs) -> None:
        start = time.monotonic()
        deadline = start + self._step_deadline_s
        try:
            parts = executor_parts(plan)
            for executor, part in parts.items():
                if executor != LOCAL:
                    self._plan_ends[executor].post(part, deadline)
            self._ranks.num_steps += 1
            step = pack_step(plan, inputs)
            for outbox in self._steps.values():
                outbox.post(self._ranks.num_steps, step, deadline=deadline)
        except PeerLost as error:
            self._ranks.missed(error)
            raise
        if plan.spans:
            self._in_flight[plan.micro_batch] = _InFlight(
                plan,
                frozenset(e for e, part in parts.items() if part.spans),
                num_logit_rows=len(inputs.logit_rows),
                ranks=self._results,
                deadline=start + self._result_deadline_s,
            )
        else:
            self._through.append(plan)
        self.times.steps_s += time.monotonic() - start

    def collect(self) -> Finished:
        reports: list[Report] = []
        if self._through:
            plan, executors, times = self._through.popleft(), frozenset[int](), {}
            logits = self._no_logits()
        else:
            step = self._wait()
            plan, executors, logits = step.plan, step.executors, self._logits(step)
            times = {name: result.times for name, result in step.results.items()}
            for one in times.values():
                self.times.steps_s += self.times.add(one)
            if LOCAL in executors:
                reports.append(self._local_report(step))
        for end in self._plan_ends.values():
            reports += end.take_reports()
        return Finished(plan, logits, executors, times, tuple(reports))

    def _wait(self) -> _InFlight:
        """Block until all ranks are through with one of the steps."""
        try:
            while True:
                for micro_batch, step in self._in_flight.items():
                    self._take_results(micro_batch, step)
                    if not step.waiting:
                        return self._in_flight.pop(micro_batch)
                awaited = [
                    (self._results[name][micro_batch].native, step.plan.step)
                    for micro_batch, step in self._in_flight.items()
                    for name in step.waiting
                ]
                first = min(self._in_flight.values(), key=lambda step: step.deadline)
                try:
                    _native.wait_any(awaited, first.deadline)
                except DeadlineExceeded:
                    raise DeadlineExceeded(
                        f"did not finish step {first.plan.step} in time",
                        peer=", ".join(first.waiting),
                    ) from None
        except PeerLost as error:
            self._ranks.missed(error)
            raise

    def _take_results(self, micro_batch: int, step: _InFlight) -> None:
        shape = (step.num_logit_rows, self._model.vocab_size)
        for name in list(step.waiting):
            inbox = self._results[name][micro_batch]
            if inbox.native.holds(step.plan.step):
                payload = inbox.wait(step.plan.step, 0.0)
                step.results[name] = unpack_result(
                    payload, self._model.num_layers, shape, self._model.dtype
                )
                step.waiting.remove(name)

    def _logits(self, step: _InFlight) -> torch.Tensor:
        for result in step.results.values():
            if result.logits is not None:
                return result.logits
        return self._no_logits()

    def _no_logits(self) -> torch.Tensor:
        return torch.empty(0, self._model.vocab_size, dtype=self._model.dtype)

    def _local_report(self, step: _InFlight) -> Report:
        """The local executors' reports as one: each layer is served by one replica's."""
        leaders = [r for name, r in step.results.items() if name in self._ranks.leaders]
        total: Times = np.sum([result.report for result in leaders], axis=0)
        return Report(LOCAL, step.plan.step, total)
