"""When each part of a step began and ended, on every worker: what the timeline records.

Times are seconds of the engine's monotonic clock (`time.monotonic`); those of workers on other
machines are moved onto it by whoever records them. They are kept as they are measured, one array
per worker and step, because most steps are never looked at; `step_events` names them.

Shapes: L layers, so L attention ops and L + 1 slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple

import numpy as np

Times = np.ndarray[Any, np.dtype[np.float64]]


ENGINE = "engine"
"""The worker of what the engine does itself: planning and sampling."""
LOCAL_EXECUTOR = "local"
"""The executor in the thread of a single model worker."""


class ModelMark(IntEnum):
    """Columns of a model worker's times, in the order of time within the row of a slice."""

    WAIT = 0
    """The worker turned to this slice and looked for its input (the attention output, and the
    context from another replica). In slice 0 equal to BEGIN."""
    BEGIN = 1
    """The input was there: at WAIT if it was already."""
    Q_DONE = 2
    Q_SENT = 3
    """With --no-early-q equal to Q_DONE: q is sent with k and v."""
    KV_DONE = 4
    KV_SENT = 5
    DONE = 6
    """The deferred region is through."""


class AttentionMark(IntEnum):
    """Columns of an attention worker's times: those of its report."""

    ATTEND_BEGIN = 0
    """q was there; attention over cached tokens began."""
    ATTEND_END = 1
    FINISH_BEGIN = 2
    """k and v were there."""
    FINISH_END = 3
    """k and v are appended, the output was posted."""


class WorkerTimes(NamedTuple):
    """One worker's part of a step."""

    worker: str
    """As people call it: `model-worker`, `model-rank-1.0` (replica, rank), `attention-worker-2`,
    `local`."""
    times: Times
    """float64. Model workers: [L + 1, 7], columns `ModelMark`; in the row of the last slice all
    columns after BEGIN are its end. Attention workers: [L, 4], columns `AttentionMark`. Rows of
    what did not run on this worker are zero."""


class StepRecord(NamedTuple):
    """A step that is through, and where its time went."""

    step: int
    micro_batch: int
    num_rows: int
    begin_s: float
    """Planning began."""
    planned_s: float
    """The plan is made and posted; the slices may begin."""
    logits_s: float
    """The logits are there; sampling begins."""
    end_s: float
    """The tokens are chosen and the step is committed."""
    model: tuple[WorkerTimes, ...]
    """One or more; of several ranks and replicas each has its own."""
    attention: tuple[WorkerTimes, ...]
    """The executors that took part."""


class Phase(StrEnum):
    """What a worker was doing."""

    PLAN = "plan"
    Q = "q"
    SEND_Q = "send q"
    KV = "k, v"
    SEND_KV = "send k, v"
    DEFERRED = "deferred"
    WAIT = "wait"
    LAST = "last slice"
    ATTEND = "attend"
    FINISH = "append, merge"
    SAMPLE = "sample"


class Event(NamedTuple):
    """A worker was in one phase of one layer of a step."""

    worker: str
    micro_batch: int
    step: int
    layer: int
    """The slice's number on model workers; -1 for what belongs to no layer."""
    phase: Phase
    begin_s: float
    end_s: float


_MODEL_PHASES = (
    (Phase.WAIT, ModelMark.WAIT, ModelMark.BEGIN),
    (Phase.Q, ModelMark.BEGIN, ModelMark.Q_DONE),
    (Phase.SEND_Q, ModelMark.Q_DONE, ModelMark.Q_SENT),
    (Phase.KV, ModelMark.Q_SENT, ModelMark.KV_DONE),
    (Phase.SEND_KV, ModelMark.KV_DONE, ModelMark.KV_SENT),
    (Phase.DEFERRED, ModelMark.KV_SENT, ModelMark.DONE),
)
_LAST_PHASES = (
    (Phase.WAIT, ModelMark.WAIT, ModelMark.BEGIN),
    (Phase.LAST, ModelMark.BEGIN, ModelMark.DONE),
)
_ATTENTION_PHASES = (
    (Phase.ATTEND, AttentionMark.ATTEND_BEGIN, AttentionMark.ATTEND_END),
    (Phase.FINISH, AttentionMark.FINISH_BEGIN, AttentionMark.FINISH_END),
)


def step_events(record: StepRecord) -> Iterator[Event]:
    """The phases of a step that took any time, worker by worker, each worker's in order of time."""
    name = (record.micro_batch, record.step)
    yield Event(ENGINE, *name, -1, Phase.PLAN, record.begin_s, record.planned_s)
    for worker, times in record.model:
        last = len(times) - 1
        for layer, row in enumerate(times.tolist()):
            for phase, begin, end in _LAST_PHASES if layer == last else _MODEL_PHASES:
                if row[end] > row[begin]:
                    yield Event(worker, *name, layer, phase, row[begin], row[end])
    for worker, times in record.attention:
        for layer, row in enumerate(times.tolist()):
            for phase, start, stop in _ATTENTION_PHASES:
                if row[stop] > row[start]:
                    yield Event(worker, *name, layer, phase, row[start], row[stop])
    yield Event(ENGINE, *name, -1, Phase.SAMPLE, record.logits_s, record.end_s)
