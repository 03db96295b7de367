"""Where the time of a step went: the papers' latency breakdown, from what the timeline recorded.

A step is followed along its critical path. Every instant of it belongs to exactly one part, so that
the parts add up to the step's time:

    engine      planning and sampling
    model       a slice of the step runs
    send        q, k and v are copied into mailboxes
    attention   not those, and the attention worker that finishes the layer last is at work on it
    network     a message is on its way: q or k, v to a worker that is idle, an output to a model
                worker that waits for it
    queue       the device that comes next is busy with another micro-batch
    bubble      what is left: nobody does anything for the step

Attention behind a deferred region (or behind the computation of k and v) is no part of the latency;
it shows in how busy the workers are (`Occupancy`). Shapes: L layers, I intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lamina.engine.events import (
    LOCAL_EXECUTOR,
    AttentionMark,
    ModelMark,
    StepRecord,
    Times,
    WorkerTimes,
)

PARTS = ("engine", "model", "send", "attention", "network", "queue", "bubble")


class StepParts(NamedTuple):
    """Seconds of each part of one step."""

    record: StepRecord
    seconds: dict[str, float]
    """Keys: `PARTS`."""

    @property
    def total_s(self) -> float:
        return self.record.end_s - self.record.begin_s


class Occupancy:
    """When one device was busy, whatever with."""

    def __init__(self, intervals_I2: Times) -> None:
        """
        Args:
            intervals_I2: begin and end of each piece of work, in any order; empty pieces and zeros
                are fine. Pieces may overlap (two ranks of one name): the overlap counts once.
        """
        work = intervals_I2[intervals_I2[:, 1] > intervals_I2[:, 0]]
        work = work[np.argsort(work[:, 0], kind="stable")]
        self._ends = np.maximum.accumulate(work[:, 1])
        self._begins = work[:, 0].copy()
        self._begins[1:] = np.maximum(self._begins[1:], self._ends[:-1])
        lengths = self._ends - self._begins
        self._before = np.cumsum(lengths) - lengths

    def until(self, times: Times) -> Times:
        """Seconds of work before each time."""
        if not len(self._begins):
            return np.zeros_like(times)
        last = np.maximum(np.searchsorted(self._begins, times, side="right") - 1, 0)
        inside = np.minimum(times, self._ends[last]) - self._begins[last]
        return self._before[last] + np.maximum(inside, 0.0)

    def between(self, begins: Times, ends: Times) -> Times:
        """Seconds of work in each stretch of time; 0 where it ends before it begins."""
        return np.maximum(self.until(ends) - self.until(begins), 0.0)

    def share(self, begin_s: float, end_s: float) -> float:
        """How much of a stretch of time the device was busy, 0 to 1."""
        return float(self.between(np.array(begin_s), np.array(end_s))) / (end_s - begin_s)


def occupancy(records: Sequence[StepRecord]) -> dict[str, Occupancy]:
    """Every worker that took part in these steps.

    A single model worker lives in the engine's thread, as does the local executor: it is also busy
    with what these do.
    """
    pieces: dict[str, list[Times]] = {}
    for record in records:
        for worker, times in record.model:
            pieces.setdefault(worker, []).append(times[:, [ModelMark.BEGIN, ModelMark.DONE]])
        for worker, times in record.attention:
            pieces.setdefault(worker, []).append(times.reshape(-1, 2))
    models = {worker for record in records for worker, _ in record.model}
    if len(models) == 1:
        own = pieces[models.pop()]
        own += pieces.get(LOCAL_EXECUTOR, [])
        own += [np.array([[r.begin_s, r.planned_s], [r.logits_s, r.end_s]]) for r in records]
    return {worker: Occupancy(np.concatenate(parts)) for worker, parts in pieces.items()}


def step_parts(records: Sequence[StepRecord]) -> list[StepParts]:
    """The breakdown of each of these steps.

    Args:
        records: steps that follow each other, of all micro-batches. What a step waited for is known
            as far as they go: of the last ones some of `queue` is taken for `network` or `bubble`.
    """
    busy = occupancy(records)
    return [StepParts(record, _parts(record, busy)) for record in records]


def _parts(record: StepRecord, busy: Mapping[str, Occupancy]) -> dict[str, float]:
    slices, ran_on = _latest(record.model, ModelMark.DONE)
    done_S = slices[:, ModelMark.DONE]
    # Ranks of one slice differ by a little; a slice counts from where the one before it ended.
    begin_S = np.maximum(
        slices[:, ModelMark.BEGIN], np.concatenate(([record.planned_s], done_S[:-1]))
    )
    send = float(
        (slices[:, ModelMark.Q_SENT] - slices[:, ModelMark.Q_DONE]).sum()
        + (slices[:, ModelMark.KV_SENT] - slices[:, ModelMark.KV_DONE]).sum()
    )
    model = float((done_S - begin_S).sum()) - send
    engine = record.planned_s - record.begin_s + record.end_s - record.logits_s

    # What is left lies between a slice's end and the next one's begin.
    end_L, begin_L = done_S[:-1], begin_S[1:]
    turned_L = np.clip(slices[1:, ModelMark.WAIT], end_L, begin_L)
    attention = network = 0.0
    first = np.array([record.planned_s]), begin_S[:1]
    queue = float(_busy(busy, record.model, ran_on[:1], *first).sum())
    posted_L = end_L
    if record.attention:
        layers, attended_on = _latest(record.attention, AttentionMark.FINISH_END)
        marks = np.clip(layers, end_L[:, None], begin_L[:, None])
        posted_L = marks[:, AttentionMark.FINISH_END]
        attention = float((marks[:, 1::2] - marks[:, ::2]).sum())
        for start, stop in (
            (end_L, marks[:, AttentionMark.ATTEND_BEGIN]),
            (marks[:, AttentionMark.ATTEND_END], marks[:, AttentionMark.FINISH_BEGIN]),
        ):
            queued = float(_busy(busy, record.attention, attended_on, start, stop).sum())
            queue += queued
            network += float((stop - start).sum()) - queued
    queue += float(_busy(busy, record.model, ran_on[1:], posted_L, begin_L).sum())
    looked_L = np.maximum(turned_L, posted_L)
    worked = float(_busy(busy, record.model, ran_on[1:], looked_L, begin_L).sum())
    network += float((begin_L - looked_L).sum()) - worked
    parts = dict(zip(PARTS, (engine, model, send, attention, network, queue), strict=False))
    return parts | {"bubble": max(0.0, record.end_s - record.begin_s - sum(parts.values()))}


def _latest(
    workers: Sequence[WorkerTimes], mark: ModelMark | AttentionMark
) -> tuple[Times, np.ndarray[Any, np.dtype[np.intp]]]:
    """Row by row the times of the worker that reached `mark` last, and its number."""
    if len(workers) == 1:
        times = workers[0].times
        return times, np.zeros(len(times), np.intp)
    stacked = np.stack([times for _, times in workers])
    number = stacked[:, :, mark].argmax(0)
    return stacked[number, np.arange(len(number))], number


def _busy(
    busy: Mapping[str, Occupancy],
    workers: Sequence[WorkerTimes],
    number: np.ndarray[Any, np.dtype[np.intp]],
    begins: Times,
    ends: Times,
) -> Times:
    """Seconds that the worker of each row worked within the row's stretch of time."""
    if len(workers) == 1:
        return busy[workers[0].worker].between(begins, ends)
    seconds = np.zeros_like(begins)
    for index, (name, _) in enumerate(workers):
        rows = number == index
        seconds[rows] = busy[name].between(begins[rows], ends[rows])
    return seconds
