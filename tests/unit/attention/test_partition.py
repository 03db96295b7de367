"""Shares cover every head of every layer exactly once, or the user learns what to change."""

from __future__ import annotations

import itertools

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
    data=st.data(),
)
def test_ranges_of_units_cover_all_heads_once(
    units: int, factors: list[int], group_size: int, data: st.DataObject
) -> None:
    specs = make_specs(*(units * factor for factor in factors), group_size=group_size)
    units = head_units(specs)
    cuts = data.draw(st.sets(st.integers(1, max(1, units - 1))))
    bounds = sorted({0, *(cut for cut in cuts if cut < units), units})
    ranges = list(itertools.pairwise(bounds))
    for spec in specs:
        kv = [kv_head_range(spec, *r, units) for r in ranges]
        query = [query_head_range(spec, *r, units) for r in ranges]
        assert [h for r in kv for h in range(*r)] == list(range(spec.num_kv_heads))
        assert [h for r in query for h in range(*r)] == list(range(spec.num_query_heads))
    for unit_start, unit_stop in ranges:
        for whole, shard in zip(
            specs, shard_specs(specs, unit_start, unit_stop, units), strict=True
        ):
            kv_start, kv_stop = kv_head_range(whole, unit_start, unit_stop, units)
            assert shard.num_kv_heads == kv_stop - kv_start
            assert shard.group_size == whole.group_size


def test_auto_prefers_heads_and_falls_back_to_requests() -> None:
    specs = make_specs(8, 4)
    two = make_partition(specs, 2, "auto", 8)
    assert (two.mode, two.units, two.page_units, two.spill) == ("heads", 4, 1, True)
    assert make_partition(specs, 3, "auto", 8).mode == "heads", "2, 1 and 1 of 4 units"
    five = make_partition(specs, 5, "auto", 8)
    assert (five.mode, five.page_units) == ("requests", 4)
    assert not make_partition(specs, 4, "requests", 8).spill
    assert make_partition(specs, 5, "tokens", 1).mode == "tokens"
    assert make_partition(specs, 1, "auto", 8).page_units == 4, "one worker has all heads"


def test_no_page_has_heads_of_two_ranks() -> None:
    assert make_partition(make_specs(8, 4), 1, "auto", 8, tensor_parallel_size=2).page_units == 2
    assert make_partition(make_specs(8), 2, "tokens", 8, tensor_parallel_size=4).page_units == 2
    with pytest.raises(ConfigError, match="does not divide the model's 4, 6 KV heads; use 1 or 2"):
        make_partition(make_specs(4, 6), 1, "auto", 8, tensor_parallel_size=3)


def test_more_workers_than_heads_are_refused_with_remedies() -> None:
    with pytest.raises(ConfigError) as error:
        make_partition(make_specs(12, 8), 5, "heads", 64)
    assert "cannot share 8, 12 KV heads over 5 attention workers" in str(error.value)
    assert "use at most 4 of them, or attention_partition=requests or tokens" in str(error.value)


@pytest.mark.parametrize("mode", ["auto", "requests"])
def test_more_workers_than_sequences_are_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match=r"attention_workers=5 is more than can be placed"):
        make_partition(make_specs(4), 5, mode, max_num_seqs=4)  # type: ignore[arg-type]
    assert make_partition(make_specs(4), 4, mode, max_num_seqs=4).units == 4  # type: ignore[arg-type]
