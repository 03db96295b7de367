"""The depth settles where simulated systems are fastest, without being told what they are like."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest

from lamina.sched.depth import DepthPolicy, StepSample
from lamina.sched.pipeline import round_s

NUM_SLICES = 29


class Result(NamedTuple):
    depths: list[int]
    """The depth after each step."""
    num_tokens: int
    seconds: float


class System:
    """Steps of a pipeline: each round of a depth, every micro-batch comes one slice further."""

    def __init__(
        self,
        slice_s: Callable[[float], float],
        attention_s: Callable[[float], float],
        *,
        num_replicas: int = 1,
        slowdown: float = 1.0,
        shares_cores: bool = False,
        noise: float = 0.02,
        seed: int = 0,
    ) -> None:
        """
        Args:
            slice_s: by rows. attention_s: by cached tokens.
            slowdown: of both while they run at the same time.
            shares_cores: they never do.
        """
        self.slice_s, self.attention_s = slice_s, attention_s
        self.num_replicas, self.slowdown = num_replicas, slowdown
        self.shares_cores, self.noise = shares_cores, noise
        self.rng = random.Random(seed)
        self.now_s = 0.0

    def round(self, depth: int, rows: int, tokens: float) -> tuple[float, float, float]:
        """Seconds of a round, of a slice and of an attention op."""
        factor = self.slowdown if depth > self.num_replicas else 1.0
        slice_s = self.slice_s(rows / depth) * factor
        attention_s = self.attention_s(tokens * rows / depth) * factor
        if self.shares_cores:
            busy = depth * (slice_s / self.num_replicas + attention_s)
            return max(busy, slice_s + attention_s), slice_s, attention_s
        return round_s(depth, self.num_replicas, slice_s, attention_s), slice_s, attention_s

    def tokens_per_s(self, depth: int, rows: int, tokens: float) -> float:
        return rows / (NUM_SLICES * self.round(depth, rows, tokens)[0])

    def run(
        self,
        policy: DepthPolicy,
        num_steps: int,
        rows: int,
        tokens: float,
        prompt_every: int | None = None,
    ) -> Result:
        depths, start, num_tokens = [], self.now_s, 0
        for step in range(num_steps):
            depth = min(policy.depth, rows)
            round_s, slice_s, attention_s = self.round(depth, rows, tokens)
            jitter = self.rng.lognormvariate(0.0, self.noise)
            self.now_s += round_s * NUM_SLICES / depth * jitter
            mine = rows // depth + (step % depth < rows % depth)
            num_tokens += mine
            has_prompt = prompt_every is not None and step % prompt_every == 0
            self.now_s += 5 * slice_s * NUM_SLICES * has_prompt
            depth_after = policy.observe(
                StepSample(
                    now_s=self.now_s,
                    num_rows=mine,
                    num_prompt_rows=100 * has_prompt,
                    num_tokens=int(mine * tokens),
                    slice_s=slice_s * jitter * (5 if has_prompt else 1),
                    attention_s=attention_s * jitter,
                    num_decoding=rows,
                )
            )
            depths.append(depth_after)
        return Result(depths, num_tokens, self.now_s - start)


def dense(rows: float) -> float:
    """Bound by the weights up to a dozen rows, then by arithmetic."""
    return 1e-3 * max(1.0, rows / 12)


def attention(tokens: float) -> float:
    return 1e-7 * tokens


@pytest.mark.parametrize("seed", range(5))
def test_separate_cores_and_large_batches_want_two(seed: int) -> None:
    system = System(dense, attention, slowdown=1.05, seed=seed)
    policy = DepthPolicy(4)
    # t_m(32) = 2.7 ms, t_a(32 x 800) = 2.6 ms
    result = system.run(policy, 2000, 64, 800)
    assert result.depths[20] == 2, "guessed as soon as both are measured"
    assert result.depths[-1] >= 2
    best = max(system.tokens_per_s(n, 64, 800) for n in (1, 2, 3, 4))
    assert result.num_tokens / result.seconds > 0.96 * best
    assert best > 1.7 * system.tokens_per_s(1, 64, 800)


@pytest.mark.parametrize("seed", range(5))
def test_shared_cores_want_one(seed: int) -> None:
    system = System(dense, attention, shares_cores=True, seed=seed)
    policy = DepthPolicy(2, shares_cores=True)
    result = system.run(policy, 2000, 8, 4000)
    assert result.depths[20] == 1
    assert result.depths[-1] == 1
    best = system.tokens_per_s(1, 8, 4000)
    assert result.num_tokens / result.seconds > 0.97 * best


@pytest.mark.parametrize("seed", range(5))
def test_a_shared_memory_bus_is_found_out(seed: int) -> None:
    """Both slow down so much at the same time that nothing is gained, which nobody has said."""
    system = System(dense, attention, slowdown=2.1, seed=seed)
    policy = DepthPolicy(2)
    result = system.run(policy, 3000, 64, 800)
    assert result.depths[20] == 2, "guessed wrongly"
    assert result.depths[-1] == 1
    best = system.tokens_per_s(1, 64, 800)
    assert result.num_tokens / result.seconds > 0.97 * best


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_small_batches_want_one(rows: int) -> None:
    system = System(dense, attention)
    policy = DepthPolicy(4)
    result = system.run(policy, 2000, rows, 300)
    assert result.depths[-1] == 1
    assert max(result.depths) <= max(rows, 1), "never less than one row per micro-batch"
    best = system.tokens_per_s(1, rows, 300)
    assert result.num_tokens / result.seconds > 0.97 * best


@pytest.mark.parametrize("seed", range(5))
def test_the_depth_follows_the_load(seed: int) -> None:
    system = System(dense, attention, seed=seed)
    policy = DepthPolicy(2)
    assert system.run(policy, 400, 4, 300).depths[-1] == 1
    # Both directions, without being thrown off by what was learned before.
    for _ in range(3):
        assert system.run(policy, 400, 64, 800).depths[-1] == 2
        assert system.run(policy, 400, 4, 300).depths[-1] == 1
    assert system.run(policy, 30, 1, 300).depths[-1] == 1


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_replicas_are_kept_busy(num_replicas: int) -> None:
    system = System(dense, lambda tokens: attention(tokens) / 2, num_replicas=num_replicas)
    policy = DepthPolicy(num_replicas + 1, num_replicas=num_replicas)
    result = system.run(policy, 2000, 48 * num_replicas, 600)
    assert result.depths[-1] == num_replicas + 1
    best = max(system.tokens_per_s(n, 48 * num_replicas, 600) for n in range(1, num_replicas + 2))
    assert result.num_tokens / result.seconds > 0.93 * best


def test_every_replica_has_a_micro_batch_even_with_few_rows() -> None:
    system = System(dense, attention, num_replicas=3)
    policy = DepthPolicy(4, num_replicas=3)
    assert policy.depth == 3
    assert set(system.run(policy, 200, 2, 300).depths) == {3}


def test_prompts_do_not_spoil_the_measurement() -> None:
    system = System(dense, attention, slowdown=1.05)
    policy = DepthPolicy(3)
    result = system.run(policy, 2000, 64, 800, prompt_every=7)
    assert result.depths[20] == 2
    assert set(result.depths[100:]) <= {2, 3}, "no trial is believed while prompts disturb it"
    steady = System(dense, attention, slowdown=2.1)
    policy = DepthPolicy(2)
    assert steady.run(policy, 3000, 64, 800, prompt_every=60).depths[-1] == 1


def test_a_given_depth_stays() -> None:
    policy = DepthPolicy(4, fixed=3)
    assert set(System(dense, attention).run(policy, 200, 64, 800).depths) == {3}
