"""Instances of a deployment: which memory holds what, and the engine's own batcher over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from lamina.errors import CapacityError, ConfigError
from lamina.plan.cost import Devices, Efficiency
from lamina.plan.deployment import Disaggregated, Monolithic, Pool, PrefillDecode
from lamina.plan.instance import Instance
from lamina.plan.model import ModelCost
from lamina.plan.offloading import OWN, OffloadPlacer
from lamina.plan.profile import Profile
from lamina.plan.recorder import RequestTimes
from lamina.plan.steady import SteadyBatcher, WatchedPlacer
from lamina.plan.step import StepCost
from lamina.sched.budget import PageBudget
from lamina.sched.offload import Bounds, Resources, compute_bound, memory_bound
from lamina.sched.placement import Mode, Placer
from lamina.types import LOCAL

UNLIMITED_PAGES = 2**62
"""Of executors that stand for memory elsewhere."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How deployments are run and costed. Names are the engine's where the meaning is."""

    dtype: str = "bf16"
    """Of arithmetic; how many bytes weights and KV have is the model cost's business."""
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    """Tokens per KV page."""
    decode_only: bool = False
    """Prompts cost nothing: their KV is there when a request gets a place, as in the paper's
    evaluation."""
    at_once: bool = False
    """All requests are there from the beginning, in the order of their arrival: throughput at
    saturation."""
    tbt_objective_s: float | None = None
    """Of the offloading policy (B_TPOT); None: the batch that fits in the decode instance."""
    step_by_step: bool = False
    """Let the batcher plan every step, also where nothing is to decide: slower, the same result."""
    efficiency: Efficiency = Efficiency()
    profile: Profile | None = None
    transport: str | None = None
    """Whose measured hops of the profile to use; None: the first."""

    def __post_init__(self) -> None:
        for field in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.max_num_batched_tokens < self.max_num_seqs and not self.decode_only:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs})"
            )


class Site(NamedTuple):
    """An instance and the pools that it runs on."""

    instance: Instance
    role: str
    """Of the model's devices."""
    model: int
    """Their pool, as its place in `deployment.pools`."""
    attention: dict[int, int]
    """The pool of each executor that is not on the model's devices."""
    weight_bytes: float
    """On the model's devices, all copies."""


class Builder:
    """Makes the instances of a deployment for one model and workload."""

    def __init__(
        self,
        model: ModelCost,
        settings: Settings,
        requests: RequestTimes,
        *,
        longest: int,
        mean_context: float,
        num_requests: int,
    ) -> None:
        """
        Args:
            longest: tokens of the longest request.
            mean_context: of a decode step.
        """
        self.model = model
        self.settings = settings
        self.requests = requests
        self.longest = longest
        self.mean_context = mean_context
        self.num_requests = num_requests
        self.units = math.gcd(*(layer.kv_heads for layer in model.layers))
        self.page_bytes = settings.block_size * model.kv_bytes_per_token
        """Of a page of all heads."""

    def monolithic(self, deployment: Monolithic) -> Site:
        pool = deployment.devices
        pages = self.pages(self.room_bytes(pool, pool.count))
        budget = PageBudget(self.settings.block_size, {LOCAL: pages}, {LOCAL: self.units})
        instance = self._instance(
            WatchedPlacer(budget, self.units, "requests"),
            budget,
            Devices(device=pool.device, count=pool.count),
            {},
        )
        return Site(instance, "model and attention", 0, {}, self._weights())

    def disaggregated(self, deployment: Disaggregated) -> Site:
        model, replicas = deployment.model, deployment.replicas
        local = UNLIMITED_PAGES
        room = self.room_bytes(model, deployment.num_ranks)
        if not self.settings.decode_only:
            local = self.pages(room * replicas)
        capacity, page_units = {LOCAL: local}, {LOCAL: self.units}
        executors: dict[int, Devices] = {}
        pools: dict[int, int] = {}
        mode: Mode = deployment.partition
        for index, count in self._workers(deployment):
            executor = len(executors) + 1
            device = deployment.attention[index].device
            executors[executor] = Devices(device=device, count=count)
            pools[executor] = 1 + index
            # One that is alone has all heads of everything, and pages of all heads.
            whole = mode == "requests" or self._are_one(deployment)
            page_units[executor] = self.units if whole else 1
            room = executors[executor].memory_bytes * self.settings.efficiency.memory
            capacity[executor] = self.pages(room, page_units[executor])
        budget = PageBudget(self.settings.block_size, capacity, page_units)
        weights = {e: devices.bandwidth_bytes_per_s for e, devices in executors.items()}
        instance = self._instance(
            WatchedPlacer(budget, self.units, mode, weights=weights),
            budget,
            Devices(device=model.device, count=deployment.num_ranks),
            executors,
            depth=deployment.depth,
            num_replicas=replicas,
            early_q=deployment.early_q,
        )
        weight_bytes = self._weights() * replicas
        return Site(instance, "model", 0, pools, weight_bytes)

    def prefill(self, deployment: PrefillDecode, on_finish: Callable[[int, float], None]) -> Site:
        """One prefill instance."""
        pool, ranks, offload = deployment.prefill, deployment.prefill_ranks, deployment.offload
        devices = Devices(device=pool.device, count=ranks)
        room = self.room_bytes(pool, ranks)
        if offload is not None:
            room = self._working_bytes()
            devices = Devices(
                device=pool.device,
                count=ranks,
                compute_share=1 - offload.compute_share,
                bandwidth_share=1 - offload.bandwidth_share,
            )
        budget = PageBudget(
            self.settings.block_size, {LOCAL: self.pages(room)}, {LOCAL: self.units}
        )
        instance = self._instance(
            WatchedPlacer(budget, self.units, "requests"),
            budget,
            devices,
            {},
            on_finish=on_finish,
            gives_tokens=False,
        )
        return Site(instance, "prefill", 0, {}, self._weights())

    def decode(self, deployment: PrefillDecode) -> Site:
        """The decode instance, with an executor on each prefill instance if it may offload.

        Its own KV is executor 1: prompts that come with their KV need no room in the local one.
        """
        pool = deployment.decode
        own_bytes = self.room_bytes(pool, pool.count)
        executors = self._executors(deployment)
        capacity = {LOCAL: UNLIMITED_PAGES, OWN: self.pages(own_bytes)}
        capacity |= dict.fromkeys(executors, self.pages(self._executor_bytes(deployment)))
        budget = PageBudget(self.settings.block_size, capacity, dict.fromkeys(capacity, self.units))
        placer = OffloadPlacer(budget, self.units, self.offload_bounds(deployment))
        instance = self._instance(
            placer,
            budget,
            Devices(device=pool.device, count=pool.count),
            executors,
            own_executor=OWN,
            in_one_machine=deployment.in_one_machine,
            prompts_are_free=True,
        )
        placer.sequence_of = instance.batcher.sequence
        return Site(instance, "decode", 1, dict.fromkeys(executors, 0), self._weights())

    def offload_bounds(self, deployment: PrefillDecode) -> Bounds:
        """Of the offloading policy; 0 if nothing may be offloaded."""
        offload, pool = deployment.offload, deployment.decode
        if offload is None:
            return Bounds(memory=0.0, compute=0.0)
        if offload.ratio is not None:
            return Bounds(memory=offload.ratio, compute=math.inf)
        own_bytes = self.room_bytes(pool, pool.count)
        executor_bytes = self._executor_bytes(deployment)
        devices = Devices(device=pool.device, count=pool.count)
        memory = memory_bound(
            (
                Resources(
                    memory_bytes=executor_bytes,
                    bandwidth_bytes_per_s=executor.bandwidth_bytes_per_s,
                )
                for executor in self._executors(deployment).values()
            ),
            Resources(memory_bytes=own_bytes, bandwidth_bytes_per_s=devices.bandwidth_bytes_per_s),
        )
        cost = self._cost(devices, {})
        fits = own_bytes / (self.mean_context * self.model.kv_bytes_per_token)
        objective = cost.objective_batch(self.settings.tbt_objective_s, self.mean_context, fits)
        return Bounds(memory=memory, compute=compute_bound(cost.compute_knee(), objective))

    def _executors(self, deployment: PrefillDecode) -> dict[int, Devices]:
        """Those beside the prefill instances."""
        offload, prefill = deployment.offload, deployment.prefill
        if offload is None:
            return {}
        devices = Devices(
            device=prefill.device,
            count=deployment.prefill_ranks,
            compute_share=offload.compute_share,
            bandwidth_share=offload.bandwidth_share,
        )
        return dict.fromkeys(range(OWN + 1, OWN + 1 + deployment.num_prefill_instances), devices)

    def _executor_bytes(self, deployment: PrefillDecode) -> float:
        """Memory for KV of one executor beside a prefill instance."""
        room = self.room_bytes(deployment.prefill, deployment.prefill_ranks)
        room -= self._working_bytes()
        if deployment.offload is not None and room <= 0:
            raise CapacityError(
                f"a prefill instance on {deployment.prefill.device.name} has no memory left for an "
                "attention executor; use a larger device or a smaller max_num_batched_tokens"
            )
        return room

    def pages(self, room_bytes: float, page_units: int | None = None) -> int:
        """Pages of `page_units` head units (None: all) that fit."""
        units = self.units if page_units is None else page_units
        return int(room_bytes // (self.page_bytes * units / self.units))

    def room_bytes(self, pool: Pool, ranks: int) -> float:
        """Memory for KV beside the weights on `ranks` devices of the pool.

        Raises:
            CapacityError: the weights alone do not fit.
        """
        usable = pool.device.memory_bytes * ranks * self.settings.efficiency.memory
        room = usable - self._weights()
        if room <= 0:
            raise CapacityError(
                f"{self.model.name} does not fit on {ranks} x {pool.device.name}: its weights have "
                f"{self._weights() / 1e9:.1f} GB, {usable / 1e9:.1f} GB are usable; "
                "use more devices"
            )
        return room

    def _weights(self) -> float:
        return self.model.weight_bytes()

    def _working_bytes(self) -> float:
        """KV of prompts in progress on a prefill instance: the longest and one step's rows more."""
        settings = self.settings
        pages = self.longest // settings.block_size + 1
        pages += settings.max_num_batched_tokens // settings.block_size + 1
        return pages * self.page_bytes

    def _are_one(self, deployment: Disaggregated) -> bool:
        """Whether the attention workers have equal shares of every sequence, so that they work like
        one of all their devices."""
        pools = deployment.attention
        return (
            deployment.partition == "heads" and len(pools) == 1 and self.units % pools[0].count == 0
        )

    def _workers(self, deployment: Disaggregated) -> list[tuple[int, int]]:
        """(attention pool, devices) of every executor."""
        pools = deployment.attention
        if self._are_one(deployment):
            return [(0, pools[0].count)]
        return [(index, 1) for index, pool in enumerate(pools) for _ in range(pool.count)]

    def _cost(
        self,
        devices: Devices,
        executors: Mapping[int, Devices],
        *,
        num_replicas: int = 1,
        early_q: bool = True,
        in_one_machine: bool = False,
    ) -> StepCost:
        settings = self.settings
        return StepCost(
            self.model,
            devices,
            executors,
            dtype=settings.dtype,
            efficiency=settings.efficiency,
            num_replicas=num_replicas,
            early_q=early_q,
            profile=settings.profile,
            transport=settings.transport,
            in_one_machine=in_one_machine,
        )

    def _instance(
        self,
        placer: Placer,
        budget: PageBudget,
        devices: Devices,
        executors: Mapping[int, Devices],
        *,
        depth: int = 1,
        num_replicas: int = 1,
        early_q: bool = True,
        in_one_machine: bool = False,
        own_executor: int = LOCAL,
        prompts_are_free: bool | None = None,
        on_finish: Callable[[int, float], None] | None = None,
        gives_tokens: bool = True,
    ) -> Instance:
        settings = self.settings
        free = settings.decode_only if prompts_are_free is None else prompts_are_free
        batcher = SteadyBatcher(
            budget,
            placer,
            num_micro_batches=depth,
            num_replicas=num_replicas,
            max_num_seqs=settings.max_num_seqs,
            max_num_rows=2**62 if free else settings.max_num_batched_tokens,
            max_model_len=max(2, min(self.longest + 1, placer.max_tokens)),
        )
        return Instance(
            batcher,
            self._cost(
                devices,
                executors,
                num_replicas=num_replicas,
                early_q=early_q,
                in_one_machine=in_one_machine,
            ),
            requests=self.requests,
            num_requests=self.num_requests,
            num_replicas=num_replicas,
            prompts_are_free=free,
            own_executor=own_executor,
            kv_bytes_per_page={
                e: self.page_bytes * budget.page_units[e] / self.units
                for e, pages in budget.capacity_pages.items()
                if pages < UNLIMITED_PAGES
            },
            on_finish=on_finish,
            gives_tokens=gives_tokens,
            step_by_step=settings.step_by_step,
        )
