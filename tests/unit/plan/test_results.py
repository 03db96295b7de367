from __future__ import annotations

import pytest

from lamina.plan.recorder import Occupancy, RequestTimes
from lamina.plan.results import percentiles


def test_percentiles() -> None:
    found = percentiles([float(x) for x in range(100, 0, -1)])
    assert found is not None
    assert (found.p50, found.p90, found.p99, found.max) == (50, 90, 99, 100)
    assert found.mean == pytest.approx(50.5)
    assert percentiles([]) is None


def test_weighted_percentiles() -> None:
    found = percentiles([3.0, 1.0], [1, 9])
    assert found is not None
    assert (found.p50, found.p90, found.p99) == (1, 1, 3)
    assert found.mean == pytest.approx(1.2)


def test_times_of_requests() -> None:
    times = RequestTimes([0.0, 1.0, 2.0])
    times.started(1, 1.5)
    times.started(1, 9.0)
    times.first_token(1, 3.0)
    times.tokens(4, 1.0)
    times.tokens(5, 7.0)
    times.gap(0.5, 3)
    assert times.num_tokens == 9
    assert times.num_tokens_while_arriving == 4
    assert times.last_token_s == 7
    queue, ttft, tbt = times.queue_s(), times.ttft_s(), times.tbt_s()
    assert queue is not None
    assert ttft is not None
    assert tbt is not None
    assert queue.mean == 0.5
    assert ttft.mean == 2.0
    assert tbt.mean == 0.5


def test_saturation_is_while_requests_wait_and_a_tenth_has_ended() -> None:
    occupancy = Occupancy(num_requests=10)
    occupancy.passed(0.0, running=0, waiting=9, finished=0, tokens=0)
    occupancy.passed(1.0, running=4, waiting=9, finished=0, tokens=100)
    occupancy.passed(3.0, running=8, waiting=5, finished=1, tokens=20)
    occupancy.passed(4.0, running=2, waiting=0, finished=5, tokens=7)
    steady = occupancy.saturated()
    assert steady is not None
    assert steady.seconds == 2
    assert steady.tokens_per_s == 10
    assert steady.mean_batch == 8
    assert occupancy.mean_batch == pytest.approx((4 + 16 + 2) / 4)
    assert Occupancy(10).saturated() is None
