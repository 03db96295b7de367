"""When every worker did what: one record per step, given to whoever observes.

Recording costs a few references per step: model workers write clock readings into one array per
step while they run it, executors send theirs as reports. A step's record is passed on when the next
step of its micro-batch is through, because reports may be a little late; one that is later still
(or was left out) is missing from it.

All times are given on the engine's clock (`time.monotonic`). Workers on other machines have clocks
of their own, whose offset follows from the order of messages: attention over a layer begins after
its q was computed, and its output is there after the rest ended. That bounds the offset from both
sides; the middle is taken, or 0 if that is possible, as it is for every worker on the engine's
machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lamina.engine.events import AttentionMark, ModelMark, StepRecord, Times, WorkerTimes
from lamina.types import LOCAL
from lamina.workers.pipeline import Finished
from lamina.workers.plans import Report

_SAME_CLOCK_S = 1e-3
"""Bounds may miss 0 by this: a reading is taken a little after what it is of."""

Observer = Callable[[StepRecord], None]


class Timeline:
    """Makes records of the steps and passes them on. One thread uses it."""

    def __init__(self, executor_names: Mapping[int, str]) -> None:
        self.observers: list[Observer] = []
        self._names = executor_names
        self._open: dict[int, tuple[StepRecord, list[Report]]] = {}

    def add(self, finished: Finished, *, begin_s: float, planned_s: float, logits_s: float,
            end_s: float) -> None:  # fmt: skip
        """A step is through; for the times see `StepRecord`."""
        plan = finished.plan
        before = self._open.pop(plan.micro_batch, None)
        if plan.spans:
            model = tuple(
                WorkerTimes(worker, np.frombuffer(times).reshape(-1, len(ModelMark)))
                for worker, times in finished.times.items()
            )
            record = StepRecord(
                plan.step, plan.micro_batch, plan.num_rows, begin_s, planned_s, logits_s, end_s,
                model, (),
            )  # fmt: skip
            self._open[plan.micro_batch] = record, []
        waiting = [*self._open.values(), *([before] if before else [])]
        for report in finished.reports:
            for other, reports in waiting:
                if other.step == report.step:
                    reports.append(report)
        if before is not None:
            self._pass_on(*before)

    def flush(self) -> None:
        """Pass on the last steps without waiting for reports."""
        for record, reports in sorted(self._open.values(), key=lambda item: item[0].step):
            self._pass_on(record, reports)
        self._open.clear()

    def _pass_on(self, record: StepRecord, reports: list[Report]) -> None:
        attention = []
        for report in sorted(reports, key=lambda report: report.executor):
            times: Times = report.times_L4.numpy()
            offset_s = 0.0 if report.executor == LOCAL else clock_offset(record, times)
            if offset_s:
                times = np.where(times > 0.0, times + offset_s, 0.0)
            attention.append(WorkerTimes(self._names[report.executor], times))
        record = record._replace(attention=tuple(attention))
        for observe in self.observers:
            observe(record)


def clock_offset(record: StepRecord, times_L4: Times) -> float:
    """Seconds to add to an attention worker's clock to get the engine's."""
    low_s, high_s = -np.inf, np.inf
    attend, finish, end = (
        times_L4[:, mark]
        for mark in (
            AttentionMark.ATTEND_BEGIN,
            AttentionMark.FINISH_BEGIN,
            AttentionMark.FINISH_END,
        )
    )
    for _, slices in record.model:
        here, there = slices[:-1], slices[1:]
        for began, mark in ((attend, ModelMark.Q_DONE), (finish, ModelMark.KV_DONE)):
            both = (began > 0.0) & (here[:, mark] > 0.0)
            low_s = max(low_s, np.max((here[:, mark] - began)[both], initial=-np.inf))
        both = (attend > 0.0) & (there[:, ModelMark.BEGIN] > 0.0)
        high_s = min(high_s, np.min((there[:, ModelMark.BEGIN] - end)[both], initial=np.inf))
    if low_s - _SAME_CLOCK_S <= 0.0 <= high_s + _SAME_CLOCK_S:
        return 0.0
    if np.isinf(low_s) or np.isinf(high_s):
        return float(high_s if np.isinf(low_s) else low_s)
    return float(low_s + high_s) / 2
