"""What "auto" means: from config, model and machine to page counts, lengths and threads. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import msgspec

from lamina.attention.partition import (
    Partition,
    head_units,
    make_partition,
    shard_specs,
    units_per_rank,
)
from lamina.attention.spec import AttentionSpec
from lamina.config import MAX_PIPELINE_DEPTH, EngineConfig
from lamina.errors import CapacityError, ConfigError
from lamina.kv.pages import bytes_per_page
from lamina.sched.budget import PageBudget
from lamina.sched.placement import Placer
from lamina.types import LOCAL, ceil_div

_DEFAULT_MODEL_LEN = 2048
_RAM_SHARE = 4
"""KV memory that nobody asked for takes at most the machine's RAM divided by this."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about this machine that settings are resolved with."""

    cores: tuple[int, ...]
    """Those that this process may use."""
    ram_bytes: int


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's settings with every "auto" resolved."""

    max_model_len: int
    units: int
    """Head units of the model (`attention.partition`)."""
    partition: Partition | None
    """How remote executors share the attention; None when there are none."""
    num_pages: dict[int, int]
    """Lane pages of each executor; those of LOCAL exist in every model rank."""
    page_units: dict[int, int]
    """Head units of each executor's lanes; those of LOCAL are all of its rank."""
    weights: dict[int, float] | None
    """Shares of the remote executors as ratios; None: as fast as each turns out."""
    block_size: int
    """Tokens per page."""
    max_depth: int
    """Micro-batches that mailboxes exist for; with `pipeline_depth`, those in flight."""
    num_replicas: int
    tensor_parallel_size: int
    num_threads: int
    """Of the model worker: of each rank, where there are several."""
    model_cores: tuple[tuple[int, ...], ...]
    """Cores that each rank is kept to, replica by replica; empty: any."""
    shares_cores: bool
    """Model and attention workers have more threads than there are cores for them."""
    worker_num_threads: dict[int, int]
    """Of each remote executor."""
    worker_cores: dict[int, tuple[int, ...]]
    """Cores that each remote executor is kept to; empty: any."""

    @property
    def remote(self) -> tuple[int, ...]:
        return tuple(sorted(e for e in self.num_pages if e != LOCAL))

    @property
    def num_ranks(self) -> int:
        """Model workers: replicas times tensor-parallel ranks."""
        return self.num_replicas * self.tensor_parallel_size

    def page_budget(self) -> PageBudget:
        """An empty budget. The ranks of a replica count as one local executor with all their pages;
        the replicas' are alike."""
        pages = self.num_pages | {LOCAL: self.num_pages[LOCAL] * self.tensor_parallel_size}
        return PageBudget(self.block_size, pages, self.page_units)

    def placer(self, budget: PageBudget) -> Placer:
        """Places sequences within a budget of this deployment."""
        if self.partition is None:
            return Placer(budget, self.units, "requests")
        return Placer(
            budget,
            self.units,
            self.partition.mode,
            spill=self.partition.spill,
            weights=self.weights,
        )

    def describe(self) -> str:
        """One line for people."""
        if self.partition is None:
            text = "local, in the model worker's process"
        else:
            count = len(self.remote)
            text = f"{count} worker{'s' if count > 1 else ''}, partitioned by {self.partition.mode}"
        if self.num_ranks > 1:
            ranks = f"{self.num_replicas} x {self.tensor_parallel_size}"
            text += f"; {ranks} model ranks (replicas x tensor parallel)"
        return text


def resolve(
    config: EngineConfig,
    specs: Sequence[AttentionSpec],
    cache_dtype: str,
    model_limit: int | None,
    machine: Machine,
) -> Deployment:
    """Resolve every setting that depends on the model or the machine.

    Args:
        cache_dtype: float32, float16, bfloat16 or int8.
        model_limit: the model's own context length, if it has one.

    Raises:
        ConfigError: settings that contradict the model.
        CapacityError: the KV memory cannot hold what was asked for; says how much would.
    """
    _check_cores(config, machine)
    limit = model_limit or config.max_model_len or _DEFAULT_MODEL_LEN
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len must be at most the model's own context length {limit}, "
            f"got {config.max_model_len}"
        )
    wanted_len = config.max_model_len or limit
    specs = tuple(specs)
    tensor_parallel_size = config.tensor_parallel_size
    num_ranks = config.model_replicas * tensor_parallel_size
    partition = None
    if config.attention == "remote":
        partition = make_partition(
            specs,
            len(config.attention_workers),
            config.attention_partition,
            config.max_num_seqs,
            tensor_parallel_size,
        )
    num_pages, page_units = _count_pages(config, specs, cache_dtype, wanted_len, machine, partition)
    worker_num_threads = _worker_num_threads(config, machine)
    deployment = Deployment(
        max_model_len=wanted_len,
        units=head_units(specs),
        partition=partition,
        num_pages=num_pages,
        page_units=page_units,
        weights=_weights(config),
        block_size=config.block_size,
        max_depth=_max_depth(config),
        num_replicas=config.model_replicas,
        tensor_parallel_size=tensor_parallel_size,
        num_threads=config.num_threads
        or max(1, len(config.model_cores or machine.cores) // num_ranks),
        model_cores=(),
        shares_cores=False,
        worker_num_threads=worker_num_threads,
        worker_cores=dict(
            zip(
                worker_num_threads,
                _deal_cores(config.worker_cores, list(worker_num_threads.values())),
                strict=True,
            )
        ),
    )
    ranks_cores = _deal_cores(config.model_cores, [deployment.num_threads] * num_ranks)
    return msgspec.structs.replace(
        deployment,
        max_model_len=_model_len(config, deployment),
        model_cores=tuple(ranks_cores),
        shares_cores=_share_cores(deployment, ranks_cores, machine),
    )


def _count_pages(
    config: EngineConfig,
    specs: tuple[AttentionSpec, ...],
    cache_dtype: str,
    wanted_len: int,
    machine: Machine,
    partition: Partition | None,
) -> tuple[dict[int, int], dict[int, int]]:
    """Lane pages of every executor, from memory, and their head units."""
    page = config.block_size
    units = head_units(specs)
    rank_units = units_per_rank(specs, config.tensor_parallel_size)
    num_ranks = config.model_replicas * config.tensor_parallel_size
    full_pages = ceil_div(wanted_len, page)
    ram_bytes = machine.ram_bytes // _RAM_SHARE

    def lane_bytes(lane_units: int) -> int:
        return bytes_per_page(shard_specs(specs, 0, lane_units, units), page, cache_dtype)

    memory, what = config.local_memory_bytes, "local memory"
    # Prompts in progress: one of full length, and whatever short ones share a step with it.
    useful = full_pages + ceil_div(config.max_num_batched_tokens, page)
    if partition is None:
        memory, what = _asked(config, machine, 1) or memory, "attention memory"
        useful = config.max_num_seqs * full_pages
    page_units = {LOCAL: rank_units}
    num_pages = {
        LOCAL: _pages(
            None if memory is None else memory // num_ranks,
            lane_bytes(rank_units),
            useful,
            ram_bytes // num_ranks,
            what,
        )
    }
    if partition is not None:
        workers = config.attention_workers
        # Weights may give a worker more than an equal share of the heads or tokens: up to twice.
        share = 1.0 if partition.mode == "requests" else min(1.0, 2 / len(workers))
        lanes = units // partition.page_units
        for index, worker in enumerate(workers):
            page_units[index + 1] = partition.page_units
            num_pages[index + 1] = _pages(
                worker.memory_bytes or _asked(config, machine, len(workers)),
                lane_bytes(partition.page_units),
                math.ceil(share * lanes * config.max_num_seqs * full_pages),
                ram_bytes // len(workers),
                f"memory of attention worker {index + 1}",
            )
    return num_pages, page_units


def _max_depth(config: EngineConfig) -> int:
    """Micro-batches to prepare for.

    Unless given: one more than replicas hides attention on other devices behind the replicas' work
    (`sched/rotation.py`), and the hops between replicas where attention is local; `sched/depth.py`
    decides how many of them are used. With one process there is nothing to hide.
    """
    if config.pipeline_depth is not None:
        return config.pipeline_depth
    if config.attention == "local" and config.model_replicas == 1:
        return 1
    return min(config.model_replicas + 1, MAX_PIPELINE_DEPTH)


def _weights(config: EngineConfig) -> dict[int, float] | None:
    if config.attention_weights is None or config.attention == "local":
        return None
    return dict(enumerate(config.attention_weights, start=1))


def _worker_num_threads(config: EngineConfig, machine: Machine) -> dict[int, int]:
    """Of each attention worker: its own setting, that of all, or an equal part of the cores."""
    if config.attention == "local":
        return {}
    workers = config.attention_workers
    share = max(1, len(config.worker_cores or machine.cores) // len(workers))
    return {
        index + 1: worker.num_threads or config.worker_num_threads or share
        for index, worker in enumerate(workers)
    }


def _share_cores(
    deployment: Deployment, ranks_cores: Sequence[tuple[int, ...]], machine: Machine
) -> bool:
    """Whether model and attention workers compute in each other's way."""
    model = {core for cores in ranks_cores for core in cores}
    attention = {core for cores in deployment.worker_cores.values() for core in cores}
    if model and attention:
        return bool(model & attention)
    num_threads = deployment.num_ranks * deployment.num_threads
    return num_threads + sum(deployment.worker_num_threads.values()) > len(machine.cores)


def _check_cores(config: EngineConfig, machine: Machine) -> None:
    for field in ("model_cores", "worker_cores"):
        unknown = sorted(set(getattr(config, field)) - set(machine.cores))
        if unknown:
            raise ConfigError(
                f"{field} names cores {', '.join(map(str, unknown))}, which this process may not "
                f"use; it may use {', '.join(map(str, machine.cores))}"
            )


def _deal_cores(cores: tuple[int, ...], num_threads: Sequence[int]) -> list[tuple[int, ...]]:
    """A core for every thread of every process while there are enough, otherwise all for each."""
    if len(cores) < sum(num_threads):
        return [cores] * len(num_threads)
    starts = [0, *itertools.accumulate(num_threads)]
    return [cores[start:stop] for start, stop in itertools.pairwise(starts)]


def _asked(config: EngineConfig, machine: Machine, num_workers: int) -> int | None:
    """KV memory in bytes that the settings give to each of the attention workers."""
    if config.attention_memory_fraction is None:
        return config.attention_memory_bytes
    return int(config.attention_memory_fraction * machine.ram_bytes / num_workers)


def _pages(asked: int | None, page_bytes: int, useful: int, default_limit: int, what: str) -> int:
    """Pages that fit into the memory asked for, or as many as are useful within the limit."""
    if asked is None:
        return max(1, min(useful, default_limit // page_bytes))
    if asked < page_bytes:
        raise CapacityError(
            f"{what} of {asked} bytes is too little for one page, which takes {page_bytes} bytes; "
            "give more memory or a smaller block_size"
        )
    return asked // page_bytes


def _model_len(config: EngineConfig, deployment: Deployment) -> int:
    """The length that was wanted, or what the pages hold of one sequence if none was asked for."""
    capacity = deployment.placer(deployment.page_budget()).max_tokens
    wanted = deployment.max_model_len
    if config.max_model_len is not None and capacity < wanted:
        local = deployment.num_pages[LOCAL] * deployment.block_size
        memory = "local memory (prompts are computed there)" if local <= capacity else "memory"
        if deployment.partition is None:
            memory = "attention memory"
        raise CapacityError(
            f"the KV memory holds {capacity} tokens of one sequence, less than max_model_len "
            f"({wanted}); give more {memory} or set max_model_len to at most {capacity}"
        )
    return min(wanted, capacity)
