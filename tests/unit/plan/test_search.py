"""Searches: against trying everything, their properties, their refusals."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import CapacityError, ConfigError
from lamina.plan.build import Settings
from lamina.plan.candidates import Candidates, Usage, ladder, usage_of
from lamina.plan.demand import Demand
from lamina.plan.deployment import (
    Deployment,
    Disaggregated,
    Monolithic,
    Offload,
    Pool,
    PrefillDecode,
)
from lamina.plan.estimate import Estimate, Estimator, Objectives
from lamina.plan.fleet import Fleets, is_disaggregated
from lamina.plan.hardware import load_devices
from lamina.plan.inventory import Inventory, parse_inventory
from lamina.plan.model import load_model
from lamina.plan.search import Search, search
from lamina.plan.workload import open_workload

DEVICES = load_devices()
LIMITS = Settings(max_num_seqs=512, max_num_batched_tokens=1024)
DEMAND = Demand(
    open_workload("synthetic:requests=300,rate=4,prompt=lognormal:600:0.5,output=lognormal:200:0.5")
)
LONG = Demand(
    open_workload(
        "synthetic:requests=200,rate=1,prompt=lognormal:4000:0.3,output=lognormal:800:0.3"
    )
)
DECODE = Settings(max_num_seqs=512, max_num_batched_tokens=1024, decode_only=True)


def find(
    model: str, inventory: str | Inventory, demand: Demand = DEMAND, limits: Settings = LIMITS,
    **kwargs: Any,
) -> Search:  # fmt: skip
    if isinstance(inventory, str):
        inventory = parse_inventory(inventory, DEVICES)
    return search(load_model(model), inventory, demand, limits, **kwargs)


def everything(inventory: Inventory, units: int) -> Iterator[Deployment]:
    """Every deployment of an inventory, however silly."""
    pools = inventory.pools

    def some(pool: Pool, count: int) -> Pool:
        return Pool(device=pool.device, count=count)

    for pool in pools:
        for count in range(1, pool.count + 1):
            if units % count == 0:
                yield Monolithic(devices=some(pool, count))
    for prefill, decode in product(pools, pools):
        for m, n in product(range(1, prefill.count + 1), range(1, decode.count + 1)):
            if units % n or (prefill is decode and m + n > prefill.count):
                continue
            for ranks, offload in product(range(1, m + 1), (None, Offload())):
                if m % ranks == 0 and units % ranks == 0:
                    yield PrefillDecode(
                        prefill=some(prefill, m),
                        decode=some(decode, n),
                        prefill_ranks=ranks,
                        offload=offload,
                    )
    for pool in pools:
        for count, replicas in product(range(1, pool.count + 1), range(1, 5)):
            if count % replicas or units % (count // replicas):
                continue
            left = [p.count - (count if p is pool else 0) for p in pools]
            for counts in product(*(range(n + 1) for n in left)):
                attention = tuple(some(p, n) for p, n in zip(pools, counts, strict=True) if n)
                for depth in (replicas, *(replicas + more for more in (1, 2, 3, 5))):
                    if attention:
                        yield Disaggregated(
                            model=some(pool, count),
                            attention=attention,
                            replicas=replicas,
                            depth=depth,
                        )


def best_by_hand(
    model: str, inventory: Inventory, demand: Demand, limits: Settings, objectives: Objectives
) -> tuple[float, float]:
    """The most throughput of all fleets, and of those without disaggregated attention."""
    cost = load_model(model)
    estimator = Estimator(cost, demand, limits, objectives)
    best: dict[Usage, float] = {}
    plain: dict[Usage, float] = {}
    for deployment in everything(inventory, cost.layers[0].kv_heads):
        if limits.decode_only and isinstance(deployment, PrefillDecode):
            continue
        result = estimator.estimate(deployment)
        if isinstance(result, Estimate):
            usage = usage_of(deployment, inventory)
            best[usage] = max(best.get(usage, 0.0), result.tokens_per_s)
            if not is_disaggregated(result):
                plain[usage] = max(plain.get(usage, 0.0), result.tokens_per_s)

    def fill(left: Usage, choices: dict[Usage, float]) -> float:
        reached = 0.0
        for usage, value in choices.items():
            if all(u <= n for u, n in zip(usage, left, strict=True)):
                rest = tuple(n - u for u, n in zip(usage, left, strict=True))
                reached = max(reached, value + fill(rest, choices))
        return reached

    counts = tuple(pool.count for pool in inventory.pools)
    return fill(counts, best), fill(counts, plain)


@pytest.mark.parametrize(
    ("model", "text", "demand", "limits", "objectives"),
    [
        ("Llama-2-7B", "2 x RTX 4090, 1 x RTX 3090", DEMAND, LIMITS, Objectives()),
        ("Llama-2-7B", "2 x RTX 4090, 1 x RTX 3090", LONG, DECODE, Objectives()),
        ("Llama-2-13B", "3 x RTX 3090, 1 CPU box, 10 GbE", DEMAND, LIMITS, Objectives(tbt_s=0.2)),
        ("Llama-2-13B", "1 x A100 40GB, 2 x L4, 1 x A10", LONG, DECODE, Objectives()),
        ("Llama-2-13B", "3 x A100 40GB, 1 x H20", DEMAND, LIMITS, Objectives(ttft_s=0.3)),
        ("Llama-2-7B", "2 x A100 40GB, 1 x H20", LONG, LIMITS, Objectives(ttft_s=1.0)),
        ("LLaMA3-70B", "2 x H100, 3 x H20", DEMAND, DECODE, Objectives(tbt_s=0.05)),
    ],
)
def test_the_search_finds_what_trying_everything_finds(
    model: str, text: str, demand: Demand, limits: Settings, objectives: Objectives
) -> None:
    inventory = parse_inventory(text, DEVICES)
    every, plain = best_by_hand(model, inventory, demand, limits, objectives)
    found = find(model, inventory, demand, limits, objectives=objectives)
    assert found.num_left_out == 0
    assert found.plans[0].tokens_per_s == pytest.approx(every, rel=0.005)
    reached = found.without.tokens_per_s if found.without else 0.0
    assert reached == pytest.approx(plain, rel=1e-9)


def test_bounds_are_bounds() -> None:
    inventory = parse_inventory("3 x A100 40GB, 2 x L4, 1 CPU box, 10 GbE", DEVICES)
    model = load_model("Llama-2-7B")
    for limits in (LIMITS, DECODE):
        candidates = Candidates(model, inventory, limits, LONG)
        estimator = Estimator(model, LONG, limits)
        for deployment in candidates.disaggregated():
            result = estimator.estimate(deployment)
            if isinstance(result, Estimate):
                assert result.tokens_per_s <= candidates.bound(deployment) * (1 + 1e-9)


def test_plans_use_no_more_than_there_is() -> None:
    inventory = parse_inventory("3 x A100 40GB, 2 x L4, 1 x H20", DEVICES)
    found = find("Llama-2-7B", inventory)
    for plan in (*found.plans, *found.front):
        used = [0] * len(inventory.pools)
        for count, estimate in plan.parts:
            for index, number in enumerate(usage_of(estimate.deployment, inventory)):
                used[index] += count * number
        assert all(n <= pool.count for n, pool in zip(used, inventory.pools, strict=True))
    assert list(found.plans) == sorted(found.plans, key=lambda p: -p.tokens_per_s)


@settings(max_examples=8, deadline=None)
@given(
    gbits=st.lists(st.sampled_from([1, 10, 25, 100, 400]), min_size=2, max_size=3, unique=True),
    decode_only=st.booleans(),
)
def test_a_faster_network_is_never_worse(gbits: list[int], decode_only: bool) -> None:
    limits = DECODE if decode_only else LIMITS
    reached = [
        find("Llama-2-13B", f"2 x RTX 4090, 2 x RTX 3090, {rate} GbE", LONG, limits)
        for rate in sorted(gbits)
    ]
    best = [found.plans[0].tokens_per_s for found in reached]
    assert all(slow <= fast * 1.002 for slow, fast in pairwise(best))


@settings(max_examples=6, deadline=None)
@given(sizes=st.lists(st.integers(24, 800), min_size=2, max_size=3, unique=True))
def test_more_memory_is_never_worse(sizes: list[int]) -> None:
    best = [
        find("Llama-2-13B", f"1 x A100 40GB, 2x EPYC 9654 with {size} GB, 100 GbE", LONG, DECODE)
        .plans[0]
        .tokens_per_s
        for size in sorted(sizes)
    ]
    assert all(small <= large * 1.002 for small, large in pairwise(best))


@pytest.mark.parametrize("extra", ["1 x L4", "1 x RTX 3090", "1 CPU box", "4 x H20"])
def test_more_devices_are_never_worse(extra: str) -> None:
    few = find("Llama-2-7B", "2 x A100 40GB, 1 x A10")
    many = find("Llama-2-7B", f"2 x A100 40GB, 1 x A10, {extra}")
    assert many.plans[0].tokens_per_s >= few.plans[0].tokens_per_s


def test_a_budget_is_kept() -> None:
    text = "2 x H100 at $2.5, 4 x H20 at $1, 2 x L40S at $0.8"
    free = find("Llama-2-13B", text)
    assert free.plans[0].price_per_hour == pytest.approx(10.6)
    reached = []
    for budget in (1.0, 3.0, 6.0, 10.0, 20.0):
        found = find("Llama-2-13B", text, budget_per_hour=budget)
        for plan in found.plans:
            assert plan.price_per_hour is not None
            assert plan.price_per_hour <= budget
        reached.append(found.plans[0].tokens_per_s)
    assert reached == sorted(reached)
    assert reached[-1] == pytest.approx(free.plans[0].tokens_per_s)


def test_the_front_is_a_front() -> None:
    found = find("Llama-2-13B", "2 x H100 at $2.5, 4 x H20 at $1, 2 x L40S at $0.8, 1 x A100 80GB")
    prices = [plan.price_per_hour for plan in found.front]
    assert prices == sorted(prices)  # type: ignore[type-var]
    speeds = [plan.tokens_per_s for plan in found.front]
    assert speeds == sorted(speeds)
    assert len(found.front) > 3
    assert speeds[-1] == pytest.approx(found.plans[0].tokens_per_s)


def test_by_cost_the_first_plan_has_the_cheapest_tokens() -> None:
    text = "2 x H100 at $2.5, 4 x H20 at $1, 2 x L40S at $0.8"
    found = find("Llama-2-13B", text, rank="cost")
    costs = [plan.price_per_million_tokens for plan in found.plans]
    assert costs == sorted(costs)  # type: ignore[type-var]
    cheapest = [plan.price_per_million_tokens for plan in find("Llama-2-13B", text).plans]
    assert costs[0] <= min(cheapest)  # type: ignore[operator, type-var]


@pytest.mark.parametrize("kwargs", [{"rank": "cost"}, {"budget_per_hour": 3.0}])
def test_without_prices_there_is_no_cost(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no price for A10, A30; give one, such as 'A10 at"):
        find("Llama-2-7B", "2 x A10, 1 x A30", **kwargs)


def test_prices_of_different_sellers_are_warned_about() -> None:
    (warning,) = find("Llama-2-7B", "1 x H100, 1 x L40S").warnings
    assert warning.startswith("prices of different sellers and days are mixed")
    assert "H100: https://arxiv.org/abs/2405.01814v2" in warning
    assert find("Llama-2-7B", "1 x H100 at $2, 1 x L40S at $0.8").warnings == ()
    assert find("Llama-2-7B", "1 x H100, 1 x H20").warnings == ()


def test_impossible_objectives() -> None:
    with pytest.raises(ConfigError) as raised:
        find("LLaMA3-70B", "4 x H100, 4 x H20", objectives=Objectives(tbt_s=0.005))
    text = str(raised.value)
    assert text.startswith("no deployment meets TBT 5 ms; the best is TBT 1")
    assert re.search(r"by \S+H20\S*, with one sequence at a time", text)


def test_both_objectives_impossible() -> None:
    with pytest.raises(ConfigError, match=r"TBT 1 ms and TTFT 2 ms; the best is TBT .* TTFT "):
        find("Llama-2-7B", "1 x H100", objectives=Objectives(tbt_s=0.001, ttft_s=0.002))


def test_a_model_that_fits_nowhere() -> None:
    with pytest.raises(CapacityError) as raised:
        find("LLaMA3-70B", "2 x RTX 4090, 3 x RTX 3090")
    text = str(raised.value)
    assert "weights have 141.1 GB, equal devices together can use 64.8 GB at most" in text
    assert "needed are 8 x RTX 4090 or 8 x RTX 3090" in text


def test_requests_that_fit_nowhere() -> None:
    demand = Demand(open_workload("synthetic:requests=5,rate=1,prompt=60000,output=100"))
    with pytest.raises(CapacityError, match=r"KV does not: .*longest request has 60100"):
        find("Llama-2-7B", "1 x RTX 4090", demand)


def test_a_budget_that_buys_nothing() -> None:
    with pytest.raises(ConfigError, match=r"costs 1 \$/h or less; the cheapest that fits costs 4"):
        find("Llama-2-7B", "1 x H100, 1 x H20", budget_per_hour=1.0)


def test_an_inventory_that_is_too_large() -> None:
    with pytest.raises(ConfigError, match="plan for a quarter of it"):
        find("Llama-2-7B", "64 x H100, 64 x H20, 64 x L40S")


def test_four_kinds_take_less_than_ten_seconds() -> None:
    begin = time.process_time()
    found = find("LLaMA3-70B", "8 x H100, 8 x H20, 8 x L40S, 4 x A100 80GB", LONG)
    assert time.process_time() - begin < 10
    assert found.plans


@pytest.mark.parametrize(
    ("count", "steps"),
    [(1, [1]), (8, [1, 2, 3, 4, 5, 6, 7, 8]), (11, [1, 2, 3, 4, 6, 8, 10, 11]), (99, None)],
)
def test_ladders_reach_to_the_end(count: int, steps: list[int] | None) -> None:
    found = ladder(count)
    assert found == (steps or [1, 2, 3, 4, 6, 8, 10, 12, 16])
    assert ladder(count, sparse=True)[-1] == found[-1]


@settings(max_examples=30, deadline=None)
@given(
    counts=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    choices=st.dictionaries(
        st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any), st.floats(1, 100), max_size=5
    ),
)
def test_fleets_are_the_best_combination(counts: Usage, choices: dict[Usage, float]) -> None:
    base = Estimator(load_model("Llama-2-7B"), DEMAND, LIMITS).estimate(
        Monolithic(devices=Pool(device=DEVICES["H100"]))
    )
    assert isinstance(base, Estimate)
    estimates = [
        (usage, msgspec.structs.replace(base, tokens_per_s=value))
        for usage, value in choices.items()
    ]
    fleets = Fleets(counts, [e for e in estimates if fits(e[0], counts)])

    def fill(left: Usage) -> float:
        rests = [
            value + fill(tuple(n - u for u, n in zip(usage, left, strict=True)))
            for usage, value in choices.items()
            if fits(usage, left)
        ]
        return max(rests, default=0.0)

    assert float(fleets.best[counts]) == pytest.approx(fill(counts))
    assert sum(e.tokens_per_s for e in fleets.at(counts)) == pytest.approx(fill(counts))


def fits(usage: Usage, counts: Usage) -> bool:
    return all(u <= n for u, n in zip(usage, counts, strict=True))
