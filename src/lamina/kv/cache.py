"""The KV cache's memory. The one file that knows how keys and values lie in it.

Layout per layer: k [Hkv, S, Dk] and v [Hkv, S, Dv]. A *slot* is a token's place; page p consists of
the `page_tokens` slots from p * page_tokens on. With the heads outermost, the tokens of consecutive
pages are one strided view per layer: attention reads a contiguous run of any length in place.

Shape letters: Hkv KV heads, S slots, T tokens, D head size (k and v sizes may differ).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.attention.spec import AttentionSpec
from lamina.errors import CapacityError
from lamina.kv.pages import bytes_per_page, contiguous_runs


def slot_runs(pages: Sequence[int], page_tokens: int, start: int, stop: int) -> list[slice]:
    """Slots of a sequence's tokens [start, stop) as contiguous runs, in token order.

    Args:
        pages: the sequence's pages in token order, covering at least `stop` tokens.
    """
    if start >= stop:
        return []
    first_page = start // page_tokens
    last_page = (stop - 1) // page_tokens
    runs = [
        slice(first * page_tokens, (last + 1) * page_tokens)
        for first, last in contiguous_runs(pages[first_page : last_page + 1])
    ]
    # The outermost pages may be used in part only.
    skipped = start - first_page * page_tokens
    runs[0] = slice(runs[0].start + skipped, runs[0].stop)
    unused = (last_page + 1) * page_tokens - stop
    runs[-1] = slice(runs[-1].start, runs[-1].stop - unused)
    return runs


class KVCache:
    """Keys and values of one executor's heads, on the CPU; owned by the executor for its lifetime.

    Memory is reserved on construction and first touched when tokens are written.

    Raises:
        CapacityError: the memory cannot be had; the message says how much was asked for.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        *,
        dtype: torch.dtype,
        num_pages: int,
        page_tokens: int,
    ) -> None:
        num_slots = num_pages * page_tokens
        try:
            self._k = [
                torch.empty(s.num_kv_heads, num_slots, s.head_dim_k, dtype=dtype) for s in specs
            ]
            self._v = [
                torch.empty(s.num_kv_heads, num_slots, s.head_dim_v, dtype=dtype) for s in specs
            ]
        except (RuntimeError, MemoryError) as error:
            size_gib = num_pages * bytes_per_page(specs, page_tokens, dtype.itemsize) / 2**30
            raise CapacityError(
                f"cannot allocate {size_gib:.2f} GiB for the KV cache ({num_pages} pages of "
                f"{page_tokens} tokens); give this executor less attention memory"
            ) from error

    def append(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write tokens.

        Args:
            slots: int64 [T], where each token goes.
            k, v: [T, Hkv, D], of any float dtype; copied before the call returns.
        """
        self._k[layer][:, slots] = k.transpose(0, 1).to(self._k[layer].dtype)
        self._v[layer][:, slots] = v.transpose(0, 1).to(self._v[layer].dtype)

    def read(self, layer: int, slots: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [Hkv, T, D] in the cache's dtype: a view for a slice, else a copy.

        Slots that were never written hold arbitrary bits: ask only for tokens that exist.
        """
        if isinstance(slots, slice):
            return self._k[layer][:, slots], self._v[layer][:, slots]
        return self._k[layer].index_select(1, slots), self._v[layer].index_select(1, slots)
