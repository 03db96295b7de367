from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import ConfigError
from lamina.plan.cost import (
    AttentionCost,
    Devices,
    Efficiency,
    EfficiencyCurve,
    SliceCost,
    min_bandwidth_bytes_per_s,
)
from lamina.plan.hardware import load_devices
from lamina.plan.model import load_model
from lamina.plan.profile import AttentionTime, Curve, Profile, SlicesTime, Surface

H100 = load_devices()["H100"]
H20 = load_devices()["H20"]
MODEL = load_model("LLaMA3-70B")


def slices(count: int = 1, **kwargs: object) -> SliceCost:
    options = {"dtype": "fp16", "efficiency": Efficiency(), **kwargs}
    return SliceCost(MODEL, Devices(device=H100, count=count), **options)  # type: ignore[arg-type]


def attention(count: int = 1, **kwargs: object) -> AttentionCost:
    options = {"dtype": "fp16", "efficiency": Efficiency(), **kwargs}
    return AttentionCost(MODEL, Devices(device=H20, count=count), **options)  # type: ignore[arg-type]


def test_few_rows_take_as_long_as_reading_the_weights() -> None:
    weights = MODEL.slice_bytes(1)
    assert slices().seconds(1) == pytest.approx(weights / (0.8 * H100.bandwidth_bytes_per_s))


def test_many_rows_take_as_long_as_computing() -> None:
    assert slices().seconds(4096) == pytest.approx(MODEL.slice_flops(4096) / (0.6 * 989e12))


def test_a_step_without_rows_takes_no_time() -> None:
    assert slices().seconds(0) == 0
    assert attention().seconds(0, 0) == 0


def test_ranks_share_the_work_and_pay_for_collectives() -> None:
    one, two = slices(1), slices(2)
    assert two.collectives_s(100) > 160 * 10e-6
    assert two.seconds(100) - two.collectives_s(100) == pytest.approx(one.seconds(100) / 2)
    assert one.collectives_s(100) == 0


def test_attention_reads_the_cache() -> None:
    seconds = attention().seconds(10, 10 * 4096)
    cached = 10 * 4096 * MODEL.kv_bytes_per_token
    assert seconds == pytest.approx(cached / (0.8 * 4.0e12))
    assert attention(4).seconds(10, 10 * 4096) == pytest.approx(seconds / 4)


def test_an_executor_with_a_share_of_the_bandwidth_takes_longer() -> None:
    devices = Devices(device=H20, bandwidth_share=0.5)
    slow = AttentionCost(MODEL, devices, dtype="fp16", efficiency=Efficiency())
    assert slow.seconds(4, 4000) == pytest.approx(2 * attention().seconds(4, 4000))


def test_prompts_attend_to_half_of_themselves_on_average() -> None:
    flops, num_bytes = attention().prompt_work(1000, 0)
    assert flops == pytest.approx(1000 * MODEL.attention_flops(500.5))
    assert num_bytes == 0
    later, read = attention().prompt_work(1000, 2000)
    assert later > 4 * flops
    assert read == pytest.approx(MODEL.attention_bytes(3000))


@given(rows=st.integers(1, 3000), more=st.integers(1, 500))
def test_more_rows_never_take_less(rows: int, more: int) -> None:
    cost = slices(2)
    assert cost.seconds(rows + more) >= cost.seconds(rows)


def test_efficiency_curve() -> None:
    curve = EfficiencyCurve(sizes=(1.0, 100.0), shares=(0.2, 0.6))
    assert curve.at(0.5) == 0.2
    assert curve.at(10) == pytest.approx(0.4)
    assert curve.at(1e6) == 0.6
    slow = slices(efficiency=Efficiency(compute=curve))
    assert slow.seconds(4096) == slices().seconds(4096)


@pytest.mark.parametrize(
    ("sizes", "shares", "match"),
    [
        ((1.0,), (0.5, 0.6), "as many as"),
        ((2.0, 1.0), (0.5, 0.6), "increasing"),
        ((1.0,), (1.5,), "at most 1"),
    ],
)
def test_wrong_curves(sizes: tuple[float, ...], shares: tuple[float, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        EfficiencyCurve(sizes=sizes, shares=shares)


def test_wrong_efficiency() -> None:
    with pytest.raises(ConfigError, match="memory must be above 0"):
        Efficiency(memory=0)
    with pytest.raises(ConfigError, match="hop_latency_s"):
        Efficiency(hop_latency_s=-1)


def test_the_least_bandwidth_is_the_papers_formula() -> None:
    """(2 + 2/G) e d B L / (alpha (MTIME + ATIME)) with G = 8, d = 8192, L = 80."""
    bytes_per_s = min_bandwidth_bytes_per_s(MODEL, 300, 0.05, 0.15, alpha=0.2)
    assert bytes_per_s == pytest.approx((2 + 2 / 8) * 2 * 8192 * 300 * 80 / (0.2 * 0.2))
    with pytest.raises(ConfigError, match="alpha"):
        min_bandwidth_bytes_per_s(MODEL, 300, 0.05, 0.15, alpha=0)


PROFILE = Profile(
    model="LLaMA3-70B",
    slices=(
        SlicesTime(device="H100", tensor_parallel=2, seconds=Curve(sizes=(1, 9), values=(1, 2))),
    ),
    attention=(
        AttentionTime(
            device="H20",
            decode=Surface(sizes=(1, 3), contexts=(100, 200), seconds=((1, 2), (3, 6))),
            prompt=Surface(sizes=(10,), contexts=(0,), seconds=((7,),)),
        ),
    ),
)


def test_measurements_replace_the_roofline() -> None:
    assert slices(2, profile=PROFILE).seconds(5) == 1.5
    assert slices(1, profile=PROFILE).seconds(5) == slices(1).seconds(5)
    measured = attention(profile=PROFILE)
    assert measured.seconds(2, 2 * 150) == 3.0
    assert measured.prompt_seconds(10, 0) == 7
    assert attention(2, profile=PROFILE).seconds(2, 2 * 150) == 1.5
