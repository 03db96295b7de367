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
from lamina.sched.placement import Mode


def head_units(specs: Sequence[AttentionSpec]) -> int:
    """Groups into which the KV heads of all layers divide: their greatest common divisor."""
    return math.gcd(*(spec.num_kv_heads for spec in specs))


class Partition(msgspec.Struct, frozen=True, kw_only=True):
    """How the remote attention workers share the model's attention; `sched.placement` places by
    it."""

    mode: Mode
    """heads: each worker has some heads of every sequence; requests: all heads of some sequences;
    tokens: all heads of some tokens of every sequence."""
    units: int
    """Head units of the model."""
    page_units: int
    """Head units of a page of a worker: 1 where heads are shared out."""
    spill: bool
    """Sequences that are too long for `mode` are shared by tokens."""


def make_partition(
    specs: Sequence[AttentionSpec],
    num_workers: int,
    mode: Literal["auto", "heads", "requests", "tokens"],
    max_num_seqs: int,
    tensor_parallel_size: int = 1,
) -> Partition:
    """Decide how `num_workers` >= 1 workers share the model's attention.

    auto is heads where every worker can have some, else requests; sequences that are too long for
    that are shared by tokens.

    Args:
        tensor_parallel_size: ranks among which the head units are divided; no page has heads of
        two.

    Raises:
        ConfigError: the units do not divide among the ranks; there are fewer units than workers
            (mode heads), or more workers than sequences in a step (mode requests), so that some
            would never have work.
    """
    assert num_workers >= 1, "remote attention has at least one worker"
    units = head_units(specs)
    rank_units = units_per_rank(specs, tensor_parallel_size)
    is_auto = mode == "auto"
    if mode == "auto":
        mode = "heads" if units >= num_workers else "requests"
    if mode == "heads" and units < num_workers:
        kv_heads = ", ".join(str(n) for n in sorted({spec.num_kv_heads for spec in specs}))
        raise ConfigError(
            f"attention_partition=heads cannot share {kv_heads} KV heads over {num_workers} "
            f"attention workers; use at most {units} of them, or attention_partition=requests or "
            "tokens"
        )
    if mode == "requests" and num_workers > max_num_seqs:
        raise ConfigError(
            f"attention_workers={num_workers} is more than can be placed: with partition by "
            f"requests at most max_num_seqs ({max_num_seqs}) of them ever have work; "
            "start fewer workers or raise max_num_seqs"
        )
    return Partition(
        mode=mode,
        units=units,
        page_units=1 if mode == "heads" and num_workers > 1 else rank_units,
        spill=is_auto and num_workers > 1,
    )


def units_per_rank(specs: Sequence[AttentionSpec], tensor_parallel_size: int) -> int:
    """Head units of each tensor-parallel rank; ConfigError if they do not divide."""
    units = head_units(specs)
    if units % tensor_parallel_size:
        possible = [n for n in range(1, units + 1) if units % n == 0]
        kv_heads = ", ".join(str(n) for n in sorted({spec.num_kv_heads for spec in specs}))
        raise ConfigError(
            f"tensor_parallel_size={tensor_parallel_size} does not divide the model's {kv_heads} "
            f"KV heads; use {' or '.join(map(str, possible))}"
        )
    return units // tensor_parallel_size


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
