"""Histograms of the breakdown: bounded work, and every step counted once."""

from __future__ import annotations

import msgspec
import pytest

from lamina.engine.breakdown import PARTS, step_parts
from lamina.engine.messages import (
    PHASE_BUCKETS_S,
    EngineStats,
    Outputs,
    decode_from_engine,
    encode,
)
from lamina.engine.phases import MAX_STEPS_PER_S, PhaseHistograms
from support.timelines import Durations, pipeline


def test_long_steps_are_all_counted() -> None:
    records = pipeline(Durations(), num_micro_batches=2, num_steps=16)
    histograms = PhaseHistograms()
    for record in records:
        histograms.add(record)
    shown = histograms.snapshot()
    assert tuple(shown) == PARTS
    assert {sum(h.counts) for h in shown.values()} == {len(records)}
    total = sum(h.sum_s for h in shown.values())
    assert total == pytest.approx(sum(parts.total_s for parts in step_parts(records)))
    model_s = 4 * 3e-3 + 3e-3
    bucket = next(i for i, bound in enumerate(PHASE_BUCKETS_S) if model_s <= bound)
    assert shown["model"].counts[bucket] == len(records)


def test_of_short_steps_a_sample_is_counted() -> None:
    tiny = Durations(*(5e-6 for _ in Durations._fields))
    records = pipeline(tiny, num_micro_batches=1, num_layers=2, num_steps=20_000)
    seconds = records[-1].end_s - records[0].begin_s
    histograms = PhaseHistograms()
    for record in records:
        histograms.add(record)
    count = sum(histograms.snapshot()["model"].counts)
    assert 0.8 * MAX_STEPS_PER_S * seconds < count < MAX_STEPS_PER_S * (seconds + 1)


def test_they_travel_to_the_front_end() -> None:
    stats = EngineStats(phases=PhaseHistograms().snapshot())
    message = decode_from_engine(encode(Outputs((), stats)))
    assert isinstance(message, Outputs)
    assert msgspec.to_builtins(message.stats) == msgspec.to_builtins(stats)
