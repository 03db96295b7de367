"""Figures of the breakdown over timelines of which every duration is known."""

from __future__ import annotations

import pytest

from lamina.bench.breakdown import summarize
from lamina.bench.subjects import Stretch
from support.timelines import Durations, pipeline

LAYERS = 4


def stretches(durations: Durations, depth: int) -> list[Stretch]:
    """Two stretches of the same steps; the second one was cut in the middle of a step."""
    records = pipeline(durations, num_micro_batches=depth, num_layers=LAYERS, num_steps=12)
    begin_s, end_s = records[depth].end_s, records[-1].end_s
    num_tokens = 8 * (len(records) - depth - 1)
    return [
        Stretch(begin_s, end_s, num_tokens, records),
        Stretch(begin_s, end_s - 1e-6, num_tokens, records),
    ]


def test_one_micro_batch() -> None:
    d = Durations()
    found = summarize("one", 8, 100, stretches(d, depth=1))
    assert found is not None
    assert found.num_steps == 10 + 9
    assert found.rows_per_step == 8
    assert found.step_ms == pytest.approx(sum(found.parts_ms.values()))
    assert found.tokens_per_s == pytest.approx(8e3 / found.step_ms, rel=1e-3)
    sent = d.send_q + d.send_kv
    assert found.model_ms == pytest.approx(1e3 * (LAYERS * (d.q + d.kv + sent) + d.last))
    assert found.attention_ms == pytest.approx(1e3 * LAYERS * (d.attend + d.finish))
    assert found.bound_tokens_per_s == pytest.approx(8e3 / found.attention_ms)
    engine_ms = found.parts_ms["engine"]
    assert found.busy == pytest.approx(
        {
            "model": (found.model_ms + engine_ms) / found.step_ms,
            "attention-worker-1": found.attention_ms / found.step_ms,
        },
        rel=0.02,
    )


def test_two_micro_batches_come_near_the_bound() -> None:
    d = Durations(q=3e-3, kv=2e-3, attend=5e-3, last=1e-4, hop=1e-5)
    one = summarize("one", 8, 100, stretches(d, depth=1))
    two = summarize("two", 16, 100, stretches(d, depth=2))
    assert one is not None
    assert two is not None
    assert two.share_of_bound > 0.9 > one.share_of_bound
    assert two.tokens_per_s > 1.5 * one.tokens_per_s
    assert two.parts_ms["bubble"] + two.parts_ms["network"] < 0.1 * two.step_ms
    assert min(two.busy.values()) > 0.85


def test_without_a_timeline_there_is_none() -> None:
    assert summarize("peer", 1, 1, []) is None
    assert summarize("peer", 1, 1, [Stretch(0.0, 1.0, 0, [])]) is None
