"""From measurements of the parts of a step to a profile. Arithmetic only, no torch."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from lamina.bench.placements import Placement
from lamina.plan.hardware import Device
from lamina.plan.model import ModelCost
from lamina.plan.profile import (
    AttentionTime,
    Curve,
    HopTime,
    Profile,
    SideBySide,
    SlicesTime,
    Surface,
    thread_device,
)


class Grid(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes to measure at, and how often in a pass."""

    rows: tuple[int, ...]
    """Of slices, all of them yielding logits."""
    prompt_rows: tuple[int, ...]
    """Of slices and of prompts' attention, one of them yielding logits."""
    batches: tuple[int, ...]
    """Of attention."""
    contexts: tuple[int, ...]
    before: tuple[int, ...]
    """Tokens before the rows of a prompt."""
    beside_rows: tuple[int, ...]
    """Of slices while attention runs."""
    beside: tuple[int, int]
    """Batch and context of attention while slices run."""
    engine_rows: tuple[int, ...]
    """Of the engine without weights."""
    steps: int
    engine_tokens: int
    round_trips: int
    """Of messages."""


class Samples:
    """Measurements of the same things, again and again.

    Keys: ("slices" | "hollow", threads, rows), ("attention", threads, workers, batch, context),
    ("prompt", threads, rows, before), ("read", threads), ("hop", transport, bytes),
    ("engine", placement, depth, rows of a micro-batch),
    ("slices beside" | "attention beside", placement, rows).
    """

    def __init__(self) -> None:
        self._values: defaultdict[tuple[Any, ...], list[float]] = defaultdict(list)

    def add(self, key: tuple[Any, ...], values: Iterable[float]) -> None:
        self._values[key] += values

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return bool(self._values.get(key))

    def keys_of(self, what: str) -> list[tuple[Any, ...]]:
        return [key for key in self._values if key[0] == what]

    def median(self, *key: Any) -> float:
        """Of all passes. What was never measured is an error of the caller."""
        return statistics.median(self._values[key])


def least_squares(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The line through the points, neither part of it negative: (value at 0, per size)."""
    mean_x, mean_y = statistics.fmean(sizes), statistics.fmean(values)
    spread = sum((x - mean_x) ** 2 for x in sizes)
    product = sum((x - mean_x) * (y - mean_y) for x, y in zip(sizes, values, strict=True))
    slope = max(0.0, product / spread) if spread else 0.0
    offset = mean_y - slope * mean_x
    if offset < 0:
        return 0.0, max(0.0, mean_y / mean_x)
    return offset, slope


def make_profile(
    samples: Samples,
    model: ModelCost,
    config: dict[str, Any],
    placements: Mapping[str, Placement],
    grid: Grid,
    *,
    ram_bytes: int,
    source: str,
) -> Profile:
    """The profile that the medians of the measurements give.

    Args:
        ram_bytes: of the machine; its devices have equal parts of it per thread.
        source: where and when it was measured, for people.
    """
    threads = sorted({placement.threads for placement in placements.values()})
    all_threads = threads[-1]
    step_s, row_s = _engine_overhead(samples, all_threads, grid)
    hops = tuple(_hop(samples, name) for name in ("shm", "tcp") if ("hop", name, 0) in samples)
    executors = {
        (p.worker_threads or p.threads, max(1, p.workers)): None for p in placements.values()
    }
    return Profile(
        model=model.name,
        config=config,
        devices=tuple(
            _device(samples, model, count, all_threads, grid, ram_bytes, hops, source)
            for count in threads
            if ("read", count) in samples
        ),
        slices=tuple(
            SlicesTime(device=thread_device(count), seconds=_slices(samples, count, grid))
            for count in threads
        ),
        attention=tuple(
            _attention(samples, count, workers, grid, has_prompts=workers == 1)
            for count, workers in executors
        ),
        hops=hops,
        side_by_side=tuple(
            _side_by_side(samples, model, placement, grid, step_s, row_s)
            for placement in placements.values()
            if placement.workers
        ),
        step_overhead_s=step_s,
        row_overhead_s=row_s,
    )


def _engine_overhead(samples: Samples, threads: int, grid: Grid) -> tuple[float, float]:
    """Per step and per row, of the monolithic engine without weights beyond its slices."""
    beyond = [
        samples.median("engine", "monolithic", 1, rows) - samples.median("hollow", threads, rows)
        for rows in grid.engine_rows
    ]
    return least_squares(grid.engine_rows, beyond)


def _device(
    samples: Samples,
    model: ModelCost,
    threads: int,
    all_threads: int,
    grid: Grid,
    ram_bytes: int,
    hops: tuple[HopTime, ...],
    source: str,
) -> Device:
    rows = max(grid.prompt_rows)
    flops = model.slice_flops(rows, 1) / samples.median("slices", threads, rows)
    rates = [hop.bandwidth_bytes_per_s for hop in hops]
    return Device(
        name=thread_device(threads),
        kind="cpu",
        flops={"bf16": flops},
        memory_bytes=ram_bytes * threads // all_threads,
        bandwidth_bytes_per_s=samples.median("read", threads),
        network_bytes_per_s=min(rates, default=1e9),
        source=source,
    )


def _slices(samples: Samples, threads: int, grid: Grid) -> Curve:
    rows = [x for x in (*grid.rows, *grid.prompt_rows) if ("slices", threads, x) in samples]
    return Curve(
        sizes=tuple(map(float, rows)),
        values=tuple(samples.median("slices", threads, x) for x in rows),
    )


def _attention(
    samples: Samples, threads: int, workers: int, grid: Grid, *, has_prompts: bool
) -> AttentionTime:
    prompt = None
    if has_prompts and ("prompt", threads, grid.prompt_rows[0], grid.before[0]) in samples:
        prompt = Surface(
            sizes=(0.0, *map(float, grid.prompt_rows)),
            contexts=tuple(map(float, grid.before)),
            seconds=(
                (0.0,) * len(grid.before),
                *(
                    tuple(samples.median("prompt", threads, rows, x) for x in grid.before)
                    for rows in grid.prompt_rows
                ),
            ),
        )
    return AttentionTime(
        device=thread_device(threads),
        workers=workers,
        decode=Surface(
            sizes=tuple(map(float, grid.batches)),
            contexts=tuple(map(float, grid.contexts)),
            seconds=tuple(
                tuple(
                    samples.median("attention", threads, workers, batch, x) for x in grid.contexts
                )
                for batch in grid.batches
            ),
        ),
        prompt=prompt,
    )


def _hop(samples: Samples, transport: str) -> HopTime:
    """Latency of an empty message; bandwidth of the largest."""
    sizes = sorted(key[2] for key in samples.keys_of("hop") if key[1] == transport)
    latency_s = samples.median("hop", transport, sizes[0])
    largest_s = samples.median("hop", transport, sizes[-1])
    return HopTime(
        transport=transport,
        latency_s=latency_s,
        bandwidth_bytes_per_s=sizes[-1] / max(largest_s - latency_s, 1e-9),
    )


def _side_by_side(
    samples: Samples,
    model: ModelCost,
    placement: Placement,
    grid: Grid,
    step_s: float,
    row_s: float,
) -> SideBySide:
    layers = len(model.layers)
    bytes_per_row = model.hop_bytes_per_row / layers
    hop_s, busy_s = [], []
    for rows in grid.engine_rows:
        rest_s = samples.median("hollow", placement.threads, rows) + step_s + rows * row_s
        alone_s = samples.median("engine", placement.name, 1, rows)
        shared_s = samples.median("engine", placement.name, 2, rows) / 2
        hop_s.append(max(0.0, alone_s - rest_s) / layers)
        busy_s.append(min(hop_s[-1], max(0.0, shared_s - rest_s) / layers))
    sizes = tuple(rows * bytes_per_row for rows in grid.engine_rows)

    def slowdown(what: str) -> Curve:
        rows = [x for x in grid.beside_rows if (what, placement.name, x) in samples]
        return Curve(
            sizes=tuple(map(float, rows)),
            values=tuple(max(1.0, samples.median(what, placement.name, x)) for x in rows),
        )

    return SideBySide(
        model=placement.device,
        attention=placement.worker_device,
        workers=placement.workers,
        slices_slowdown=slowdown("slices beside"),
        attention_slowdown=slowdown("attention beside"),
        hop_s=Curve(sizes=sizes, values=tuple(hop_s)),
        hop_busy_s=Curve(sizes=sizes, values=tuple(busy_s)),
    )
