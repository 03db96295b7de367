"""Many equal instances of a deployment behind a router.

The instances are divided into groups with their part of the requests each, which processes simulate
with `plan.aggregate`; within a group the router chooses. Results do not depend on the number of
processes.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Literal

import msgspec

from lamina.errors import ConfigError
from lamina.plan.aggregate import AggregateInstance, Facts, Totals, attention_shares, gap_s
from lamina.plan.arrivals import Workload
from lamina.plan.build import Builder, Settings, Site
from lamina.plan.deployment import (
    Deployment,
    Disaggregated,
    Monolithic,
    PrefillDecode,
    power_w,
    price_per_hour,
)
from lamina.plan.model import ModelCost
from lamina.plan.recorder import RequestTimes
from lamina.plan.results import PoolUse, Result, percentiles
from lamina.plan.simulate import check_longest
from lamina.plan.use import pool_uses
from lamina.types import LOCAL

Routing = Literal["turns", "two-choices"]
GROUPS = 16
"""Most groups that the instances are divided into."""
CHOICE = 16
"""Instances that the router of a group can choose from, at least, if there are so many."""


class _Part(msgspec.Struct, frozen=True):
    """What one process simulates; requests as plain numbers, which are sooner sent."""

    model: ModelCost
    deployment: Monolithic | Disaggregated
    settings: Settings
    num_instances: int
    routing: Routing
    times_s: list[float]
    prompts: list[int]
    outputs: list[int]
    longest: int
    mean_context: float
    last_arrival_s: float
    seed: int


def simulate_replicated(
    model: ModelCost,
    deployment: Deployment,
    workload: Workload,
    settings: Settings | None = None,
    *,
    instances: int,
    routing: Routing = "turns",
    jobs: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Result:
    """Serve the workload to its end, fast.

    Args:
        instances: of the deployment.
        routing: turns: one after the other; two-choices: of two drawn at random, the one with fewer
            requests.
        jobs: processes; None: one per core that this process may use.
        progress: called now and then with the share of requests that were simulated.

    Raises:
        CapacityError: the weights do not fit, or there is no room for the longest request.
        ConfigError: there are fewer requests than instances, or the deployment is of a kind that
            only the exact simulation knows.
    """
    settings = settings or Settings()
    arrivals = workload.arrivals
    if isinstance(deployment, PrefillDecode):
        raise ConfigError(
            f"{deployment}: prefill-decode deployments have no fast simulation; simulate one "
            "instance with its part of the rate instead"
        )
    if not 1 <= instances <= len(arrivals):
        raise ConfigError(
            f"instances must be between 1 and the number of requests ({len(arrivals)}), "
            f"got {instances}"
        )
    summary = workload.summary()
    start_s = arrivals[0].time_s
    last_s = 0.0 if settings.at_once else arrivals[-1].time_s - start_s
    least = 1 if routing == "turns" else CHOICE
    groups = max(1, min(GROUPS, instances // least))
    parts = []
    for group in range(groups):
        own = [a for i, a in enumerate(arrivals) if i % instances % groups == group]
        parts.append(
            _Part(
                model=model,
                deployment=deployment,
                settings=settings,
                num_instances=len(range(group, instances, groups)),
                routing=routing,
                times_s=[0.0 if settings.at_once else a.time_s - start_s for a in own],
                prompts=[a.prompt_tokens for a in own],
                outputs=[a.output_tokens for a in own],
                longest=summary.max_total_tokens,
                mean_context=summary.mean_decode_context,
                last_arrival_s=last_s,
                seed=group,
            )
        )
    site = _site(parts[0])  # errors that concern all parts come from here
    check_longest([site], deployment, summary.max_total_tokens)
    totals = Totals()
    num_jobs = min(groups, jobs or len(os.sched_getaffinity(0)))
    for index, own_totals in enumerate(_run(parts, num_jobs)):
        totals.add(own_totals)
        if progress is not None:
            progress((index + 1) / groups)
    duration_s = totals.last_token_s
    return _result(
        model,
        deployment,
        workload,
        instances,
        totals,
        pools=_pools(
            deployment, site, totals, settings, instances, duration_s, model.kv_bytes_per_token
        ),
        last_arrival_s=last_s,
    )


def _run(parts: Sequence[_Part], jobs: int) -> Iterator[Totals]:
    if jobs == 1:
        yield from map(_simulate_part, parts)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(_simulate_part, parts)  # in their order, as sums depend on it


def _site(part: _Part) -> Site:
    """An instance that nothing runs on, for its costs and memory."""
    builder = Builder(
        part.model,
        part.settings,
        RequestTimes([0.0]),
        longest=part.longest,
        mean_context=part.mean_context,
        num_requests=1,
    )
    if isinstance(part.deployment, Monolithic):
        return builder.monolithic(part.deployment)
    return builder.disaggregated(part.deployment)


def _simulate_part(part: _Part) -> Totals:
    settings, totals = part.settings, Totals()
    site = _site(part)
    facts = Facts(
        site,
        settings,
        num_replicas=_num_replicas(part.deployment),
        last_arrival_s=part.last_arrival_s,
    )
    instances = [AggregateInstance(facts, totals) for _ in range(part.num_instances)]
    generator = random.Random(part.seed)
    count = len(instances)
    for index, (time_s, prompt, output) in enumerate(
        zip(part.times_s, part.prompts, part.outputs, strict=True)
    ):
        if part.routing == "turns" or count == 1:
            instance = instances[index % count]
            instance.run_until(time_s)
        else:
            first, second = generator.sample(instances, 2)
            first.run_until(time_s)
            second.run_until(time_s)
            instance = first if first.num_outstanding <= second.num_outstanding else second
        instance.add(time_s, prompt, output)
    for instance in instances:
        instance.run_until(math.inf)
    return totals


def _num_replicas(deployment: Deployment) -> int:
    return deployment.replicas if isinstance(deployment, Disaggregated) else 1


def _pools(
    deployment: Deployment,
    site: Site,
    totals: Totals,
    settings: Settings,
    instances: int,
    duration_s: float,
    kv_bytes_per_token: float,
) -> tuple[PoolUse, ...]:
    """Of all instances: those of one that has a mean part of the work."""
    instance = site.instance
    work = {LOCAL: totals.model_work, **totals.attention_work}
    held = totals.kv_token_s * kv_bytes_per_token / instances
    shares = {e: held * share for e, share in attention_shares(site).items()}
    for executor, busy in ((LOCAL, instance.model_busy), *instance.busy.items()):
        flops, num_bytes, network_bytes = work.get(executor, [0.0] * 3)
        busy.flops = flops / instances
        busy.num_bytes = num_bytes / instances
        busy.network_bytes = network_bytes / instances
        busy.memory_byte_s = shares.get(executor, 0.0)
    return tuple(
        msgspec.structs.replace(pool, count=pool.count * instances)
        for pool in pool_uses(deployment.pools, [site], settings, duration_s)
    )


def _result(
    model: ModelCost,
    deployment: Deployment,
    workload: Workload,
    instances: int,
    totals: Totals,
    *,
    pools: tuple[PoolUse, ...],
    last_arrival_s: float,
) -> Result:
    duration_s, count = totals.last_token_s, len(workload.arrivals)
    rate = totals.num_tokens / duration_s
    price, power = price_per_hour(deployment), power_w(deployment)
    while_arriving = totals.num_tokens_while_arriving
    return Result(
        deployment=str(deployment) if instances == 1 else f"{instances} x {deployment}",
        model=model.name,
        workload=workload.name,
        num_requests=count,
        num_output_tokens=totals.num_tokens,
        duration_s=duration_s,
        num_steps=totals.num_steps,
        num_preemptions=totals.num_preemptions,
        tokens_per_s=rate,
        tokens_per_s_while_arriving=while_arriving / last_arrival_s if last_arrival_s else None,
        requests_per_s=count / duration_s,
        mean_batch=totals.sequence_s / duration_s,
        saturated=None,
        ttft_s=percentiles(totals.ttft_s),
        tbt_s=percentiles((gap_s(index) for index in totals.gaps), totals.gaps.values()),
        queue_s=percentiles(totals.queue_s),
        offloaded_share=0.0,
        pools=pools,
        price_per_hour=None if price is None else price * instances,
        price_per_million_tokens=(None if price is None else price * instances / 3600 / rate * 1e6),
        energy_j_per_token=None if power is None else power * instances / rate,
    )
