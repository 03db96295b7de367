"""Shares cover every head of every layer exactly once, or the user learns what to change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.attention.partition import (
    head_units,
    kv_head_range,
    make_partition,
    query_head_range,
    shard_specs,
)
from lamina.attention.spec import AttentionSpec
from lamina.errors import ConfigError


def make_specs(*kv_heads: int, group_size: int = 2) -> tuple[AttentionSpec, ...]:
    return tuple(
        AttentionSpec(
            layer=layer,
            num_query_heads=heads * group_size,
            num_kv_heads=heads,
            head_dim_k=8,
            head_dim_v=8,
            scale=1.0,
        )
        for layer, heads in enumerate(kv_heads)
    )


def test_head_units_divide_every_layer() -> None:
    assert head_units(make_specs(8, 8)) == 8
    assert head_units(make_specs(12, 8)) == 4
    assert head_units(make_specs(1, 8)) == 1


@given(
    units=st.integers(1, 6),
    factors=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    group_size=st.integers(1, 4),
    num_workers=st.integers(1, 8),
    mode=st.sampled_from(["auto", "heads", "requests"]),
)
def test_shares_cover_all_heads_once(
    units: int, factors: list[int], group_size: int, num_workers: int, mode: str
) -> None:
    specs = make_specs(*(units * factor for factor in factors), group_size=group_size)
    if mode == "heads" and head_units(specs) % num_workers:
        with pytest.raises(ConfigError, match="attention_partition=heads"):
            make_partition(specs, num_workers, "heads", max_num_seqs=64)
        return
    partition = make_partition(specs, num_workers, mode, max_num_seqs=64)  # type: ignore[arg-type]
    assert len(partition.ranges) == num_workers
    if partition.mode == "requests":
        assert set(partition.ranges) == {(0, partition.units)}
        assert shard_specs(specs, 0, partition.units, partition.units) == specs
        return
    for spec in specs:
        kv = [kv_head_range(spec, *r, partition.units) for r in partition.ranges]
        query = [query_head_range(spec, *r, partition.units) for r in partition.ranges]
        assert [h for r in kv for h in range(*r)] == list(range(spec.num_kv_heads))
        assert [h for r in query for h in range(*r)] == list(range(spec.num_query_heads))
    for unit_start, unit_stop in partition.ranges:
        for whole, shard in zip(
            specs, shard_specs(specs, unit_start, unit_stop, partition.units), strict=True
        ):
            kv_start, kv_stop = kv_head_range(whole, unit_start, unit_stop, partition.units)
            assert shard.num_kv_heads == kv_stop - kv_start
            assert shard.group_size == whole.group_size


def test_auto_prefers_heads_and_falls_back_to_requests() -> None:
    specs = make_specs(8, 4)
    assert make_partition(specs, 2, "auto", 8).mode == "heads"
    assert make_partition(specs, 2, "auto", 8).ranges == ((0, 2), (2, 4))
    assert make_partition(specs, 3, "auto", 8).mode == "requests"
    assert make_partition(specs, 4, "requests", 8).mode == "requests"


def test_heads_that_do_not_divide_are_refused_with_remedies() -> None:
    with pytest.raises(ConfigError) as error:
        make_partition(make_specs(12, 8), 3, "heads", 64)
    assert "cannot share 8, 12 KV heads evenly over 3 attention workers" in str(error.value)
    assert "use 1 or 2 or 4 of them, or attention_partition=requests" in str(error.value)


@pytest.mark.parametrize("mode", ["auto", "requests"])
def test_more_workers_than_sequences_are_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match=r"attention_workers=5 is more than can be placed"):
        make_partition(make_specs(4), 5, mode, max_num_seqs=4)  # type: ignore[arg-type]
    assert make_partition(make_specs(4), 4, mode, max_num_seqs=4).units == 4  # type: ignore[arg-type]
