"""The aggregate simulation beside the exact one."""

from __future__ import annotations

import pytest

from lamina.errors import CapacityError, ConfigError
from lamina.plan.arrivals import Workload
from lamina.plan.build import Settings
from lamina.plan.deployment import parse_deployment
from lamina.plan.hardware import load_devices
from lamina.plan.model import load_model
from lamina.plan.replicated import Routing, simulate_replicated
from lamina.plan.results import Result
from lamina.plan.simulate import simulate
from lamina.plan.synthetic import Lengths, synthetic

DEVICES = load_devices()
MODEL = load_model("Llama-2-7B")


def drawn(num_requests: int, rate: float, prompt: float = 800, output: float = 120) -> Workload:
    return synthetic(
        num_requests=num_requests,
        rate=rate,
        prompt=Lengths(kind="lognormal", mean=prompt, spread=0.5),
        output=Lengths(kind="lognormal", mean=output, spread=0.8),
    )


def both(
    deployment: str, workload: Workload, settings: Settings | None = None
) -> tuple[Result, Result]:
    parsed = parse_deployment(deployment, DEVICES)
    exact = simulate(MODEL, parsed, workload, settings)
    fast = simulate_replicated(MODEL, parsed, workload, settings, instances=1, jobs=1)
    return exact, fast


def deviation(fast: float | None, exact: float | None) -> float:
    assert fast is not None
    assert exact is not None
    return abs(fast / exact - 1)


@pytest.mark.parametrize("rate", [1.0, 3.0, 12.0])
@pytest.mark.parametrize(
    "deployment", ["mono:1xA100 80GB", "dop:1xA100 80GB/2xH20,depth=1", "dop:1xH100/1xH20,depth=2"]
)
def test_it_comes_close_to_the_exact_simulation(deployment: str, rate: float) -> None:
    exact, fast = both(deployment, drawn(200, rate))
    assert fast.num_output_tokens == exact.num_output_tokens
    assert fast.num_requests == exact.num_requests
    assert deviation(fast.duration_s, exact.duration_s) < 0.02
    assert deviation(fast.mean_batch, exact.mean_batch) < 0.05
    assert fast.tbt_s is not None
    assert exact.tbt_s is not None
    assert deviation(fast.tbt_s.p50, exact.tbt_s.p50) < 0.03
    assert deviation(fast.tbt_s.mean, exact.tbt_s.mean) < 0.05
    assert fast.ttft_s is not None
    assert exact.ttft_s is not None
    assert deviation(fast.ttft_s.p50, exact.ttft_s.p50) < 0.15
    assert deviation(fast.ttft_s.mean, exact.ttft_s.mean) < 0.15
    for mine, theirs in zip(fast.pools, exact.pools, strict=True):
        assert (mine.role, mine.device, mine.count) == (theirs.role, theirs.device, theirs.count)
        assert deviation(mine.compute, theirs.compute) < 0.05
        assert deviation(mine.bandwidth, theirs.bandwidth) < 0.05
        assert deviation(mine.memory, theirs.memory) < 0.05
        assert mine.network == pytest.approx(theirs.network, rel=0.05)


def test_memory_that_is_full_makes_requests_wait_and_give_way() -> None:
    exact, fast = both("mono:1xA10", drawn(150, 10.0, prompt=600, output=300))
    assert exact.num_preemptions > 0
    assert fast.num_preemptions > 0
    assert deviation(fast.duration_s, exact.duration_s) < 0.05
    assert deviation(fast.mean_batch, exact.mean_batch) < 0.08


def test_decode_only_at_once() -> None:
    settings = Settings(decode_only=True, at_once=True, max_num_seqs=64)
    exact, fast = both("mono:1xA100 80GB", drawn(300, 1.0), settings)
    assert deviation(fast.duration_s, exact.duration_s) < 0.03
    assert deviation(fast.tokens_per_s, exact.tokens_per_s) < 0.03
    assert fast.tokens_per_s_while_arriving is None
    assert fast.ttft_s is not None
    assert exact.ttft_s is not None
    assert deviation(fast.ttft_s.p50, exact.ttft_s.p50) < 0.05


def replicated(
    instances: int,
    workload: Workload,
    routing: Routing = "turns",
    *,
    jobs: int = 1,
    deployment: str = "mono:1xA100 80GB",
    settings: Settings | None = None,
) -> Result:
    parsed = parse_deployment(deployment, DEVICES)
    return simulate_replicated(
        MODEL, parsed, workload, settings, instances=instances, routing=routing, jobs=jobs
    )


def test_instances_in_turns_are_simulations_of_their_own() -> None:
    workload = drawn(240, 8.0)
    all_of_them = replicated(3, workload)
    alone = []
    for index in range(3):
        own = Workload(name="part", arrivals=workload.arrivals[index::3])
        alone.append(simulate(MODEL, parse_deployment("mono:1xA100 80GB", DEVICES), own))
    assert all_of_them.num_output_tokens == sum(r.num_output_tokens for r in alone)
    assert all_of_them.tbt_s is not None
    tokens = sum(r.tbt_s.mean * r.num_output_tokens for r in alone if r.tbt_s)
    assert deviation(all_of_them.tbt_s.mean, tokens / all_of_them.num_output_tokens) < 0.05
    assert all_of_them.pools[0].count == 3
    assert all_of_them.price_per_hour == pytest.approx(3 * (alone[0].price_per_hour or 0))


def test_results_do_not_depend_on_the_number_of_processes() -> None:
    workload = drawn(120, 20.0)
    assert replicated(33, workload, "two-choices") == replicated(
        33, workload, "two-choices", jobs=2
    )


def test_two_choices_wait_less_than_turns() -> None:
    workload = drawn(1200, 6.5, output=300)
    few = Settings(max_num_seqs=4)  # long answers block an instance for a while
    turns = replicated(6, workload, settings=few)
    choices = replicated(6, workload, "two-choices", settings=few)
    assert turns.num_output_tokens == choices.num_output_tokens
    assert turns.ttft_s is not None
    assert choices.ttft_s is not None
    assert choices.ttft_s.p99 < turns.ttft_s.p99


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="between 1 and the number of requests"):
        replicated(11, drawn(10, 1.0))
    with pytest.raises(ConfigError, match="no fast simulation"):
        replicated(1, drawn(10, 1.0), deployment="pd:1xA100 80GB/1xA100 80GB")
    with pytest.raises(CapacityError, match="longest request"):
        replicated(1, drawn(10, 1.0, prompt=100_000), deployment="mono:1xA10")
