from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamina.errors import CapacityError, ConfigError
from lamina.plan.arrivals import Arrival, Workload
from lamina.plan.build import Settings
from lamina.plan.cost import Devices, Efficiency, SliceCost
from lamina.plan.deployment import parse_deployment
from lamina.plan.flight import Flight
from lamina.plan.hardware import load_devices
from lamina.plan.instance import Instance
from lamina.plan.model import load_model
from lamina.plan.results import Result
from lamina.plan.simulate import simulate
from lamina.plan.steady import SteadyBatcher
from lamina.plan.synthetic import Lengths, synthetic
from lamina.types import StepPlan

DEVICES = load_devices()
SMALL = load_model("Llama-2-7B")
LARGE = load_model("LLaMA3-70B")
DEPLOYMENTS = (
    "mono:2xA100 80GB",
    "dop:1xA100 80GB/1xH20,depth=1",
    "dop:1xA100 80GB/3xH20,depth=2",
    "dop:2xA100 80GB/2xH20+1xL40S,depth=3,replicas=2",
    "dop:1xA100 80GB/2xH20,depth=2,partition=requests",
    "pd:1xA100 80GB/1xA100 80GB",
    "pd:2xA100 80GB/1xA100 80GB,offload=auto",
    "pd:1xA100 80GB/1xA100 80GB,offload=0.5",
)


def requests(*lengths: tuple[float, int, int]) -> Workload:
    return Workload(
        name="by hand",
        arrivals=tuple(
            Arrival(time_s=time_s, prompt_tokens=prompt, output_tokens=output)
            for time_s, prompt, output in lengths
        ),
    )


def drawn(num_requests: int, rate: float, prompt: float = 300, output: float = 40) -> Workload:
    return synthetic(
        num_requests=num_requests,
        rate=rate,
        prompt=Lengths(kind="lognormal", mean=prompt, spread=1.0),
        output=Lengths(kind="lognormal", mean=output, spread=1.0),
    )


def run(deployment: str, workload: Workload, **kwargs: object) -> Result:
    return simulate(
        SMALL,
        parse_deployment(deployment, DEVICES),
        workload,
        Settings(dtype="fp16", **kwargs),  # type: ignore[arg-type]
    )


def test_one_request_alone_takes_its_prompt_and_its_steps() -> None:
    result = run("mono:1xA100 80GB", requests((3.0, 1000, 11)))
    e = Efficiency()
    slices = SliceCost(SMALL, Devices(device=DEVICES["A100 80GB"]), dtype="fp16", efficiency=e)
    assert result.ttft_s is not None
    assert result.tbt_s is not None
    assert result.ttft_s.mean == pytest.approx(slices.seconds(1000, 1), rel=0.03)
    assert result.tbt_s.p50 == pytest.approx(
        slices.seconds(1) + 1005 * SMALL.kv_bytes_per_token / (0.8 * 2.039e12), rel=0.03
    )
    assert result.num_steps == 11
    assert result.num_output_tokens == 11
    assert result.duration_s == pytest.approx(result.ttft_s.mean + 10 * result.tbt_s.mean)
    assert result.queue_s is not None
    assert result.queue_s.max == 0


def test_prompts_are_computed_in_chunks() -> None:
    whole = run("mono:1xA100 80GB", requests((0.0, 2000, 2)))
    chunks = run(
        "mono:1xA100 80GB", requests((0.0, 2000, 2)), max_num_batched_tokens=500, max_num_seqs=64
    )
    assert whole.num_steps == 2
    assert chunks.num_steps == 5


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"at_once": True, "decode_only": True},
        {"at_once": True, "block_size": 4, "max_num_seqs": 20},
    ],
    ids=["arriving", "decode only", "few places"],
)
def test_letting_steps_pass_changes_nothing(
    deployment: str, kwargs: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same steps with the same rows at the same times as with a plan for each of them."""
    # So little memory that pages run short now and then.
    small = {
        name: msgspec.structs.replace(DEVICES[name], memory_bytes=num_bytes * 10**9)
        for name, num_bytes in (("A100 80GB", 20), ("H20", 3), ("L40S", 2))
    }
    parsed = parse_deployment(deployment, {**DEVICES, **small})
    workload = drawn(80, 30.0, prompt=200, output=150)
    log: list[object] = []
    num_plans = 0
    record, plan = Instance._record_tokens, SteadyBatcher.plan

    def recording(self: Instance, flight: Flight) -> None:
        attended = {e: round(tokens, 6) for e, tokens in flight.load.attended.items()}
        budget = self.batcher.budget
        used = [budget.used(e) for e in budget.capacity_pages]
        rows = sorted(flight.tokens)
        waiting = self.batcher.num_waiting
        log.append((self._now_s, flight.plan.micro_batch, rows, attended, waiting, used))
        record(self, flight)

    def counting(self: SteadyBatcher, micro_batch: int = 0) -> StepPlan | None:
        nonlocal num_plans
        num_plans += 1
        return plan(self, micro_batch)

    monkeypatch.setattr(Instance, "_record_tokens", recording)
    monkeypatch.setattr(SteadyBatcher, "plan", counting)
    outcomes = []
    for step_by_step in (True, False):
        log, num_plans = [], 0
        options = Settings(dtype="fp16", step_by_step=step_by_step, **kwargs)  # type: ignore[arg-type]
        outcomes.append((simulate(SMALL, parsed, workload, options), log, num_plans))
    (by_steps, steps, num_planned), (passing, steps_too, num_planned_passing) = outcomes
    assert steps_too == steps
    assert passing == by_steps
    assert num_planned_passing < num_planned


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_every_request_gets_its_tokens(deployment: str) -> None:
    workload = drawn(150, 20.0)
    result = run(deployment, workload)
    assert result.num_output_tokens == sum(a.output_tokens for a in workload.arrivals)
    assert result.ttft_s is not None
    assert result.queue_s is not None
    assert 0 <= result.queue_s.p50 <= result.ttft_s.p50
    assert result.tokens_per_s == pytest.approx(result.num_output_tokens / result.duration_s)
    assert result.deployment == deployment
    for pool in result.pools:
        assert 0 < pool.compute <= 0.6
        assert 0 < pool.bandwidth <= 0.8 + 1e-9
        assert 0 < pool.memory <= 0.9
        assert 0 <= pool.network <= 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    deployment=st.sampled_from(DEPLOYMENTS),
    lengths=st.lists(
        st.tuples(st.floats(0, 0.2), st.integers(1, 3000), st.integers(1, 40)),
        min_size=1,
        max_size=25,
    ),
    decode_only=st.booleans(),
    at_once=st.booleans(),
)
def test_nothing_is_lost_and_nothing_faster_than_its_devices(
    deployment: str,
    lengths: list[tuple[float, int, int]],
    decode_only: bool,
    at_once: bool,
) -> None:
    workload = requests(*sorted(lengths))
    result = run(deployment, workload, decode_only=decode_only, at_once=at_once)
    assert result.num_output_tokens == sum(output for _, _, output in lengths)
    # No step is faster than reading the weights once with every model device there is.
    count = result.pools[0].count
    rate = DEVICES["A100 80GB"].bandwidth_bytes_per_s * count * 0.8
    fastest_s = SMALL.slice_bytes(1) / rate
    assert result.tbt_s is None or result.tbt_s.p50 >= 0.99 * fastest_s


def test_two_micro_batches_deliver_more_where_attention_takes_as_long_as_slices() -> None:
    workload = drawn(400, 1.0, prompt=1500, output=100)
    one = run("dop:1xA100 80GB/1xH20,depth=1", workload, at_once=True, decode_only=True)
    two = run("dop:1xA100 80GB/1xH20,depth=2", workload, at_once=True, decode_only=True)
    assert one.saturated is not None
    assert two.saturated is not None
    assert two.saturated.tokens_per_s > 1.1 * one.saturated.tokens_per_s


def test_more_attention_memory_means_larger_batches() -> None:
    workload = drawn(300, 1.0, prompt=3000, output=100)
    few = run("dop:1xA100 80GB/1xL40S", workload, at_once=True, decode_only=True)
    many = run("dop:1xA100 80GB/4xL40S", workload, at_once=True, decode_only=True)
    assert few.saturated is not None
    assert many.mean_batch > 2 * few.mean_batch


def test_a_decode_instance_does_not_wait_for_prompts() -> None:
    """A long prompt delays others on one device, but not in prefill-decode disaggregation."""
    workload = requests((0.0, 100, 400), (0.5, 30000, 2))
    together = run("mono:1xA100 80GB", workload)
    apart = run("pd:1xA100 80GB/1xA100 80GB", workload)
    assert together.tbt_s is not None
    assert apart.tbt_s is not None
    assert together.tbt_s.max > 0.1
    assert apart.tbt_s.max < 0.03


def test_first_tokens_of_a_decode_instance_come_after_the_kv() -> None:
    apart = run("pd:1xA100 80GB/1xA100 80GB", requests((0.0, 4000, 3)))
    together = run("mono:1xA100 80GB", requests((0.0, 4000, 3)))
    assert apart.ttft_s is not None
    assert together.ttft_s is not None
    assert together.tbt_s is not None
    step_s = together.tbt_s.p50
    transfer_s = SMALL.kv_bytes(4000) / (300e9 * 0.8)
    late_s = apart.ttft_s.mean - together.ttft_s.mean
    assert 0.9 * step_s < late_s < 1.1 * step_s + transfer_s


def test_offloading_keeps_to_its_bound_and_enlarges_the_batch() -> None:
    workload = drawn(250, 5.0, prompt=900, output=600)
    without = run("pd:1xA100 80GB/1xA100 80GB", workload)
    offloading = run("pd:1xA100 80GB/1xA100 80GB,offload=0.5", workload)
    assert without.offloaded_share == 0
    assert 0.2 < offloading.offloaded_share < 0.45
    assert offloading.tokens_per_s > without.tokens_per_s
    prefill = offloading.pools[0]
    assert prefill.role == "prefill and attention"
    assert prefill.bandwidth > without.pools[0].bandwidth


def test_prices_and_energy() -> None:
    result = run("mono:2xA100 80GB", drawn(20, 20.0))
    assert result.price_per_hour == pytest.approx(
        2 * (DEVICES["A100 80GB"].price_per_hour or math.nan)
    )
    assert result.price_per_million_tokens == pytest.approx(
        result.price_per_hour / 3600 / result.tokens_per_s * 1e6
    )
    assert result.energy_j_per_token == pytest.approx(800 / result.tokens_per_s)


def test_preemption_is_the_schedulers() -> None:
    """Requests whose growth does not fit are preempted and computed again, not lost."""
    device = msgspec.structs.replace(DEVICES["A100 80GB"], name="small", memory_bytes=16 * 10**9)
    devices = {**DEVICES, "small": device}
    workload = requests(*((0.0, 200, 900) for _ in range(8)))
    result = simulate(
        SMALL, parse_deployment("mono:1xsmall", devices), workload, Settings(dtype="fp16")
    )
    assert result.num_preemptions > 0
    assert result.num_output_tokens == 8 * 900


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(CapacityError, match=r"does not fit on 1 x H100: its weights have 141\.1"):
        simulate(LARGE, parse_deployment("mono:1xH100", DEVICES), drawn(3, 1.0))
    with pytest.raises(CapacityError, match="the longest request has 400000"):
        run("mono:1xA100 80GB", requests((0.0, 399999, 1)))


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match="block_size"):
        Settings(block_size=0)
    with pytest.raises(ConfigError, match="max_num_seqs"):
        Settings(max_num_seqs=64, max_num_batched_tokens=32)
    with pytest.raises(ConfigError, match="dtype"):
        simulate(
            SMALL,
            parse_deployment("mono:1xH100", DEVICES),
            drawn(3, 1.0),
            Settings(dtype="float16"),
        )
