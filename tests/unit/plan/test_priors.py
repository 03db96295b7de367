"""What a profile says to a running engine."""

from __future__ import annotations

import pytest

from lamina.errors import ConfigError
from lamina.plan.priors import Priors
from lamina.sched.depth import DepthPolicy, StepSample

from .test_scaling import MODEL, PROFILE


def priors(workers: dict[int, str], model_device: str = "cpu-1") -> Priors:
    return Priors(
        PROFILE,
        MODEL,
        model_device=model_device,
        num_ranks=1,
        num_replicas=1,
        workers=workers,
        early_q=False,
    )


def test_a_local_step_is_slices_and_attention() -> None:
    found = priors({})
    assert found.bytes_per_s == {}
    assert found.tokens_per_s(1, 2, 100) == pytest.approx(2 / (0.011 + 0.2))


def test_remote_attention_is_that_of_the_workers_side_by_side() -> None:
    assert priors({1: "cpu-1"}).tokens_per_s(1, 1, 100) == pytest.approx(
        1 / (0.01 + 0.1 + 4 * 1e-4)
    )
    alone, pair = priors({1: "cpu-1"}), priors({1: "cpu-1", 2: "cpu-1"})
    assert pair.tokens_per_s(1, 1, 100) > alone.tokens_per_s(1, 1, 100)
    assert pair.bytes_per_s[1] == pair.bytes_per_s[2] == alone.bytes_per_s[1]


def test_devices_that_were_not_measured() -> None:
    with pytest.raises(ConfigError, match="cpu-7"):
        priors({}, model_device="cpu-7")
    with pytest.raises(ConfigError, match="no attention on cpu-3; measured are cpu-1"):
        priors({1: "cpu-3"})


def sample(now_s: float, depth: int) -> StepSample:
    return StepSample(
        now_s=now_s,
        num_rows=8 // depth,
        num_prompt_rows=0,
        num_tokens=100 * 8 // depth,
        slice_s=1.0,
        attention_s=0.0,
        num_decoding=8,
    )


def test_the_depth_starts_from_the_prior() -> None:
    asked = []

    def prior(depth: int, rows: int, context: float) -> float:
        asked.append((depth, rows, context))
        return float(depth)

    policy = DepthPolicy(4, prior=prior)
    assert policy.observe(sample(0.0, 1)) == 4, "at the first step that decodes"
    assert set(asked) == {(depth, 8, 100.0) for depth in range(1, 5)}
    assert DepthPolicy(4).observe(sample(0.0, 1)) == 1, "without one, it has to see steps first"


def test_what_is_measured_corrects_the_prior() -> None:
    # A step takes a second, whatever its rows: two micro-batches are half as fast as one.
    policy = DepthPolicy(2, prior=lambda depth, rows, context: float(depth))
    now_s, depths = 0.0, []
    for _ in range(400):
        now_s += 1.0
        depths.append(policy.observe(sample(now_s, policy.depth)))
    assert depths[0] == 2
    assert depths[-50:].count(1) > 25, "eight tokens per second at depth 1, four at depth 2"
