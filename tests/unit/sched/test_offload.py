from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import ConfigError
from lamina.sched.offload import (
    Bounds,
    Load,
    Reason,
    Resources,
    compute_bound,
    decide,
    memory_bound,
)

DECODE = Resources(memory_bytes=60e9, bandwidth_bytes_per_s=1.6e12)


def test_the_scarcer_of_memory_and_bandwidth_bounds() -> None:
    executor = Resources(memory_bytes=45e9, bandwidth_bytes_per_s=0.8e12)
    assert memory_bound([executor], DECODE) == pytest.approx(0.5)
    assert memory_bound([executor, executor], DECODE) == pytest.approx(1.0)
    small = Resources(memory_bytes=6e9, bandwidth_bytes_per_s=1.6e12)
    assert memory_bound([small], DECODE) == pytest.approx(0.1)
    assert memory_bound([], DECODE) == 0


def test_a_decode_instance_without_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="no memory"):
        memory_bound([], Resources(memory_bytes=0, bandwidth_bytes_per_s=1e12))
    with pytest.raises(ConfigError, match="memory_bytes must be"):
        Resources(memory_bytes=-1, bandwidth_bytes_per_s=1e12)


def test_compute_bound() -> None:
    assert compute_bound(180, 60) == pytest.approx(2.0)
    assert compute_bound(50, 60) == 0
    assert compute_bound(50, 0) == float("inf")


def test_the_first_request_stays_local() -> None:
    decision = decide(Bounds(memory=0.5, compute=9), Load(), Load(), 100)
    assert decision.reason is Reason.OWN_LOAD
    assert not decision.offload


@pytest.mark.parametrize(
    ("local", "offloaded", "max_tokens", "reason"),
    [
        (Load(num_sequences=4, num_tokens=1000), Load(), 500, Reason.WITHIN_BOUND),
        (Load(num_sequences=4, num_tokens=1000), Load(), 501, Reason.OWN_LOAD),
        (
            Load(num_sequences=4, num_tokens=1000),
            Load(num_sequences=3, num_tokens=100),
            100,
            Reason.SEQUENCES,
        ),
        (
            Load(num_sequences=4, num_tokens=1000),
            Load(num_sequences=2, num_tokens=100),
            100,
            Reason.WITHIN_BOUND,
        ),
    ],
)
def test_conditions(local: Load, offloaded: Load, max_tokens: int, reason: Reason) -> None:
    decision = decide(Bounds(memory=0.5, compute=9), local, offloaded, max_tokens)
    assert decision.reason is reason
    assert decision.offload == (reason is Reason.WITHIN_BOUND)


@given(
    st.lists(st.integers(1, 4000), max_size=200),
    st.floats(0, 3),
)
def test_offloaded_lengths_stay_within_the_bound(lengths: list[int], ratio: float) -> None:
    """Requests that only come: the bound holds after every decision."""
    bounds = Bounds(memory=ratio, compute=9)
    local = offloaded = Load()
    for length in lengths:
        if decide(bounds, local, offloaded, length).offload:
            offloaded = Load(
                num_sequences=offloaded.num_sequences + 1,
                num_tokens=offloaded.num_tokens + length,
            )
        else:
            local = Load(
                num_sequences=local.num_sequences + 1, num_tokens=local.num_tokens + length
            )
        assert offloaded.num_tokens <= ratio * local.num_tokens
