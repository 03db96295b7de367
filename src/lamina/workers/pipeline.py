"""Steps in flight: what the engine submits to and collects from, whoever runs the slices."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from lamina.types import ExecutorPlan, StepPlan
from lamina.workers.model import ModelWorker, StepInputs
from lamina.workers.plans import PlanEnd, Report
from lamina.workers.steptimes import StepTimes

MODEL_WORKER = "model"


class Finished(NamedTuple):
    """A step that is through."""

    plan: StepPlan
    logits: torch.Tensor
    """[R, vocabulary] in the model's dtype."""
    executors: frozenset[int]
    """Those that took part in the step, and report on it."""
    times: dict[str, array[float]]
    """Per model worker the `SliceTimes` of the slices that it ran."""
    reports: tuple[Report, ...]
    """What executors have reported since the last step that was collected; for this step or earlier
    ones."""


class Pipeline(Protocol):
    """Runs the steps of up to `num_micro_batches` micro-batches at once, one per micro-batch."""

    num_micro_batches: int
    runs_ahead: bool
    """Steps go on while nobody is in `collect`: submit the next one as soon as it is known."""
    times: StepTimes

    def submit(self, plan: StepPlan, inputs: StepInputs) -> None:
        """Begin a step; no other of its micro-batch may be in flight.

        Raises:
            TransportError, CapacityError: an executor failed; the pipeline is of no use any more.
        """

    def collect(self) -> Finished:
        """Block until a step is through. One must be in flight. Raises as `submit`."""


class LocalPipeline:
    """Runs the slices in the caller's own thread, while it collects."""

    runs_ahead = False

    def __init__(
        self,
        worker: ModelWorker,
        plan_ends: Sequence[PlanEnd],
        *,
        num_micro_batches: int,
        step_deadline_s: float,
    ) -> None:
        """`plan_ends`: of every executor that `worker` is connected with."""
        self.num_micro_batches = num_micro_batches
        self.times = StepTimes()
        self._worker = worker
        self._plan_ends = {end.executor: end for end in plan_ends}
        self._step_deadline_s = step_deadline_s
        self._steps: dict[int, tuple[StepPlan, frozenset[int]]] = {}
        self._through: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan, inputs: StepInputs) -> None:
        start = time.monotonic()
        parts = executor_parts(plan)
        for executor, part in parts.items():
            self._plan_ends[executor].post(part, start + self._step_deadline_s)
        if plan.spans:
            executors = frozenset(e for e, part in parts.items() if part.spans)
            self._steps[plan.micro_batch] = plan, executors
            self._worker.begin(plan, parts, inputs)
        else:
            self._through.append(plan)
        self.times.steps_s += time.monotonic() - start

    def collect(self) -> Finished:
        start = time.monotonic()
        worker = self._worker
        if self._through:
            plan, executors, times = self._through.popleft(), frozenset[int](), {}
            logits = torch.empty(0, worker.model.vocab_size, dtype=worker.model.dtype)
        else:
            result = None
            while result is None:
                micro_batch, result = worker.run_next()
            logits = result
            plan, executors = self._steps.pop(micro_batch)
            times = {MODEL_WORKER: worker.times(micro_batch)}
            self.times.add(times[MODEL_WORKER])
        reports = tuple(r for end in self._plan_ends.values() for r in end.take_reports())
        self.times.steps_s += time.monotonic() - start
        return Finished(plan, logits, executors, times, reports)


def executor_parts(plan: StepPlan) -> dict[int, ExecutorPlan]:
    """The parts of a plan for all executors that have something to do."""
    parts = {executor: plan.for_executor(executor) for executor in sorted(plan.executors())}
    return {e: part for e, part in parts.items() if part.spans or part.releases}
