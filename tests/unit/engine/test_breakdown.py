"""The latency breakdown: its parts on timelines of which every duration is known."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lamina.engine.breakdown import PARTS, Occupancy, occupancy, step_parts
from lamina.engine.events import WorkerTimes
from support.timelines import Durations, pipeline

LAYERS = 4
ALONE = Durations()


def test_one_micro_batch_waits_for_every_hop() -> None:
    d = ALONE
    for parts in step_parts(pipeline(d, num_micro_batches=1, num_layers=LAYERS)):
        assert parts.seconds == pytest.approx(
            {
                "engine": d.plan + d.sample,
                "model": LAYERS * (d.q + d.kv) + d.last,
                "send": LAYERS * (d.send_q + d.send_kv),
                # Attention begins a hop after q was sent, while k and v are computed and sent.
                "attention": LAYERS * (d.attend + d.finish - (d.kv + d.send_kv - d.hop)),
                "network": LAYERS * d.hop,
                "queue": 0.0,
                "bubble": 0.0,
            },
            abs=1e-9,
        )


def test_attention_behind_the_deferred_region_is_no_latency() -> None:
    d = Durations(deferred=0.05)
    parts = step_parts(pipeline(d, num_micro_batches=1))[0].seconds
    assert parts["attention"] == parts["queue"] == 0.0
    assert parts["network"] == pytest.approx(0.0, abs=1e-9)
    assert parts["model"] > 4 * 0.05


def test_two_micro_batches_queue_for_the_slower_device() -> None:
    d = Durations(attend=8e-3)
    records = pipeline(d, num_micro_batches=2, num_steps=8)
    for parts in step_parts(records)[4:12]:
        alone = d.q + d.kv + d.send_q + d.send_kv
        assert parts.seconds["queue"] > 3 * (d.attend - alone - 2 * d.hop)
        assert parts.seconds["bubble"] < 0.02 * parts.total_s
    busy = occupancy(records)
    begin, end = records[4].begin_s, records[11].end_s
    assert busy["attention-worker-1"].share(begin, end) > 0.8
    assert busy["model"].share(begin, end) < 0.6


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_parts_add_up_to_the_step(num_micro_batches: int, seed: int) -> None:
    draw = random.Random(seed)
    d = Durations(*(draw.choice((0.0, draw.random() * 1e-2)) for _ in Durations._fields))
    for parts in step_parts(pipeline(d, num_micro_batches=num_micro_batches)):
        assert tuple(parts.seconds) == PARTS
        assert sum(parts.seconds.values()) == pytest.approx(parts.total_s, abs=1e-9)
        assert min(parts.seconds.values()) > -1e-9


def test_of_several_workers_the_last_one_counts() -> None:
    records = pipeline(ALONE, num_micro_batches=1)
    shown = []
    for record in records:
        (slow,) = record.attention
        fast = WorkerTimes("attention-worker-2", slow.times.copy())
        fast.times[:, 1:] = fast.times[:, :1] + 1e-5  # done at once
        shown.append(record._replace(attention=(fast, slow)))
    for together, alone in zip(step_parts(shown), step_parts(records), strict=True):
        assert together.seconds == pytest.approx(alone.seconds)


def test_slices_on_two_replicas_are_one_step() -> None:
    records = pipeline(ALONE, num_micro_batches=1)
    split = []
    for record in records:
        (whole,) = record.model
        even, odd = whole.times.copy(), whole.times.copy()
        even[1::2] = odd[::2] = 0.0
        replicas = (WorkerTimes("model-0.0", even), WorkerTimes("model-1.0", odd))
        split.append(record._replace(model=replicas))
    for together, alone in zip(step_parts(split), step_parts(records), strict=True):
        assert together.seconds == pytest.approx(alone.seconds)


def test_occupancy_counts_overlaps_once() -> None:
    busy = Occupancy(np.array([[4.0, 5.0], [1.0, 3.0], [2.0, 2.5], [0.0, 0.0], [2.0, 3.5]]))
    times = np.array([0.0, 1.0, 2.0, 3.25, 3.75, 4.5, 9.0])
    assert busy.until(times).tolist() == [0.0, 0.0, 1.0, 2.25, 2.5, 3.0, 3.5]
    assert busy.share(1.0, 3.0) == 1.0
    assert busy.between(np.array([4.5]), np.array([2.0])).tolist() == [0.0]
    assert Occupancy(np.zeros((3, 2))).share(0.0, 1.0) == 0.0
