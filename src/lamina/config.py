"""Settings, frozen and validated on construction. No torch here.

"auto" and None are resolved into new objects by the code that knows the facts (the model's
config, the machine); a config is never mutated.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from lamina.errors import ConfigError

THREAD_ENVIRONMENT = {"GOMP_SPINCOUNT": "2000"}
"""Defaults for the environment of processes that compute, to be set before torch is imported.

OpenMP threads that are done look for new work for some 20 us, then wait in the kernel. Model worker
and attention workers take turns on the same cores: a thread that spins for milliseconds (the
default) keeps the others from theirs, one that sleeps at once takes as long to wake as its work.
"""

MAX_PIPELINE_DEPTH = 16

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip


def parse_bytes(text: str, field: str) -> int:
    """`8GiB`, `512MiB`, `2e9`, `4G` -> bytes; ConfigError names `field`."""
    match = re.fullmatch(
        r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE
    )
    unit = match.group(2).lower() if match else ""
    if match is None or unit not in _UNITS:
        raise ConfigError(f"{field} must be a size such as 8GiB or 512MiB, got {text!r}")
    return int(float(match.group(1)) * _UNITS[unit])


class AttentionWorkerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One attention worker to start on this machine."""

    device: Literal["cpu"] = "cpu"
    memory_bytes: int | None = None
    """None: `EngineConfig.attention_memory_bytes`."""
    num_threads: int | None = None
    """None: `EngineConfig.worker_num_threads`."""

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise ConfigError(f"attention_workers memory must be positive, got {self.memory_bytes}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"attention_workers threads must be positive, got {self.num_threads}")


def parse_memory(text: str, field: str) -> int | float:
    """`8GiB` -> bytes; `0.5` -> a fraction of the machine's memory (above 0, at most 1)."""
    try:
        fraction = float(text)
    except ValueError:
        return parse_bytes(text, field)
    return fraction if 0.0 < fraction <= 1.0 else parse_bytes(text, field)


def parse_cores(text: str, field: str) -> tuple[int, ...]:
    """`0-3,8` -> (0, 1, 2, 3, 8)."""
    cores: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", part)
        if match is None or int(match.group(2) or match.group(1)) < int(match.group(1)):
            raise ConfigError(f"{field} must be a list of cores such as 0-3,8, got {text!r}")
        cores += range(int(match.group(1)), int(match.group(2) or match.group(1)) + 1)
    return tuple(cores)


def parse_weights(text: str) -> tuple[float, ...]:
    """`2,1` -> (2.0, 1.0)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"attention_weights must be numbers such as 2,1, one per attention worker, got {text!r}"
        ) from None


def parse_count(text: str, field: str) -> int | None:
    """`auto` -> None; `3` -> 3."""
    if text == "auto":
        return None
    if not re.fullmatch(r"\s*[0-9]+\s*", text):
        raise ConfigError(f"{field} must be a number or auto, got {text!r}")
    return int(text)


def parse_attention_workers(text: str) -> tuple[AttentionWorkerConfig, ...]:
    """`2` or `cpu:8GiB,cpu:4GiB:1` (memory, then threads) -> one config per worker.

    Raises:
        ConfigError: it is anything else.
    """
    if re.fullmatch(r"[0-9]+", text.strip()):
        return tuple(AttentionWorkerConfig() for _ in range(int(text)))
    workers = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*cpu(?::([^:]*))?(?::([0-9]+))?\s*", part)
        if match is None:
            raise ConfigError(
                f"attention_workers must be a count or a list such as cpu:8GiB,cpu:4GiB, "
                f"got {text!r}"
            )
        memory, threads = match.groups()
        workers.append(
            AttentionWorkerConfig(
                memory_bytes=parse_bytes(memory, "attention_workers memory") if memory else None,
                num_threads=int(threads) if threads else None,
            )
        )
    return tuple(workers)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything an engine needs to start. Flag names follow vLLM where the meaning is the same."""

    model: str
    """Folder of a Hugging Face checkpoint."""
    load_format: Literal["auto", "dummy"] = "auto"
    """`dummy`: random weights from the config, for benchmarks."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = 0
    max_model_len: int | None = None
    """None: the model's own limit, or what the page budget can hold if that is less."""
    max_num_seqs: int = 64
    """Most sequences that run at once, over all micro-batches."""
    max_num_batched_tokens: int = 512
    """Most rows in one step; longer prompts are computed in chunks."""
    max_num_waiting: int = 1024
    """Most requests that wait; one more is refused (HTTP 429)."""
    block_size: int = 64
    """Tokens per KV page."""
    attention: Literal["local", "remote"] = "remote"
    attention_workers: tuple[AttentionWorkerConfig, ...] = (AttentionWorkerConfig(),)
    attention_partition: Literal["auto", "heads", "requests", "tokens"] = "auto"
    """What attention workers share: the heads of every sequence, sequences, or each sequence's
    tokens. auto: heads where there are enough, else sequences; tokens where nothing else fits."""
    attention_weights: tuple[float, ...] | None = None
    """Share of the work of each attention worker, as ratios. None: as fast as each turns out."""
    pipeline_depth: int | None = None
    """Micro-batches in flight. None: chosen from measured times, and again while running; up to
    one more than replicas (one alone with local attention and one replica)."""
    model_replicas: int = 1
    """Copies of the model that the slices of a micro-batch rotate over, each in its own process."""
    tensor_parallel_size: int = 1
    """Processes that each replica's heads and weights are divided among."""
    profile: str | None = None
    """File from `lamina calibrate`: pipeline depth and weights start from what it measured."""
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    """auto: the model's dtype; int8: about half of bfloat16's bytes, with a scale per token and
    head."""
    transport: Literal["auto", "shm", "tcp"] = "auto"
    """Between model worker and attention workers; auto: shm for workers of this machine."""
    busy_poll_s: float = 2e-3
    """How long a wait for a message looks and yields its core before it sleeps. Longer costs
    processor time while nothing is in flight, shorter costs wake-ups."""
    attention_memory_bytes: int | None = None
    """KV memory of each attention worker (or of all model workers with attention=local).
    None: enough for `max_num_seqs` sequences of the model's length, at most a quarter of RAM."""
    attention_memory_fraction: float | None = None
    """Instead of `attention_memory_bytes`: the share of the machine's memory that all attention
    workers on it have together."""
    local_memory_bytes: int | None = None
    """KV memory of all model workers for prompts in progress. None: one full-length prompt."""
    early_q: bool = True
    """Send q before k and v are computed."""
    defer: bool = True
    """Send k and v before the rest of the slice is computed. Off: to measure what that gains."""
    num_threads: int | None = None
    """Threads of each model worker. None: an equal part of the cores."""
    worker_num_threads: int | None = None
    """Threads of each attention worker. None: an equal part of the cores."""
    model_cores: tuple[int, ...] = ()
    """Cores that the model workers are kept to, one per thread while there are enough; empty:
    any."""
    worker_cores: tuple[int, ...] = ()
    """Cores for the attention workers, dealt out in order, `worker_num_threads` each while there
    are enough; empty: all that this process may use."""
    compile: bool = False
    """Compile the slices with Inductor: takes a while at start-up."""
    trace: str | None = None
    """File for a timeline of all steps, as Perfetto opens it."""
    step_deadline_s: float = 60.0
    """Longest wait for one answer of an attention worker that still sends heartbeats."""
    heartbeat_interval_s: float = 0.25
    heartbeat_timeout_s: float = 1.5
    """A worker silent for this long is lost."""
    startup_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        def need(ok: bool, field: str, want: str) -> None:
            if not ok:
                raise ConfigError(f"{field} must be {want}, got {getattr(self, field)}")

        need(self.busy_poll_s >= 0, "busy_poll_s", "at least 0")
        need(
            self.pipeline_depth is None or 1 <= self.pipeline_depth <= MAX_PIPELINE_DEPTH,
            "pipeline_depth",
            f"between 1 and {MAX_PIPELINE_DEPTH}",
        )
        need(
            1 <= self.model_replicas <= MAX_PIPELINE_DEPTH,
            "model_replicas",
            f"between 1 and {MAX_PIPELINE_DEPTH}",
        )
        need(self.tensor_parallel_size >= 1, "tensor_parallel_size", "at least 1")
        if self.pipeline_depth is not None and self.pipeline_depth < self.model_replicas:
            raise ConfigError(
                f"pipeline_depth ({self.pipeline_depth}) must be at least model_replicas "
                f"({self.model_replicas}): a replica without a micro-batch has nothing to do"
            )
        if self.pipeline_depth is not None and self.pipeline_depth > self.max_num_seqs:
            raise ConfigError(
                f"pipeline_depth ({self.pipeline_depth}) must be at most max_num_seqs "
                f"({self.max_num_seqs}): a micro-batch without a sequence has nothing to do"
            )
        weights = self.attention_weights
        if weights is not None:
            need(all(w > 0 for w in weights), "attention_weights", "positive")
            need(
                len(weights) == len(self.attention_workers),
                "attention_weights",
                f"one per attention worker ({len(self.attention_workers)})",
            )
        share = self.attention_memory_fraction
        need(share is None or 0.0 < share <= 1.0, "attention_memory_fraction", "in (0, 1]")
        if share is not None and self.attention_memory_bytes is not None:
            raise ConfigError(
                "attention_memory_fraction and attention_memory_bytes are both set; give one"
            )
        for field in ("max_num_seqs", "max_num_batched_tokens", "max_num_waiting", "block_size"):
            need(getattr(self, field) >= 1, field, "at least 1")
        need(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            f"at least max_num_seqs ({self.max_num_seqs})",
        )
        for field in ("max_model_len", "num_threads", "worker_num_threads",
                      "attention_memory_bytes", "local_memory_bytes"):  # fmt: skip
            value = getattr(self, field)
            need(value is None or value >= 1, field, "at least 1")
        for field in (
            "step_deadline_s",
            "heartbeat_interval_s",
            "heartbeat_timeout_s",
            "startup_timeout_s",
        ):
            need(getattr(self, field) > 0, field, "positive")
        need(
            self.heartbeat_timeout_s >= 3 * self.heartbeat_interval_s,
            "heartbeat_timeout_s",
            f"at least three heartbeat intervals ({3 * self.heartbeat_interval_s})",
        )
        if self.attention == "remote" and not self.attention_workers:
            raise ConfigError(
                "attention_workers must be at least 1 with attention=remote; "
                "use attention=local for one process"
            )
