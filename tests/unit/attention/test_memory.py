"""The cache's memory: what it takes, and what happens when it cannot be had."""

from __future__ import annotations

import pytest
import torch

from lamina import _native
from lamina.attention.executor import AttentionExecutor
from lamina.errors import CapacityError
from lamina.kv.pages import bytes_per_page
from support.attention import make_spec


def test_more_than_the_machine_has_is_a_capacity_error_with_the_sizes() -> None:
    specs = (make_spec(),)
    page = bytes_per_page(specs, 64, "float32")
    num_pages = 2 * _native.available_memory_bytes() // page
    with pytest.raises(CapacityError, match=r"cannot allocate \d+\.\d\d GiB .* GiB available"):
        AttentionExecutor(specs, (None,), dtype=torch.float32, num_pages=num_pages, page_tokens=64)


def test_int8_takes_about_half_of_bfloat16() -> None:
    specs = (make_spec(head_dim_k=128, head_dim_v=128),)
    ratio = bytes_per_page(specs, 64, "int8") / bytes_per_page(specs, 64, "bfloat16")
    assert ratio == pytest.approx(0.5, abs=0.02)


def test_memory_is_committed_as_it_is_used() -> None:
    before = _native.available_memory_bytes()
    specs = (make_spec(head_dim_k=128, head_dim_v=128),)
    num_pages = before // 2 // bytes_per_page(specs, 64, "float32")
    executor = AttentionExecutor(
        specs, (None,), dtype=torch.float32, num_pages=num_pages, page_tokens=64
    )
    assert executor.num_free_pages == num_pages
    assert before - _native.available_memory_bytes() < before // 4


def test_head_sizes_above_256_are_refused() -> None:
    with pytest.raises(ValueError, match="head sizes go up to 256"):
        bytes_per_page((make_spec(head_dim_k=264),), 64, "float32")
