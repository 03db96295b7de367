"""What the policies are told of steps."""

from __future__ import annotations

import numpy as np
import pytest

from lamina.engine.events import AttentionMark, ModelMark, StepRecord, Times, WorkerTimes
from lamina.engine.pacing import Pacing
from lamina.sched.depth import DepthPolicy, StepSample
from lamina.sched.weights import WorkerWeights
from lamina.types import LOCAL, Share, Span, StepPlan

NUM_LAYERS = 3
NAMES = {"local": LOCAL, "fast": 1, "slow": 2}
SHARES = (Share(1, 0, 1), Share(2, 1, 2))
LOCAL_SHARE = (Share(LOCAL, 0, 2),)
UNIT_TOKEN_BYTES = 100.0


class SeenDepth(DepthPolicy):
    """Remembers what it was told."""

    def __init__(self, max_depth: int) -> None:
        super().__init__(max_depth)
        self.samples: list[StepSample] = []

    def observe(self, sample: StepSample) -> int:
        self.samples.append(sample)
        return super().observe(sample)


def record(
    attend_s: dict[str, float], *, way_s: float = 0.001, step: int = 1, after_q_s: float = 0.004
) -> StepRecord:
    """Slices of 5 ms (q after 1 ms), outputs as soon as the slowest worker is through."""
    model: Times = np.zeros((NUM_LAYERS + 1, len(ModelMark)))
    executors = {name: np.zeros((NUM_LAYERS, len(AttentionMark))) for name in attend_s}
    now = 100.0
    for layer in range(NUM_LAYERS + 1):
        q = now + 0.001
        done = q + after_q_s
        model[layer] = (model[layer, 0] or now, now, q, q, done, done, done)
        if layer == NUM_LAYERS:
            break
        ends = []
        for name, seconds in attend_s.items():
            begin = q + way_s / 2
            finish = max(begin + seconds, done + way_s / 2)
            executors[name][layer] = (begin, begin + seconds, finish, finish + 0.0005)
            ends.append(finish + 0.0005 + way_s / 2)
        model[layer + 1, 0] = done
        now = max(done, *ends)
    return StepRecord(
        step=step, micro_batch=0, num_rows=2, begin_s=99.0, planned_s=99.5, logits_s=now,
        end_s=now + 0.01, model=(WorkerTimes("model", model),),
        attention=tuple(WorkerTimes(name, times) for name, times in executors.items()),
    )  # fmt: skip


def decode_plan(context: int = 50, num_prompt_rows: int = 0) -> StepPlan:
    spans = [Span(1, 1, context, SHARES, SHARES), Span(2, 1, context, SHARES, SHARES)]
    if num_prompt_rows:
        spans.append(Span(3, num_prompt_rows, 0, LOCAL_SHARE, (*LOCAL_SHARE, *SHARES)))
    return StepPlan(1, 0, tuple(spans))


def make(max_depth: int = 4) -> tuple[Pacing, WorkerWeights, SeenDepth]:
    weights, depth = WorkerWeights((1, 2), num_layers=NUM_LAYERS), SeenDepth(max_depth)
    return Pacing(weights, depth, NAMES, UNIT_TOKEN_BYTES), weights, depth


def test_weights_follow_the_workers_own_seconds() -> None:
    pacing, _, _ = make()
    weights = None
    for step in range(1, 33):
        seen = pacing.observe(record({"fast": 0.01, "slow": 0.03}, step=step), decode_plan(), 2)
        weights = seen or weights
    assert weights is not None
    assert weights[1] / weights[2] == pytest.approx((0.03 + 0.0005) / (0.01 + 0.0005), rel=0.1)


def test_steps_with_prompts_say_nothing_of_the_workers() -> None:
    pacing, weights, depth = make()
    for _ in range(32):
        pacing.observe(
            record({"fast": 0.01, "slow": 0.03, "local": 0.02}),
            decode_plan(num_prompt_rows=5),
            2,
        )
    assert weights.weights == {1: 0.5, 2: 0.5}
    assert depth.samples[-1].num_prompt_rows == 5
    assert depth.samples[-1].num_rows == 2


def test_a_sample_has_the_computing_and_what_follows_it() -> None:
    pacing, _, depth = make()
    pacing.observe(record({"fast": 0.01, "slow": 0.02}, way_s=0.002), decode_plan(50), 7)
    (sample,) = depth.samples
    assert (sample.num_rows, sample.num_tokens, sample.num_decoding) == (2, 100, 7)
    assert sample.slice_s == pytest.approx(0.005)
    # The way there and back and 20.5 ms of the slow worker, less 4 ms that the slice goes on.
    assert sample.attention_s == pytest.approx(0.002 + 0.0205 - 0.004, abs=1e-6)


def test_attention_that_hides_behind_the_slice_leaves_the_way_back() -> None:
    pacing, _, depth = make()
    pacing.observe(record({"fast": 0.001}, way_s=0.002), decode_plan(), 2)
    # Once k and v are there it only appends and answers.
    assert depth.samples[0].attention_s == pytest.approx(0.001 + 0.0005, abs=1e-6)


def test_the_shortest_way_counts() -> None:
    pacing, _, _ = make()
    for way_s in (0.003, 0.001, 0.002):
        pacing.observe(record({"fast": 0.01, "slow": 0.01}, way_s=way_s), decode_plan(), 2)
        pacing.observe(record({"fast": 0.01, "slow": 0.02}, way_s=way_s), decode_plan(), 2)
    assert pacing.round_trip_s == {1: pytest.approx(0.001), 2: pytest.approx(0.001)}


def test_waiting_for_another_executor_is_no_way() -> None:
    pacing, _, _ = make()
    pacing.observe(record({"fast": 0.01, "slow": 0.03}), decode_plan(), 2)
    assert pacing.round_trip_s == {2: pytest.approx(0.001)}
