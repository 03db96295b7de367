"""What "auto" means: from config, model and machine to page counts, lengths and threads. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lamina.attention.partition import Partition, make_partition, shard_specs
from lamina.attention.spec import AttentionSpec
from lamina.config import EngineConfig
from lamina.errors import CapacityError, ConfigError
from lamina.kv.pages import bytes_per_page
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
    partition: Partition | None
    """How remote executors share the attention; None when there are none."""
    num_pages: dict[int, int]
    """Pages of each executor, LOCAL included."""
    num_threads: int
    worker_num_threads: int
    worker_cores: dict[int, tuple[int, ...]]
    """Cores that each remote executor is kept to; empty: any."""

    @property
    def remote(self) -> tuple[int, ...]:
        return tuple(sorted(e for e in self.num_pages if e != LOCAL))

    @property
    def by_requests(self) -> bool:
        return self.partition is not None and self.partition.mode == "requests"

    def describe(self) -> str:
        """One line for people."""
        if self.partition is None:
            return "local, in the model worker's process"
        count = len(self.remote)
        return f"{count} worker{'s' if count > 1 else ''}, partitioned by {self.partition.mode}"


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
    page = config.block_size
    full_pages = ceil_div(wanted_len, page)
    specs = tuple(specs)
    if config.attention == "local":
        memory = _asked(config, machine, 1) or config.local_memory_bytes
        num_pages = {
            LOCAL: _pages(
                memory, bytes_per_page(specs, page, cache_dtype), config.max_num_seqs * full_pages,
                machine.ram_bytes // _RAM_SHARE, "attention memory",
            )
        }  # fmt: skip
        partition = None
    else:
        workers = config.attention_workers
        partition = make_partition(
            specs, len(workers), config.attention_partition, config.max_num_seqs
        )
        # Prompts in progress: one of full length, and whatever short ones share a step with it.
        local_pages = full_pages + ceil_div(config.max_num_batched_tokens, page)
        num_pages = {
            LOCAL: _pages(
                config.local_memory_bytes, bytes_per_page(specs, page, cache_dtype), local_pages,
                machine.ram_bytes // _RAM_SHARE, "local memory",
            )
        }  # fmt: skip
        for index, worker in enumerate(workers):
            share = shard_specs(specs, *partition.ranges[index], partition.units)
            num_pages[index + 1] = _pages(
                worker.memory_bytes or _asked(config, machine, len(workers)),
                bytes_per_page(share, page, cache_dtype),
                config.max_num_seqs * full_pages,
                machine.ram_bytes // _RAM_SHARE // len(workers),
                f"memory of attention worker {index + 1}",
            )
    max_model_len = _model_len(config, wanted_len, num_pages, partition)
    num_workers = len(num_pages) - 1
    num_worker_cores = len(config.worker_cores or machine.cores)
    worker_num_threads = config.worker_num_threads or max(
        1, num_worker_cores // max(1, num_workers)
    )
    return Deployment(
        max_model_len=max_model_len,
        partition=partition,
        num_pages=num_pages,
        num_threads=config.num_threads or len(config.model_cores or machine.cores),
        worker_num_threads=worker_num_threads,
        worker_cores=_deal_cores(config.worker_cores, num_workers, worker_num_threads),
    )


def _check_cores(config: EngineConfig, machine: Machine) -> None:
    for field in ("model_cores", "worker_cores"):
        unknown = sorted(set(getattr(config, field)) - set(machine.cores))
        if unknown:
            raise ConfigError(
                f"{field} names cores {', '.join(map(str, unknown))}, which this process may not "
                f"use; it may use {', '.join(map(str, machine.cores))}"
            )


def _deal_cores(
    cores: tuple[int, ...], num_workers: int, num_threads: int
) -> dict[int, tuple[int, ...]]:
    """A core for every thread while there are enough, otherwise all cores for every worker."""
    enough = len(cores) >= num_workers * num_threads
    return {
        index + 1: cores[index * num_threads : (index + 1) * num_threads] if enough else cores
        for index in range(num_workers)
    }


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


def _model_len(
    config: EngineConfig, wanted: int, num_pages: dict[int, int], partition: Partition | None
) -> int:
    remote = [pages for executor, pages in num_pages.items() if executor != LOCAL]
    lone = num_pages[LOCAL]
    if partition is not None:
        lone = min(lone, max(remote) if partition.mode == "requests" else min(remote))
    capacity = lone * config.block_size
    if config.max_model_len is not None and capacity < wanted:
        raise CapacityError(
            f"the KV memory holds {capacity} tokens of one sequence, less than max_model_len "
            f"({wanted}); give more memory or set max_model_len to at most {capacity}"
        )
    return min(wanted, capacity)
