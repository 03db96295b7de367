"""Where the processes of a deployment compute on one machine, and what such devices are called.

A *device* of a CPU machine is a number of its cores: `cpu-2` is two threads. What is measured is a
model worker on one device, and attention workers beside it on the same cores or on others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from lamina.config import AttentionWorkerConfig, EngineConfig
from lamina.plan.profile import thread_device


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Threads and cores of a model worker and its attention workers; no cores: any."""

    name: str
    threads: int
    cores: tuple[int, ...] = ()
    workers: int = 0
    """0: monolithic."""
    worker_threads: int = 0
    worker_cores: tuple[int, ...] = ()

    @property
    def device(self) -> str:
        return thread_device(self.threads)

    @property
    def worker_device(self) -> str:
        return thread_device(self.worker_threads)

    def deployment(self, depth: int = 1) -> str:
        """As the planner writes it (`plan.deployment`)."""
        if not self.workers:
            return f"mono:{self.device}"
        return f"dop:{self.device}/{self.workers}x{self.worker_device},depth={depth}"


def placements(cores: Sequence[int]) -> dict[str, Placement]:
    """Those that are measured on a machine with these cores, by name.

    monolithic; shared: one attention worker with all cores beside a model worker with all cores;
    pair: two attention workers with half of the threads each beside it; apart: half of the cores
    for the model worker, the others for the attention worker.
    """
    count = len(cores)
    half = count // 2
    found = [
        Placement(name="monolithic", threads=count),
        Placement(name="shared", threads=count, workers=1, worker_threads=count),
    ]
    if half:
        found += [
            Placement(name="pair", threads=count, workers=2, worker_threads=half),
            Placement(
                name="apart",
                threads=half,
                cores=tuple(cores[:half]),
                workers=1,
                worker_threads=half,
                worker_cores=tuple(cores[half : 2 * half]),
            ),
        ]
    return {placement.name: placement for placement in found}


def placed_config(
    folder: Path, placement: Placement, *, depth: int, batch: int, length: int, rows: int
) -> EngineConfig:
    """An engine with random weights in that placement.

    Args:
        length: most tokens of a sequence.
        rows: most rows of a step.
    """
    remote = bool(placement.workers)
    return EngineConfig(
        model=str(folder),
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=length,
        max_num_seqs=batch,
        max_num_batched_tokens=max(rows, batch),
        attention="remote" if remote else "local",
        attention_workers=(AttentionWorkerConfig(),) * max(1, placement.workers),
        attention_partition="heads" if placement.workers > 1 else "auto",
        attention_weights=(1.0,) * placement.workers or None,
        num_threads=placement.threads,
        model_cores=placement.cores,
        worker_num_threads=placement.worker_threads or None,
        worker_cores=placement.worker_cores,
        pipeline_depth=depth if remote else None,
        heartbeat_timeout_s=20.0,  # a machine that others use as well may be slow, not dead
        startup_timeout_s=600.0,
        step_deadline_s=3600.0,  # steps stay in flight while other deployments have their turns
    )


def hollow(config: dict[str, Any]) -> dict[str, Any]:
    """A model of the same layers and attention with next to no weights: what its steps take is what
    the engine takes, whatever the model."""
    text = config.get("text_config")
    inner: dict[str, Any] = dict(text if isinstance(text, dict) else config)
    heads = int(inner["num_attention_heads"])
    inner.setdefault("head_dim", inner["hidden_size"] // heads)
    inner["hidden_size"] = 4 * heads * -(-64 // (4 * heads))
    for field in ("intermediate_size", "moe_intermediate_size"):
        if field in inner:
            inner[field] = 64
    return config | {"text_config": inner} if isinstance(text, dict) else inner
