"""What every worker did when, of the last steps: material for traces, breakdowns and histograms.

Recording costs a few references per step: model workers write clock readings into one array per
step while they run it, executors send theirs as reports. Events are made when somebody asks.

All times are given on the engine's clock (`time.monotonic()`). Workers on other machines have clocks
of their own, whose offset follows from the order of messages: attention over a layer begins after
its q was computed, and its output is there after the rest began. The largest and smallest offsets that
all recorded layers allow bound it; the middle is taken, or 0 if that is possible, as it is for every
worker on the engine's machine.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

import torch

from lamina.types import LOCAL
from lamina.workers.pipeline import Finished
from lamina.workers.steptimes import NUM_TIMES, SliceTimes, slice_times

NUM_STEPS = 512
"""Steps that a timeline keeps."""

_SAME_CLOCK_S = 1e-3
"""Bounds may miss 0 by this: a reading is taken a little after what it is of."""


class Phase(StrEnum):
    """What a worker does. A model worker's phases follow one another; what lies between two of its
    slices is other work, or a bubble."""

    WAIT = "wait"
    """Model worker: for the outputs of the layer before (with a local executor: computing them)."""
    Q = "q"
    """Model worker: the slice up to q."""
    SEND_Q = "send q"
    KV = "kv"
    """Model worker: the slice up to k and v."""
    SEND_KV = "send kv"
    DEFERRED = "deferred"
    """Model worker: what of the slice does not wait for the attention output."""
    LOGITS = "logits"
    """Model worker: the last slice."""
    ATTEND = "attend"
    """Executor: attention over cached tokens."""
    FINISH = "finish"
    """Executor: appending k and v, attention to them, merging, and posting the output."""


_SLICE_PHASES = (Phase.WAIT, Phase.Q, Phase.SEND_Q, Phase.KV, Phase.SEND_KV, Phase.DEFERRED)


class Event(NamedTuple):
    """Something that a worker did."""

    worker: str
    micro_batch: int
    step: int
    layer: int
    """For model workers the slice."""
    phase: Phase
    begin_s: float
    end_s: float


class _Record:
    """One step."""

    __slots__ = ("micro_batch", "num_rows", "reports", "step", "times")

    def __init__(
        self, step: int, micro_batch: int, num_rows: int, times: dict[str, array[float]]
    ) -> None:
        self.step = step
        self.micro_batch = micro_batch
        self.num_rows = num_rows
        self.times = times
        self.reports: dict[int, torch.Tensor] = {}


class Timeline:
    """A ring of the last steps. One thread uses it."""

    def __init__(self, executor_names: dict[int, str], num_steps: int = NUM_STEPS) -> None:
        self._names = executor_names
        self._records: deque[_Record] = deque(maxlen=num_steps)

    def add(self, finished: Finished) -> None:
        """Record a step that is through, and the reports that came with it."""
        plan = finished.plan
        if plan.spans:
            self._records.append(
                _Record(plan.step, plan.micro_batch, plan.num_rows, finished.times)
            )
        for report in finished.reports:
            # They are at most a few steps late.
            for record in reversed(self._records):
                if record.step == report.step:
                    record.reports[report.executor] = report.times_L4
                    break

    def clear(self) -> None:
        self._records.clear()

    def events(self) -> Iterator[Event]:
        """Everything recorded, step by step, worker by worker, in the order of time."""
        offsets = self.clock_offsets()
        for record in self._records:
            for worker, times in record.times.items():
                yield from _slice_events(record, worker, times)
            for executor, times_L4 in record.reports.items():
                offset = offsets[executor]
                yield from _executor_events(record, self._names[executor], times_L4, offset)

    def clock_offsets(self) -> dict[int, float]:
        """Seconds to add to each executor's clock to get the engine's."""
        bounds: dict[int, tuple[float, float]] = {}
        for record in self._records:
            sent, received = _message_times(list(record.times.values()))
            for executor, times_L4 in record.reports.items():
                low, high = bounds.get(executor, (-math.inf, math.inf))
                for layer, (attend, _, finish, _) in enumerate(times_L4.tolist()):
                    if attend:
                        low = max(low, sent[layer] - attend)
                    if finish and attend:
                        high = min(high, received[layer] - finish)
                bounds[executor] = low, high
        return {executor: _offset(executor, *bound) for executor, bound in bounds.items()}


def _offset(executor: int, low: float, high: float) -> float:
    if executor == LOCAL or low - _SAME_CLOCK_S <= 0.0 <= high + _SAME_CLOCK_S:
        return 0.0
    if math.isinf(low) or math.isinf(high):
        return low if math.isinf(high) else high
    return (low + high) / 2


def _message_times(workers: Sequence[array[float]]) -> tuple[list[float], list[float]]:
    """Per layer: when its q was computed, and when its outputs were there."""
    num_slices = max((len(times) // NUM_TIMES for times in workers), default=0)
    sent, received = [-math.inf] * num_slices, [math.inf] * num_slices
    for times in workers:
        for index in range(num_slices):
            at = slice_times(times, index)
            if at.end:
                sent[index] = at.q_end
                received[index - 1] = at.inputs_here if index else received[index - 1]
    return sent, received


def _slice_events(record: _Record, worker: str, times: array[float]) -> Iterator[Event]:
    num_slices = len(times) // NUM_TIMES
    for index in range(num_slices):
        at = slice_times(times, index)
        if not at.end:
            continue
        is_last = index == num_slices - 1
        phases = (Phase.WAIT, Phase.LOGITS) if is_last else _SLICE_PHASES
        yield from _events(record, worker, index, phases, at)


def _events(
    record: _Record, worker: str, layer: int, phases: Sequence[Phase], at: SliceTimes
) -> Iterator[Event]:
    for i, phase in enumerate(phases):
        if at[i + 1] > at[i]:
            yield Event(
                worker, record.micro_batch, record.step, layer, phase, at[i], at[i + 1]
            )


def _executor_events(
    record: _Record, worker: str, times_L4: torch.Tensor, offset: float
) -> Iterator[Event]:
    for layer, (attend, attended, finish, finished) in enumerate(times_L4.tolist()):
        for phase, begin, end in (
            (Phase.ATTEND, attend, attended),
            (Phase.FINISH, finish, finished),
        ):
            if end > begin:
                yield Event(
                    worker, record.micro_batch, record.step, layer, phase, begin + offset,
                    end + offset,
                )  # fmt: skip
