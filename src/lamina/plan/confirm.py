"""Estimates beside the simulator: the same deployments with the real scheduler, at saturation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import msgspec

from lamina.errors import CapacityError
from lamina.plan.arrivals import Workload
from lamina.plan.build import Settings
from lamina.plan.deployment import PrefillDecode
from lamina.plan.estimate import Estimate
from lamina.plan.fleet import Plan
from lamina.plan.model import ModelCost
from lamina.plan.simulate import simulate

_REQUESTS_PER_SEQUENCE = 3
_LEAST_REQUESTS = 200
_MOST_REQUESTS = 4000


class Simulated(msgspec.Struct, frozen=True, kw_only=True):
    """One deployment (or all of a plan) that always has requests waiting."""

    tokens_per_s: float
    batch: float
    tbt_s: float
    """Mean."""
    tbt_p99_s: float
    ttft_s: float | None
    """Mean, from when a request has its place; None for prefill-decode deployments, where it may
    wait twice."""
    num_requests: int


class _OutOfTime(Exception):
    pass


class Simulations:
    """Simulates each deployment at most once, within a limit of time for all of them."""

    def __init__(
        self, model: ModelCost, workload: Workload, settings: Settings, *, limit_s: float
    ) -> None:
        self._model = model
        self._workload = workload
        self._settings = msgspec.structs.replace(settings, at_once=True)
        self._end_s = time.perf_counter() + limit_s
        self._known: dict[str, Simulated | None] = {}

    def plan(self, plan: Plan, progress: Callable[[], None] | None = None) -> Simulated | None:
        """All deployments of a plan together; None if there was no time for one of them."""
        parts = []
        for count, estimate in plan.parts:
            simulated = self._deployment(estimate)
            if progress is not None:
                progress()
            if simulated is None:
                return None
            parts.append((count, simulated))
        ttfts = [s.ttft_s for _, s in parts if s.ttft_s is not None]
        return Simulated(
            tokens_per_s=sum(count * s.tokens_per_s for count, s in parts),
            batch=sum(count * s.batch for count, s in parts),
            tbt_s=max(s.tbt_s for _, s in parts),
            tbt_p99_s=max(s.tbt_p99_s for _, s in parts),
            ttft_s=max(ttfts) if len(ttfts) == len(parts) else None,
            num_requests=sum(s.num_requests for _, s in parts),
        )

    def _deployment(self, estimate: Estimate) -> Simulated | None:
        text = str(estimate.deployment)
        if text not in self._known:
            try:
                self._known[text] = self._run(estimate)
            except (_OutOfTime, CapacityError):
                self._known[text] = None
        return self._known[text]

    def _run(self, estimate: Estimate) -> Simulated | None:
        def check(_: float) -> None:
            if time.perf_counter() > self._end_s:
                raise _OutOfTime

        check(0.0)
        workload = self._sample(estimate.batch)
        # The batch may be less than what fits, for the sake of the objectives.
        most = max(1, math.ceil(estimate.batch))
        settings = msgspec.structs.replace(
            self._settings, max_num_seqs=min(self._settings.max_num_seqs, most)
        )
        result = simulate(self._model, estimate.deployment, workload, settings, progress=check)
        steady, tbt = result.saturated, result.tbt_s
        if steady is None or tbt is None:
            return None
        tokens_per_s = steady.tokens_per_s
        is_separate = isinstance(estimate.deployment, PrefillDecode)
        if is_separate and steady.seconds < result.duration_s / 4:
            # Requests wait for their prompts and for the link, not for the decode instance.
            tokens_per_s = result.tokens_per_s
        ttft_s = None
        if result.ttft_s and result.queue_s:
            ttft_s = result.ttft_s.mean - result.queue_s.mean
        return Simulated(
            tokens_per_s=tokens_per_s,
            batch=steady.mean_batch,
            tbt_s=tbt.mean,
            tbt_p99_s=tbt.p99,
            ttft_s=None if is_separate else ttft_s,
            num_requests=result.num_requests,
        )

    def _sample(self, batch: float) -> Workload:
        """Requests from all over the workload, as many as a steady state takes."""
        arrivals = self._workload.arrivals
        wanted = min(_MOST_REQUESTS, max(_LEAST_REQUESTS, int(_REQUESTS_PER_SEQUENCE * batch)))
        if wanted < len(arrivals):
            step = len(arrivals) / wanted
            arrivals = tuple(arrivals[int(i * step)] for i in range(wanted))
        repeated = arrivals * math.ceil(wanted / len(arrivals))
        times = sorted(a.time_s for a in repeated[:wanted])
        return msgspec.structs.replace(
            self._workload,
            arrivals=tuple(
                msgspec.structs.replace(a, time_s=time_s)
                for a, time_s in zip(repeated[:wanted], times, strict=True)
            ),
        )
