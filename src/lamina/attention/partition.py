"""Which attention worker computes which share. Pure arithmetic, no torch.

Layers may differ in their number of KV heads. Shares are therefore counted in *head units*: the
largest number of equal groups into which every layer's KV heads divide. A worker that has units
[start, stop) of u has, in a layer with h KV heads, the heads [start * h / u, stop * h / u) and the
query heads that read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from lamina.attention.spec import AttentionSpec
from lamina.errors import ConfigError


def head_units(specs: Sequence[AttentionSpec]) -> int:
    """Groups into which the KV heads of all layers divide: their greatest common divisor."""
    return math.gcd(*(spec.num_kv_heads for spec in specs))


class Partition(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of all remote attention workers, in the order of their executor ids."""

    mode: Literal["heads", "requests"]
    """heads: each worker has its heads of every sequence; requests: all heads of some sequences."""
    units: int
    """Head units of the model."""
    ranges: tuple[tuple[int, int], ...]
    """Per worker its head units [start, stop); with requests every worker has all of them."""


def make_partition(
    specs: Sequence[AttentionSpec],
    num_workers: int,
    mode: Literal["auto", "heads", "requests"],
    max_num_seqs: int,
) -> Partition:
    """Share the model's attention out over `num_workers` >= 1 workers.

    auto is heads where the KV heads divide evenly, else requests.

    Raises:
        ConfigError: the KV heads do not divide (mode heads), or there are more workers than
            sequences in a step (mode requests), so that some would never have work.
    """
    assert num_workers >= 1, "remote attention has at least one worker"
    units = head_units(specs)
    divides = units % num_workers == 0
    if mode == "heads" and not divides:
        possible = [n for n in range(1, units + 1) if units % n == 0]
        kv_heads = ", ".join(str(n) for n in sorted({spec.num_kv_heads for spec in specs}))
        raise ConfigError(
            f"attention_partition=heads cannot share {kv_heads} KV heads evenly over {num_workers} "
            f"attention workers; use {' or '.join(map(str, possible))} of them, "
            "or attention_partition=requests"
        )
    if mode == "heads" or (mode == "auto" and divides):
        size = units // num_workers
        ranges = tuple((i * size, (i + 1) * size) for i in range(num_workers))
        return Partition(mode="heads", units=units, ranges=ranges)
    if num_workers > max_num_seqs:
        raise ConfigError(
            f"attention_workers={num_workers} is more than can be placed: with partition by "
            f"requests at most max_num_seqs ({max_num_seqs}) of them ever have work; "
            "start fewer workers or raise max_num_seqs"
        )
    return Partition(mode="requests", units=units, ranges=((0, units),) * num_workers)


def kv_head_range(
    spec: AttentionSpec, unit_start: int, unit_stop: int, units: int
) -> tuple[int, int]:
    """KV heads [start, stop) of a layer that belong to head units [unit_start, unit_stop)."""
    assert 0 <= unit_start < unit_stop <= units, "a share is a range of the model's head units"
    assert spec.num_kv_heads % units == 0, "every layer's KV heads divide into the head units"
    heads = spec.num_kv_heads // units
    return unit_start * heads, unit_stop * heads


def query_head_range(
    spec: AttentionSpec, unit_start: int, unit_stop: int, units: int
) -> tuple[int, int]:
    """Query heads [start, stop) of a layer that read the KV heads of these head units."""
    start, stop = kv_head_range(spec, unit_start, unit_stop, units)
    return start * spec.group_size, stop * spec.group_size


def shard_specs(
    specs: Sequence[AttentionSpec], unit_start: int, unit_stop: int, units: int
) -> tuple[AttentionSpec, ...]:
    """All layers' specs for the heads of units [unit_start, unit_stop)."""
    return tuple(spec.shard(*kv_head_range(spec, unit_start, unit_stop, units)) for spec in specs)
