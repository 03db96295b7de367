"""Histograms of where steps spend their time, for the metrics of a server.

A breakdown takes some 100 us of Python. Steps of a small model are not much longer, so it is made
of at most `MAX_STEPS_PER_S` of them, in runs of consecutive steps; of larger models that is every
step.
"""

from __future__ import annotations

from bisect import bisect_left

from lamina.engine.breakdown import PARTS, step_parts
from lamina.engine.events import StepRecord
from lamina.engine.messages import PHASE_BUCKETS_S, PhaseHistogram

MAX_STEPS_PER_S = 64
_RUN = 16
"""Steps that are looked at together: enough that micro-batches see each other."""


class PhaseHistograms:
    """Seconds per step and phase, counted in buckets since the start."""

    def __init__(self) -> None:
        self._run: list[StepRecord] = []
        self._resume_s = 0.0
        self._counts = {part: [0] * (len(PHASE_BUCKETS_S) + 1) for part in PARTS}
        self._sums = dict.fromkeys(PARTS, 0.0)
        self._shown = self._snapshot()

    def add(self, record: StepRecord) -> None:
        """A step is through. They come in the order in which they ended."""
        if record.begin_s < self._resume_s:
            return
        self._run.append(record)
        if len(self._run) == _RUN:
            self._count()

    def snapshot(self) -> dict[str, PhaseHistogram]:
        """All phases, as of the last run of steps that was looked at."""
        return self._shown

    def _count(self) -> None:
        self._resume_s = self._run[0].begin_s + _RUN / MAX_STEPS_PER_S
        for parts in step_parts(self._run):
            for part, seconds in parts.seconds.items():
                self._counts[part][bisect_left(PHASE_BUCKETS_S, seconds)] += 1
                self._sums[part] += seconds
        self._run.clear()
        self._shown = self._snapshot()

    def _snapshot(self) -> dict[str, PhaseHistogram]:
        return {part: PhaseHistogram(tuple(self._counts[part]), self._sums[part]) for part in PARTS}
