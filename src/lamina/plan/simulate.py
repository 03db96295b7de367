"""Discrete-event simulation of a deployment that serves a workload.

Events are arrivals, ends of steps, and prompts' KV that has reached a decode instance. What runs in
a step, who waits, who is preempted and where KV goes is decided by the engine's own batcher and
placer (`sched`); how long a step takes is decided by the cost model (`plan.step`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from lamina.errors import CapacityError
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
from lamina.plan.instance import Instance, engine_request
from lamina.plan.model import ModelCost
from lamina.plan.offloading import OffloadPlacer
from lamina.plan.prefill import PrefillSide
from lamina.plan.recorder import RequestTimes
from lamina.plan.results import Result
from lamina.plan.use import pool_uses


def simulate(
    model: ModelCost,
    deployment: Deployment,
    workload: Workload,
    settings: Settings | None = None,
    *,
    progress: Callable[[float], None] | None = None,
) -> Result:
    """Serve the workload to its end.

    Args:
        progress: called now and then with the share of tokens that were generated.

    Raises:
        CapacityError: the weights do not fit, or there is no room for the longest request.
        ConfigError: a device cannot compute in the dtype.
    """
    simulation = _Simulation(model, deployment, workload, settings or Settings())
    simulation.run(progress)
    return simulation.result()


def check_longest(sites: Iterable[Site], deployment: Deployment, longest: int) -> None:
    """
    Raises:
        CapacityError: the longest request has more tokens than one of the instances can hold.
    """
    limit = min(site.instance.batcher.max_model_len for site in sites) - 1
    if longest > limit:
        where = ""
        if isinstance(deployment, Disaggregated):
            where = " (while its prompt is computed, the model workers hold its KV as well)"
        raise CapacityError(
            f"{deployment} holds {limit} tokens of one sequence at most{where}, the longest "
            f"request has {longest}; leave out longer requests or use more memory"
        )


class _Simulation:
    def __init__(
        self, model: ModelCost, deployment: Deployment, workload: Workload, settings: Settings
    ) -> None:
        self._model = model
        self._deployment = deployment
        self._settings = settings
        self._workload = workload
        self._requests = workload.arrivals
        start_s = self._requests[0].time_s
        self._arrivals_s = [0.0 if settings.at_once else a.time_s - start_s for a in self._requests]
        self._times = RequestTimes(self._arrivals_s)
        summary = workload.summary()
        builder = Builder(
            model,
            settings,
            self._times,
            longest=summary.max_total_tokens,
            mean_context=summary.mean_decode_context,
            num_requests=len(self._requests),
        )
        self._prefill: PrefillSide | None = None
        match deployment:
            case Monolithic():
                self._site = builder.monolithic(deployment)
            case Disaggregated():
                self._site = builder.disaggregated(deployment)
            case PrefillDecode():
                self._site = builder.decode(deployment)
                if not settings.decode_only:
                    self._prefill = PrefillSide(builder, deployment, self._requests)
        self._sites = [self._site, *(self._prefill.sites if self._prefill else ())]
        check_longest(self._sites, deployment, summary.max_total_tokens)

    def run(self, progress: Callable[[float], None] | None) -> None:
        instances = [site.instance for site in self._sites]
        arrivals_s = [*self._arrivals_s, math.inf]
        total = sum(a.output_tokens for a in self._requests)
        index = num_events = 0
        while True:
            now_s = min(arrivals_s[index], *(instance.next_s for instance in instances))
            if self._prefill is not None:
                now_s = min(now_s, self._prefill.next_s)
            if now_s == math.inf:
                return
            touched = [instance for instance in instances if instance.next_s <= now_s]
            for instance in touched:
                instance.advance(now_s)
            while arrivals_s[index] <= now_s:
                touched.append(self._arrive(index, now_s))
                index += 1
            while self._prefill is not None and self._prefill.next_s <= now_s:
                touched.append(self._start_decode(self._prefill.pop(), now_s))
            for instance in dict.fromkeys(touched):
                instance.fill()
            num_events += 1
            if progress is not None and num_events % 1000 == 0:
                progress(self._times.num_tokens / total)

    def _arrive(self, index: int, now_s: float) -> Instance:
        if self._prefill is not None:
            return self._prefill.arrive(index, now_s)
        return self._start_decode(index, now_s)

    def _start_decode(self, index: int, now_s: float) -> Instance:
        request, instance = self._requests[index], self._site.instance
        instance.advance(now_s)
        instance.add(engine_request(index, request.prompt_tokens, request.output_tokens))
        return instance

    def result(self) -> Result:
        times, instance = self._times, self._site.instance
        duration_s = times.last_token_s - self._arrivals_s[0]
        rate = times.num_tokens / duration_s
        arriving_s = self._arrivals_s[-1] - self._arrivals_s[0]
        price, power = price_per_hour(self._deployment), power_w(self._deployment)
        placer = instance.batcher.placer
        offloaded = 0.0
        if isinstance(placer, OffloadPlacer) and placer.num_placed:
            offloaded = placer.num_offloaded / placer.num_placed
        return Result(
            deployment=str(self._deployment),
            model=self._model.name,
            workload=self._workload.name,
            num_requests=len(self._requests),
            num_output_tokens=times.num_tokens,
            duration_s=duration_s,
            num_steps=instance.num_steps,
            num_preemptions=instance.batcher.num_preemptions,
            tokens_per_s=rate,
            tokens_per_s_while_arriving=(
                times.num_tokens_while_arriving / arriving_s if arriving_s else None
            ),
            requests_per_s=len(self._requests) / duration_s,
            mean_batch=instance.occupancy.mean_batch,
            saturated=instance.occupancy.saturated(),
            ttft_s=times.ttft_s(),
            tbt_s=times.tbt_s(),
            queue_s=times.queue_s(),
            offloaded_share=offloaded,
            pools=pool_uses(self._deployment.pools, self._sites, self._settings, duration_s),
            price_per_hour=price,
            price_per_million_tokens=None if price is None else price / 3600 / rate * 1e6,
            energy_j_per_token=None if power is None else power / rate,
        )
