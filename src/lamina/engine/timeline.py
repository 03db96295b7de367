"""What every worker did when, step by step: `StepRecord`s for traces, breakdowns and histograms.

Recording costs a few references per step: model workers write clock readings into one array per
step while they run it, executors send theirs as reports, which come up to a few steps later.

Workers on other machines have clocks of their own. How far they are off follows from the order of
messages: an executor begins with a layer after its q was computed, and the model worker has the
output after the executor had k and v. The layers of all steps bound the offset from both sides; the
middle is taken, or 0 where that is possible, as it is for every worker on the engine's machine.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from lamina.engine.events import AttentionMark, ModelMark, StepRecord, Times, WorkerTimes
from lamina.workers.pipeline import Finished

NUM_STEPS = 256
"""Steps that a timeline keeps."""

_MOST_LATE = 16
"""Steps after which a report is no longer waited for: the executor had no room for it."""

_SAME_CLOCK_S = 1e-3
"""Bounds may miss 0 by this: a reading is taken a little after what it is of."""

_OFFSET_PERIOD = 16
"""Every so many reports of an executor its clock is looked at again."""


class _Pending:
    """A step whose reports are not all there."""

    __slots__ = ("expected", "record", "reports")

    def __init__(self, record: StepRecord, expected: frozenset[int]) -> None:
        self.record = record
        self.expected = expected
        self.reports: dict[int, Times] = {}


class ClockOffset:
    """Seconds to add to a worker's clock to get the engine's."""

    def __init__(self) -> None:
        self._low = -math.inf
        self._high = math.inf

    @property
    def seconds(self) -> float:
        low, high = self._low, self._high
        if low - _SAME_CLOCK_S <= 0.0 <= high + _SAME_CLOCK_S:
            return 0.0
        if math.isinf(low) or math.isinf(high):
            return low if math.isinf(high) else high
        return (low + high) / 2

    def observe(self, model: tuple[WorkerTimes, ...], times_L4: Times) -> None:
        """Learn from a step: the model workers' times and the executor's own."""
        attends = np.nonzero(times_L4[:, AttentionMark.ATTEND_BEGIN])[0]
        for worker in model:
            began = attends[worker.times[attends, ModelMark.DONE] > 0]
            if len(began):
                sent = worker.times[began, ModelMark.Q_DONE]
                after = (sent - times_L4[began, AttentionMark.ATTEND_BEGIN]).max()
                self._low = max(self._low, float(after))
            ended = attends[worker.times[attends + 1, ModelMark.DONE] > 0]
            if len(ended):
                received = worker.times[ended + 1, ModelMark.BEGIN]
                before = (received - times_L4[ended, AttentionMark.FINISH_BEGIN]).min()
                self._high = min(self._high, float(before))


class Timeline:
    """Makes records of steps and keeps the last ones. One thread uses it."""

    def __init__(self, executor_name: Callable[[int], str], *, num_steps: int = NUM_STEPS) -> None:
        self._executor_name = executor_name
        self._pending: deque[_Pending] = deque()
        self._records: deque[StepRecord] = deque(maxlen=num_steps)
        self._offsets: dict[int, ClockOffset] = {}
        self._num_reports: dict[int, int] = {}

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """The last steps that are complete, oldest first."""
        return tuple(self._records)

    def add(
        self,
        finished: Finished,
        *,
        begin_s: float,
        planned_s: float,
        logits_s: float,
        end_s: float,
    ) -> list[StepRecord]:
        """Take down a step that is through, and the reports that came with it.

        Returns:
            Records that are complete now, in the order in which the steps ended.
        """
        plan = finished.plan
        if plan.spans:
            record = StepRecord(
                step=plan.step,
                micro_batch=plan.micro_batch,
                num_rows=plan.num_rows,
                begin_s=begin_s,
                planned_s=planned_s,
                logits_s=logits_s,
                end_s=end_s,
                model=_model_times(finished.times),
                attention=(),
            )
            self._pending.append(_Pending(record, finished.executors))
        for report in finished.reports:
            for pending in self._pending:
                if pending.record.step == report.step:
                    pending.reports[report.executor] = report.times
                    break
        complete = []
        while self._pending and (
            self._pending[0].reports.keys() >= self._pending[0].expected
            or len(self._pending) > _MOST_LATE
        ):
            complete.append(self._complete(self._pending.popleft()))
        return complete

    def flush(self) -> list[StepRecord]:
        """Give up on reports that have not come. Returns as `add`."""
        pending, self._pending = self._pending, deque()
        return [self._complete(step) for step in pending]

    def clock_offset(self, executor: int) -> float:
        """Seconds to add to the executor's clock to get the engine's; 0 before it is known."""
        offset = self._offsets.get(executor)
        return 0.0 if offset is None else offset.seconds

    def _complete(self, pending: _Pending) -> StepRecord:
        attention = []
        for executor, times_L4 in sorted(pending.reports.items()):
            offset = self._offset(executor, pending.record.model, times_L4)
            times = times_L4 if offset == 0.0 else np.where(times_L4 != 0, times_L4 + offset, 0.0)
            attention.append(WorkerTimes(self._executor_name(executor), times))
        record = pending.record._replace(attention=tuple(attention))
        self._records.append(record)
        return record

    def _offset(self, executor: int, model: tuple[WorkerTimes, ...], times_L4: Times) -> float:
        offset = self._offsets.setdefault(executor, ClockOffset())
        count = self._num_reports.get(executor, 0)
        self._num_reports[executor] = count + 1
        if count % _OFFSET_PERIOD == 0:
            offset.observe(model, times_L4)
        return offset.seconds


def _model_times(times: Mapping[str, array[float]]) -> tuple[WorkerTimes, ...]:
    num_marks = len(ModelMark)
    return tuple(
        WorkerTimes(worker, np.frombuffer(values, dtype=np.float64).reshape(-1, num_marks))
        for worker, values in times.items()
    )
