"""A few layers of a running pipeline, as material for a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lamina.engine.events import (
    ENGINE,
    AttentionMark,
    Event,
    ModelMark,
    Phase,
    StepRecord,
    step_events,
)


class Hop(NamedTuple):
    """A message that was waited for, from one worker to another."""

    sender: str
    receiver: str
    micro_batch: int
    begin_s: float
    end_s: float


class Picture(NamedTuple):
    """What happened within a stretch of time."""

    begin_s: float
    end_s: float
    workers: tuple[str, ...]
    """Model workers first."""
    events: tuple[Event, ...]
    """All but waits, which are what is left white."""
    hops: tuple[Hop, ...]


def choose(records: Sequence[StepRecord], num_layers: int) -> Picture:
    """`num_layers` layers from the middle of a step: of the one that took the median time for them.

    Args:
        records: enough steps that every micro-batch has some before and after.
        num_layers: at most as many as the model has.
    """
    whole = [record for record in records if record.attention]
    first = (len(whole[0].model[0].times) - 1 - num_layers) // 2
    stretches = sorted(
        ((_begin(record, first), _begin(record, first + num_layers)) for record in whole[2:-2]),
        key=lambda stretch: stretch[1] - stretch[0],
    )
    begin_s, end_s = stretches[len(stretches) // 2]

    def is_seen(thing: Event | Hop) -> bool:
        return thing.end_s > begin_s and thing.begin_s < end_s

    events = tuple(
        event
        for record in records
        for event in step_events(record)
        if event.phase is not Phase.WAIT and event.worker != ENGINE and is_seen(event)
    )
    hops = tuple(hop for record in whole for hop in _hops(record) if is_seen(hop))
    models = sorted({worker for record in records for worker, _ in record.model})
    others = sorted({worker for record in records for worker, _ in record.attention})
    return Picture(begin_s, end_s, (*models, *others), events, hops)


def _begin(record: StepRecord, layer: int) -> float:
    return max(float(times[layer, ModelMark.BEGIN]) for _, times in record.model)


def _hops(record: StepRecord) -> Iterator[Hop]:
    """q and the output of every layer, to and from every attention worker that attended."""
    for worker, layers in record.attention:
        for layer, row in enumerate(layers):
            if not row[AttentionMark.ATTEND_BEGIN]:
                continue
            for model, slices in record.model:
                here, there = slices[layer], slices[layer + 1]
                if here[ModelMark.BEGIN]:
                    sent_s, seen_s = here[ModelMark.Q_SENT], row[AttentionMark.ATTEND_BEGIN]
                    yield Hop(model, worker, record.micro_batch, sent_s, seen_s)
                if there[ModelMark.BEGIN]:
                    sent_s, seen_s = row[AttentionMark.FINISH_END], there[ModelMark.BEGIN]
                    yield Hop(worker, model, record.micro_batch, sent_s, seen_s)
