"""Deployments that an inventory allows, and a bound on what each can deliver.

Ranks of a replica are equal devices, as many as divide the KV heads. Attention workers are any of
the devices left, mixed as it comes. Of a pool of many devices not every count is tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from itertools import product

import msgspec

from lamina.config import MAX_PIPELINE_DEPTH
from lamina.plan.build import Settings
from lamina.plan.demand import Demand
from lamina.plan.deployment import (
    Deployment,
    Disaggregated,
    Monolithic,
    Offload,
    Pool,
    PrefillDecode,
)
from lamina.plan.hardware import Device
from lamina.plan.inventory import Inventory
from lamina.plan.model import ModelCost

MOST_OF_A_KIND = 16
"""Devices of one kind in one deployment."""
MOST_REPLICAS = 4
_DENSE_LADDER_ENDS = 4
_MOST_WORKER_SETS = 1000

Usage = tuple[int, ...]
"""How many of each pool of the inventory."""


def usage_of(deployment: Deployment, inventory: Inventory) -> Usage:
    counts = dict.fromkeys((pool.device.name for pool in inventory.pools), 0)
    for pool in deployment.pools:
        counts[pool.device.name] += pool.count
    return tuple(counts.values())


def ladder(count: int, *, sparse: bool = False) -> list[int]:
    """Counts of devices to try, up to `count`: all of few, some of many."""
    most = min(count, MOST_OF_A_KIND)
    steps = [n for n in (1, 2, 3, 4, 6, 8, 10, 12, 16) if n <= most]
    if sparse:
        steps = [n for n in (1, 2, 4, 8, 16) if n <= most]
    elif most <= 2 * _DENSE_LADDER_ENDS:
        steps = list(range(1, most + 1))
    return sorted({*steps, most})


class Candidates:
    """Enumerates deployments for one model and demand."""

    def __init__(
        self, model: ModelCost, inventory: Inventory, settings: Settings, demand: Demand
    ) -> None:
        self._model = model
        self._inventory = inventory
        self._settings = settings
        self._demand = demand
        self._units = math.gcd(*(layer.kv_heads for layer in model.layers))
        self._weights = model.weight_bytes()

    def ranks(self, pool: Pool) -> list[int]:
        """Numbers of ranks whose memory takes the weights."""
        return [
            n
            for n in range(1, min(pool.count, MOST_OF_A_KIND, self._units) + 1)
            if self._units % n == 0 and self.usable_bytes(pool.device) * n > self._weights
        ]

    def ranks_needed(self, device: Device) -> int | None:
        """The least number of ranks that takes the weights; None: no number does."""
        fitting = (
            n
            for n in range(1, self._units + 1)
            if self._units % n == 0 and self.usable_bytes(device) * n > self._weights
        )
        return next(fitting, None)

    def usable_bytes(self, device: Device) -> float:
        return device.memory_bytes * self._settings.efficiency.memory

    def monolithic(self) -> Iterator[Monolithic]:
        for pool in self._inventory.pools:
            for count in self.ranks(pool):
                yield Monolithic(devices=Pool(device=pool.device, count=count))

    def prefill_decode(self) -> Iterator[PrefillDecode]:
        if self._settings.decode_only:
            return
        for prefill, decode in product(self._inventory.pools, repeat=2):
            for prefill_ranks, ranks in product(self.ranks(prefill), self.ranks(decode)):
                left = prefill.count - (ranks if decode is prefill else 0)
                for instances in ladder(left // prefill_ranks) if left >= prefill_ranks else ():
                    count = instances * prefill_ranks
                    if count > MOST_OF_A_KIND:
                        continue
                    for offload in (None, Offload()):
                        yield PrefillDecode(
                            prefill=Pool(device=prefill.device, count=count),
                            decode=Pool(device=decode.device, count=ranks),
                            prefill_ranks=prefill_ranks,
                            offload=offload,
                        )

    def disaggregated(self) -> Iterator[Disaggregated]:
        """Without a choice of depth: replicas + 1 micro-batches."""
        for pool in self._inventory.pools:
            for ranks in self.ranks(pool):
                for replicas in range(1, min(MOST_REPLICAS, pool.count // ranks) + 1):
                    model = Pool(device=pool.device, count=ranks * replicas)
                    for attention in self._workers(model):
                        yield Disaggregated(
                            model=model, attention=attention, replicas=replicas, depth=replicas + 1
                        )

    def _workers(self, model: Pool) -> Iterator[tuple[Pool, ...]]:
        left = [
            pool.count - (model.count if pool.device is model.device else 0)
            for pool in self._inventory.pools
        ]
        steps = [[0, *ladder(n)] if n > 0 else [0] for n in left]
        if math.prod(map(len, steps)) > _MOST_WORKER_SETS:
            steps = [[0, *ladder(n, sparse=True)] if n > 0 else [0] for n in left]
        for counts in product(*steps):
            chosen = zip(self._inventory.pools, counts, strict=True)
            pools = tuple(Pool(device=p.device, count=n) for p, n in chosen if n)
            if pools:
                yield pools

    def bound(self, deployment: Disaggregated) -> float:
        """Tokens per second that the deployment cannot exceed: as if the network took no time,
        pipelining were perfect, and each part of the work were the only one. Infinite if times
        are measured."""
        if self._settings.profile is not None:
            return math.inf
        e, pool = self._settings.efficiency, deployment.model
        read = sum(p.count * p.device.bandwidth_bytes_per_s for p in deployment.attention)
        memory = sum(p.count * self.usable_bytes(p.device) for p in deployment.attention)
        bandwidth_share = max(e.bandwidth.shares)
        batch = memory / self._kv_bytes
        computed = pool.count * pool.device.flops_for(self._settings.dtype) * max(e.compute.shares)
        ranks_read = deployment.num_ranks * pool.device.bandwidth_bytes_per_s * bandwidth_share
        steps_per_s = min(
            read * bandwidth_share / self._attention_bytes,
            computed / self._flops,
            batch * ranks_read / self._weights_read,
        )
        return steps_per_s * self._tokens_per_step

    @cached_property
    def _kv_bytes(self) -> float:
        """That a running sequence holds, at least."""
        return self._model.kv_bytes(self._demand.context)

    @cached_property
    def _attention_bytes(self) -> float:
        """That a decode row's attention reads."""
        model, context = self._model, self._demand.context
        # Windows make the mean over contexts less than that at the mean context.
        windowed = any(layer.window is not None for layer in model.layers)
        return model.attention_bytes(context) * (0.5 if windowed else 1.0)

    @cached_property
    def _flops(self) -> float:
        """Of the slices for a decode row and the prompt rows that come with it."""
        model, demand = self._model, self._demand
        prompt = 0.0
        if not self._settings.decode_only:
            prompt = model.slice_flops(demand.prompt_tokens, 1) / self._steps
        return model.slice_flops(1) + prompt

    @cached_property
    def _weights_read(self) -> float:
        """By a step, at least."""
        return self._model.slice_bytes(1)

    @cached_property
    def _steps(self) -> float:
        return self._demand.output_tokens - (0 if self._settings.decode_only else 1)

    @cached_property
    def _tokens_per_step(self) -> float:
        """Tokens that come with a decode row."""
        return self._demand.output_tokens / self._steps


def with_depth(deployment: Disaggregated, depth: int) -> Disaggregated:
    """The same with another number of micro-batches."""
    return msgspec.structs.replace(deployment, depth=depth)


def deeper(deployment: Disaggregated) -> Iterator[int]:
    """Greater numbers of micro-batches to try, rising."""
    for more in (1, 2, 4):
        if deployment.depth + more <= MAX_PIPELINE_DEPTH:
            yield deployment.depth + more
