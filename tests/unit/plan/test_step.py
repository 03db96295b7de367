from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.plan.cost import Devices, Efficiency
from lamina.plan.hardware import load_devices
from lamina.plan.model import load_model, model_cost
from lamina.plan.profile import HopTime, Profile
from lamina.plan.step import StepCost, StepLoad, StepTimes, round_s
from lamina.sched import pipeline
from lamina.types import LOCAL

DEVICES = load_devices()
MODEL = load_model("LLaMA-65B")


def step_cost(*, early_q: bool = True, num_replicas: int = 1, **kwargs: object) -> StepCost:
    return StepCost(
        MODEL,
        Devices(device=DEVICES["H100"], count=2),
        {1: Devices(device=DEVICES["H20"], count=4)},
        dtype="fp16",
        efficiency=kwargs.pop("efficiency", Efficiency()),  # type: ignore[arg-type]
        early_q=early_q,
        num_replicas=num_replicas,
        **kwargs,  # type: ignore[arg-type]
    )


def decode(rows: int, context: int, executor: int = 1) -> StepLoad:
    return StepLoad(
        rows=rows,
        logit_rows=rows,
        attending={executor: float(rows)},
        attended={executor: float(rows * context)},
    )


@given(
    num_micro_batches=st.integers(1, 5),
    slice_us=st.integers(1, 100),
    attention_us=st.integers(1, 100),
)
def test_equal_micro_batches_pass_as_in_the_schedulers_pipeline(
    num_micro_batches: int, slice_us: int, attention_us: int
) -> None:
    """Without links, and with one replica, the round is that of `sched.pipeline`, which its tests
    check against a run of the timetable."""
    times = StepTimes(slice_us, slice_us + attention_us, {1: attention_us}, 0.0)
    others = [times] * (num_micro_batches - 1)
    assert round_s(times, others, 1) == pytest.approx(
        pipeline.round_s(num_micro_batches, 1, slice_us, attention_us)
    )


def test_a_run_of_the_timetable_takes_as_long() -> None:
    times = StepTimes(3.0, 3.0 + 4.0, {1: 4.0}, 0.0)
    steps, slices = 40, 20
    runs = pipeline.pipeline_times(2, 1, 3.0, 4.0, slices, steps)
    whole = max(run.end_s for run in runs)
    assert whole == pytest.approx(steps * slices * round_s(times, [times], 1), rel=0.03)


def test_local_attention_alone() -> None:
    cost = step_cost()
    load = decode(16, 1000, LOCAL)
    times = cost.times(load)
    alone = cost.slices.seconds(16) + cost.attention[LOCAL].seconds(16, 16000)
    assert cost.step_s(round_s(times, [], 1)) == pytest.approx(alone)
    assert times.own_s == times.model_s
    assert times.attention_s == {}


def test_remote_attention_costs_both_hops() -> None:
    cost = step_cost(early_q=False)
    times = cost.times(decode(16, 1000))
    attention_s = cost.attention[1].seconds(16, 16000) / 80
    assert times.attention_s == {1: attention_s}
    assert times.model_s == pytest.approx(cost.slices.seconds(16) / 80)
    hops_s = 2 * 16.5e-6 + 16 * 4 * 8192 * 2 / (2 * 50e9 * 0.914)
    assert times.own_s == pytest.approx(times.model_s + attention_s + hops_s)


def test_early_q_hides_the_projection_of_k_and_v() -> None:
    early, late = step_cost(early_q=True), step_cost(early_q=False)
    load = decode(100, 4000)
    assert early.times(load).own_s < late.times(load).own_s
    assert early.times(load).model_s == late.times(load).model_s


def test_parallel_layers_compute_their_mlp_while_attention_is_away() -> None:
    config = {
        "model_type": "phi", "hidden_size": 4096, "intermediate_size": 16384,
        "num_hidden_layers": 40, "num_attention_heads": 32, "vocab_size": 32000,
    }  # fmt: skip
    one_by_one = {**config, "model_type": "llama", "intermediate_size": 16384 * 2 // 3}
    times = []
    for entry in (config, one_by_one):
        cost = StepCost(
            model_cost(entry, name="made up"),
            Devices(device=DEVICES["H100"]),
            {1: Devices(device=DEVICES["H20"])},
            dtype="fp16",
            efficiency=Efficiency(),
        )
        times.append(cost.times(decode(64, 500)))
    parallel, serial = times
    assert parallel.model_s == pytest.approx(serial.model_s, rel=0.02)
    mlp_share = 16384 / (16384 + 2 * 4096)
    assert serial.own_s - parallel.own_s == pytest.approx(mlp_share * serial.model_s, rel=0.02)


def test_two_micro_batches_hide_attention_behind_slices() -> None:
    cost = step_cost()
    times = cost.times(decode(50, 1000))
    assert times.own_s > times.model_s
    assert round_s(times, [times], 1) == pytest.approx(2 * times.model_s)


def test_a_slow_link_is_the_bound() -> None:
    profile = Profile(
        model="m", hops=(HopTime(transport="tcp", latency_s=1e-4, bandwidth_bytes_per_s=1e9),)
    )
    cost = step_cost(profile=profile)
    times = cost.times(decode(50, 1000))
    assert times.link_s == pytest.approx(50 * 3 * 8192 * 2 / 1e9)
    assert round_s(times, [times], 1) == pytest.approx(max(2 * times.link_s, times.own_s))


def test_prompts_delay_but_do_not_wait_for_attention_workers() -> None:
    cost = step_cost()
    load = StepLoad(rows=512, logit_rows=1, prompts=[(512, 0)], stored={1: 512.0})
    times = cost.times(load)
    assert times.own_s == times.model_s
    assert times.link_s > 0
    assert cost.hop_bytes(load, 1) == pytest.approx(512 * MODEL.kv_bytes_per_token)


def test_replicas_wait_for_their_turn_at_the_end_of_a_step() -> None:
    assert step_cost(num_replicas=1).step_s(1.0) == 80
    # 81 slices over 2 replicas: one round more for the next step to begin on its own replica.
    assert step_cost(num_replicas=2).step_s(1.0) == pytest.approx(80 * 82 / 81)


def test_engine_overhead_is_added() -> None:
    profile = Profile(model="m", step_overhead_s=0.01, row_overhead_s=0.001)
    plain, measured = step_cost(), step_cost(profile=profile)
    load = decode(5, 100, LOCAL)
    added = measured.times(load).own_s - plain.times(load).own_s
    assert added * 80 == pytest.approx(0.015)


def test_knee_and_objective() -> None:
    cost = step_cost()
    knee = cost.compute_knee()
    assert 180 < knee < 300
    assert cost.objective_batch(None, 1000, 77) == 77
    batch = cost.objective_batch(0.05, 1000, 10**6)
    load = decode(int(batch), 1000, LOCAL)
    assert cost.step_s(cost.times(load).own_s) <= 0.05
    load = decode(int(batch) + 1, 1000, LOCAL)
    assert cost.step_s(cost.times(load).own_s) > 0.05
