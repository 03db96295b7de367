"""Weights settle where all workers finish together, and follow them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.sched.weights import WorkerWeights, kv_unit_tokens
from lamina.types import LOCAL, Share, Span, StepPlan

STEP_BYTES = 1e9
LAYERS = 10


def run(
    weights: WorkerWeights,
    speeds: dict[int, float],
    num_steps: int,
    rng: random.Random,
    *,
    noise: float = 0.1,
    stalls: float = 0.02,
) -> None:
    """Steps whose work is shared by the weights of the moment. Now and then a worker stalls."""
    for _ in range(num_steps):
        for executor, share in weights.weights.items():
            work = STEP_BYTES * share * rng.uniform(0.7, 1.3)
            seconds = work / speeds[executor] * rng.lognormvariate(0.0, noise)
            if rng.random() < stalls:
                seconds *= rng.uniform(5, 500)
            weights.observe(executor, work, seconds)


def expected(speeds: dict[int, float]) -> dict[int, float]:
    return {e: s / sum(speeds.values()) for e, s in speeds.items()}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "speeds", [{1: 2e10, 2: 1e10}, {1: 1e10, 2: 1e10}, {1: 3e10, 2: 2e9}, {1: 4e9, 2: 3e9, 3: 1e9}]
)
def test_weights_settle_within_100_steps(speeds: dict[int, float], seed: int) -> None:
    weights = WorkerWeights(speeds, num_layers=LAYERS)
    assert weights.weights == pytest.approx({e: 1 / len(speeds) for e in speeds})
    run(weights, speeds, 100, random.Random(seed))
    assert weights.weights == pytest.approx(expected(speeds), rel=0.05)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [0.1, 0.6, 0.8, 3.0])
def test_a_worker_that_changes_its_speed_is_followed(seed: int, factor: float) -> None:
    rng = random.Random(seed)
    speeds = {1: 1e10, 2: 2e10}
    weights = WorkerWeights(speeds, num_layers=LAYERS)
    run(weights, speeds, 300, rng)
    speeds[1] *= factor
    run(weights, speeds, 100, rng)
    assert weights.weights == pytest.approx(expected(speeds), rel=0.08)


def test_probes_are_where_it_starts() -> None:
    weights = WorkerWeights((1, 2, 3), num_layers=LAYERS)
    weights.probe(1, 3e10, 0.0)
    weights.probe(2, 1e10, 0.0)
    assert weights.weights == pytest.approx({1: 0.5, 2: 1 / 6, 3: 1 / 3}), "3 is as fast as most"
    weights.observe(3, 1e9, 0.1)
    assert weights.weights == pytest.approx({1: 0.6, 2: 0.2, 3: 0.2})


def test_a_worker_far_away_gets_less() -> None:
    weights = WorkerWeights((1, 2), num_layers=LAYERS)
    weights.probe(1, 1e10, 0.0)
    weights.probe(2, 1e10, 1e-3)
    for executor in (1, 2):
        weights.observe(executor, 5e8, 0.05)
    # 1e8 bytes per op: worker 1 serves 5.5e7 of them in 5.5 ms, worker 2 the rest in 1 + 4.5 ms.
    assert weights.weights == pytest.approx({1: 0.55, 2: 0.45})


def test_a_worker_too_far_away_still_gets_a_little() -> None:
    weights = WorkerWeights((1, 2), num_layers=LAYERS)
    weights.probe(1, 1e10, 0.0)
    weights.probe(2, 1e10, 1.0)
    weights.observe(1, 1e9, 0.1)
    assert 0 < weights.weights[2] < 0.03


def test_given_weights_stay() -> None:
    weights = WorkerWeights((1, 2), num_layers=LAYERS, fixed={1: 3.0, 2: 1.0})
    run(weights, {1: 1e9, 2: 1e10}, 50, random.Random(0))
    assert weights.weights == {1: 0.75, 2: 0.25}


def test_steps_without_work_say_nothing() -> None:
    weights = WorkerWeights((1, 2), num_layers=LAYERS)
    weights.observe(1, 0.0, 1.0)
    weights.observe(1, 1.0, 0.0)
    assert weights.weights == {1: 0.5, 2: 0.5}


@given(
    st.lists(st.tuples(st.integers(1, 3), st.floats(1, 1e12), st.floats(1e-9, 1e3)), max_size=60),
    st.floats(0, 10),
)
def test_weights_are_positive_whatever_is_observed(
    observations: list[tuple[int, float, float]], round_trip_s: float
) -> None:
    weights = WorkerWeights((1, 2, 3), num_layers=LAYERS)
    weights.probe(2, 1e9, round_trip_s)
    for executor, kv_bytes, seconds in observations:
        weights.observe(executor, kv_bytes, seconds)
    assert sum(weights.weights.values()) == pytest.approx(1.0)
    assert all(weight > 0 for weight in weights.weights.values())


def test_work_of_a_plan() -> None:
    by_heads = (Share(1, 0, 5), Share(2, 5, 8))
    by_tokens = (Share(1, 0, 8, 0, 64), Share(2, 0, 8, 64, None))
    local = (Share(LOCAL, 0, 8),)
    plan = StepPlan(
        1,
        0,
        (
            Span(1, 1, 100, by_heads, by_heads),
            Span(2, 1, 80, by_tokens, by_tokens),
            Span(3, 7, 10, local, (*local, *by_heads)),
        ),
    )
    assert kv_unit_tokens(plan) == {1: 500 + 8 * 64, 2: 300 + 8 * 16, LOCAL: 80}
