"""Profiles of one model used for another, and of what runs side by side."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lamina.errors import ConfigError
from lamina.plan.cost import AttentionCost, Devices, Efficiency
from lamina.plan.hardware import Device
from lamina.plan.model import ModelCost, model_cost
from lamina.plan.profile import (
    AttentionTime,
    Curve,
    Profile,
    SideBySide,
    SlicesTime,
    Surface,
)
from lamina.plan.scaling import scaled
from lamina.plan.step import StepCost, StepLoad, round_s, together_s
from lamina.types import LOCAL

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "dtype": "bfloat16",
}
CPU = Device(
    name="cpu-1",
    kind="cpu",
    flops={"bf16": 1e11},
    memory_bytes=10**10,
    bandwidth_bytes_per_s=1e10,
    network_bytes_per_s=1e9,
    source="a test",
)
BESIDE = SideBySide(
    model="cpu-1",
    attention="cpu-1",
    slices_slowdown=Curve(sizes=(1, 3), values=(2.0, 1.0)),
    attention_slowdown=Curve(sizes=(1,), values=(1.5,)),
    hop_s=Curve(sizes=(0,), values=(1e-4,)),
    hop_busy_s=Curve(sizes=(0,), values=(2e-5,)),
)
PROFILE = Profile(
    model="small",
    config=CONFIG,
    devices=(CPU,),
    slices=(SlicesTime(device="cpu-1", seconds=Curve(sizes=(1, 101), values=(0.01, 0.11))),),
    attention=(
        AttentionTime(
            device="cpu-1",
            decode=Surface(sizes=(1, 2), contexts=(1, 100), seconds=((0, 0.1), (0, 0.2))),
            prompt=Surface(sizes=(0, 8), contexts=(0, 8), seconds=((0, 0), (0.1, 0.3))),
        ),
        AttentionTime(
            device="cpu-1",
            workers=2,
            decode=Surface(sizes=(1,), contexts=(1,), seconds=((0.07,),)),
        ),
    ),
    side_by_side=(BESIDE,),
)
MODEL = model_cost(CONFIG, name="small")


def grown(**fields: int) -> ModelCost:
    return model_cost(CONFIG | fields, name="large")


def test_of_the_measured_model_nothing_changes() -> None:
    assert scaled(PROFILE, MODEL) is PROFILE
    assert scaled(PROFILE, model_cost(CONFIG, name="another name")) is PROFILE


def test_slices_follow_weights_and_arithmetic() -> None:
    model = grown(num_hidden_layers=8, vocab_size=2000)
    (entry,) = scaled(PROFILE, model).slices
    assert entry.seconds.at(1) == pytest.approx(0.02, rel=1e-3), "all twice as many"
    assert entry.seconds.at(101) == pytest.approx(0.22, rel=1e-3)
    model = grown(intermediate_size=2048)
    (entry,) = scaled(PROFILE, model).slices
    reading = 0.01 * model.slice_bytes(101) / MODEL.slice_bytes(101)
    arithmetic = 0.1 * model.slice_flops(101) / MODEL.slice_flops(101)
    assert entry.seconds.at(101) == pytest.approx(reading + arithmetic)


def test_attention_follows_the_cache() -> None:
    one, two = scaled(PROFILE, grown(num_hidden_layers=12, hidden_size=512)).attention
    assert one.decode.at(2, 100) == pytest.approx(0.6)
    assert one.prompt is not None
    assert one.prompt.at(8, 8) == pytest.approx(0.9)
    assert two.decode.at(1, 1) == pytest.approx(0.21)
    assert (one.workers, two.workers) == (1, 2)


def test_side_by_side_stays() -> None:
    assert scaled(PROFILE, grown(num_hidden_layers=12)).side_by_side == (BESIDE,)


def test_a_profile_without_a_config_fits_no_other_model() -> None:
    with pytest.raises(ConfigError, match="no config"):
        scaled(msgspec.structs.replace(PROFILE, config={}), MODEL)


def test_attention_of_two_workers_is_what_was_measured_of_two() -> None:
    def seconds(count: int) -> float:
        cost = AttentionCost(
            MODEL,
            Devices(device=CPU, count=count),
            dtype="bf16",
            efficiency=Efficiency(),
            profile=PROFILE,
        )
        return cost.seconds(1, 100)

    assert seconds(1) == pytest.approx(0.1)
    assert seconds(2) == pytest.approx(0.07), "not half of one's: they share the memory bus"
    assert seconds(4) == pytest.approx(0.1 / 4), "never measured"


@pytest.mark.parametrize(
    ("first", "second", "slowdowns", "both"),
    [
        (2.0, 1.0, (1.0, 1.0), 2.0),
        (2.0, 1.0, (2.0, 2.0), 3.0),  # they take turns on the same cores
        (1.0, 2.0, (2.0, 2.0), 3.0),
        (3.0, 1.0, (1.5, 1.2), 1.2 + 3.0 - 1.2 / 1.5),
        (1.0, 0.0, (9.0, 9.0), 1.0),
    ],
)
def test_together(first: float, second: float, slowdowns: tuple[float, float], both: float) -> None:
    assert together_s(first, second, *slowdowns) == pytest.approx(both)


def step_cost(early_q: bool) -> StepCost:
    return StepCost(
        MODEL,
        Devices(device=CPU),
        {1: Devices(device=CPU)},
        dtype="bf16",
        efficiency=Efficiency(),
        early_q=early_q,
        profile=PROFILE,
    )


LOAD = StepLoad(rows=1, logit_rows=1, attending={1: 1.0}, attended={1: 100.0})


def test_steps_side_by_side_take_hops_and_slow_each_other_down() -> None:
    cost = step_cost(early_q=False)
    times = cost.times(LOAD)
    assert times.own_s == pytest.approx((0.01 + 0.1) / 4 + 1e-4), "nothing runs together"
    assert times.model_s == pytest.approx(0.01 / 4 + 2e-5)
    assert times.attention_s == {1: pytest.approx(0.1 / 4)}
    assert (times.model_slowdown, times.attention_slowdown) == (2.0, 1.5)
    pipelined = round_s(times, [times], 1)
    slices, attention = 2 * times.model_s, 2 * 0.1 / 4
    assert pipelined == pytest.approx(together_s(slices, attention, 2.0, 1.5))
    early = step_cost(early_q=True).times(LOAD)
    assert early.own_s == pytest.approx(times.own_s, rel=0.1)
    assert early.own_s != times.own_s


def test_what_was_not_measured_side_by_side_is_estimated() -> None:
    cost = StepCost(
        MODEL,
        Devices(device=CPU),
        {1: Devices(device=CPU), 2: Devices(device=CPU)},
        dtype="bf16",
        efficiency=Efficiency(),
        profile=PROFILE,
    )
    times = cost.times(StepLoad(rows=1, logit_rows=1, attending={1: 1.0}, attended={1: 100.0}))
    assert times.model_slowdown == 1.0
    assert cost.times(StepLoad(rows=1, attending={LOCAL: 1.0}, attended={LOCAL: 1.0})).own_s > 0


def test_the_profiles_devices_replace_known_ones() -> None:
    assert PROFILE.with_devices({"cpu-1": msgspec.structs.replace(CPU, source="old")}) == {
        "cpu-1": CPU
    }
