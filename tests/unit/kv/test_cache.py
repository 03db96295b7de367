"""The cache gives back the tokens that were put in, wherever their pages lie."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.attention.spec import AttentionSpec
from lamina.errors import CapacityError
from lamina.kv.cache import KVCache, slot_runs

SPECS = tuple(
    AttentionSpec(
        layer=layer,
        num_query_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim_k=6,
        head_dim_v=head_dim_v,
        scale=1.0,
    )
    for layer, (num_kv_heads, head_dim_v) in enumerate([(2, 6), (4, 3)])
)


@given(
    pages=st.permutations(range(8)),
    page_tokens=st.integers(1, 5),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_slot_runs_list_the_slots_in_token_order(
    pages: list[int], page_tokens: int, bounds: tuple[float, float]
) -> None:
    start, stop = sorted(round(bound * len(pages) * page_tokens) for bound in bounds)
    runs = slot_runs(pages, page_tokens, start, stop)
    slots = [slot for run in runs for slot in range(run.start, run.stop)]
    assert slots == [
        pages[token // page_tokens] * page_tokens + token % page_tokens
        for token in range(start, stop)
    ]
    gaps = [left.stop != right.start for left, right in itertools.pairwise(runs)]
    assert all(gaps), "runs that touch are one run"


@pytest.mark.parametrize("layer", [0, 1])
def test_tokens_come_back_from_scattered_slots_and_from_a_run(layer: int) -> None:
    spec = SPECS[layer]
    cache = KVCache(SPECS, dtype=torch.bfloat16, num_pages=4, page_tokens=4)
    slots = torch.tensor([14, 4, 5, 6, 2])
    k = torch.randn(5, spec.num_kv_heads, spec.head_dim_k)
    v = torch.randn(5, spec.num_kv_heads, spec.head_dim_v)
    cache.append(layer, slots, k, v)

    k_read, v_read = cache.read(layer, slots)
    torch.testing.assert_close(k_read.transpose(0, 1), k.bfloat16(), atol=0, rtol=0)
    torch.testing.assert_close(v_read.transpose(0, 1), v.bfloat16(), atol=0, rtol=0)
    k_run, v_run = cache.read(layer, slice(4, 7))
    torch.testing.assert_close(k_run, k_read[:, 1:4], atol=0, rtol=0)
    torch.testing.assert_close(v_run, v_read[:, 1:4], atol=0, rtol=0)
    assert k_run.data_ptr() == cache.read(layer, slice(4, 5))[0].data_ptr(), "a run is not copied"


def test_memory_that_cannot_be_had_is_a_capacity_error_with_the_size() -> None:
    num_pages = 2**42 // 64
    with pytest.raises(CapacityError, match=r"cannot allocate \d+\.\d\d GiB .* less attention mem"):
        KVCache(SPECS, dtype=torch.float32, num_pages=num_pages, page_tokens=64)
