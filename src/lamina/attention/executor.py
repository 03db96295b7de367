"""The attention executor: one share of the heads, its KV pages, and the work of each layer.

The same class serves the model worker's own process and every attention worker. The order of calls
in a step is

    begin(plan)
    for each layer:  attend_cached(layer, q)      as soon as q is there
                     finish(layer, k, v)          appends, attends among the new rows, merges

One step at a time, one thread. The plan comes once; the per-layer calls carry tensors only.

Shape letters: A attending rows of the plan, N rows of the plan, Hq and Hkv this executor's query
and KV heads, Dk and Dv sizes of k and v vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.attention.merge import Partial, add_sinks
from lamina.attention.paged import (
    Schedule,
    attend_cached,
    attend_new,
    make_schedule,
    slot_indices,
    uses_flash,
)
from lamina.attention.spec import AttentionSpec
from lamina.errors import ProtocolMismatch
from lamina.kv.cache import KVCache
from lamina.kv.pages import PageAllocator
from lamina.types import ExecutorPlan


class AttentionExecutor:
    """Attention over this executor's pages.

    Args:
        specs: one per layer, already of this executor's heads.
        sinks: per layer float32 [Hq], this executor's query heads, or None.
        dtype: of the cache, and of q, k, v and the output.
        num_pages: pages of `page_tokens` tokens over all layers.

    Raises:
        CapacityError: the cache's memory cannot be had.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        sinks: Sequence[Tensor | None],
        *,
        dtype: torch.dtype,
        num_pages: int,
        page_tokens: int,
    ) -> None:
        assert len(specs) == len(sinks), "one entry of sinks per layer"
        self._specs = tuple(specs)
        self._sinks = tuple(sinks)
        self._dtype = dtype
        self._pages = PageAllocator(num_pages, page_tokens)
        self._cache = KVCache(specs, dtype=dtype, num_pages=num_pages, page_tokens=page_tokens)
        self._schedule_keys = tuple((spec.window, uses_flash(spec)) for spec in specs)
        # Of the step in progress:
        self._num_rows = self._num_attending = 0
        self._schedules: dict[tuple[int | None, bool], Schedule] = {}
        self._new_slots = torch.empty(0, dtype=torch.int64)
        self._early: dict[int, tuple[Tensor, Partial | None]] = {}

    @property
    def num_pages(self) -> int:
        return self._pages.num_pages

    @property
    def num_free_pages(self) -> int:
        return self._pages.num_free

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences that have (or may get) pages here."""
        return self._pages.sequences

    def length(self, sequence: int) -> int:
        """Tokens stored of a sequence, those of the step in progress included; 0 if unknown."""
        return self._pages.length(sequence)

    def check_integrity(self) -> list[str]:
        """Everything that is wrong with the page books; empty when they are sound."""
        return self._pages.check_integrity()

    def begin(self, plan: ExecutorPlan) -> None:
        """Take up a step: release, truncate, allocate, and decide the work of its layers.

        Replaying a plan, in full or after a step that was given up, leads to the same state.

        Raises:
            ProtocolMismatch: the plan builds on tokens that are not here; only releases were done.
            CapacityError: the pages do not suffice; some sequences of the plan may have grown.
        """
        pages = self._pages
        for sequence in plan.releases:
            pages.release(sequence)
        for span in plan.spans:
            if pages.length(span.sequence) < span.context_tokens:
                raise ProtocolMismatch(
                    f"the plan of step {plan.step} continues sequence {span.sequence} after "
                    f"{span.context_tokens} tokens, but {pages.length(span.sequence)} are stored "
                    "here; the sequence must be computed again from its first token",
                    peer="engine",
                )
        # Truncate all before any grows: a replay must not need more pages than the first try.
        for span in plan.spans:
            pages.resize(span.sequence, span.context_tokens)
        for span in plan.spans:
            pages.resize(span.sequence, span.context_tokens + span.num_rows)

        tables = {span.sequence: pages.pages(span.sequence) for span in plan.spans}
        assert len(tables) == len(plan.spans), "a sequence has one span per step"
        self._num_rows, self._num_attending = plan.num_rows, plan.num_attending_rows
        self._early.clear()
        self._new_slots = slot_indices(plan.spans, tables, pages.page_tokens)
        self._schedules = {
            (window, flash): make_schedule(
                plan.spans, tables, pages.page_tokens, window=window, explicit_masks=not flash
            )
            for window, flash in dict.fromkeys(self._schedule_keys)
        }

    @torch.no_grad()
    def attend_cached(self, layer: int, q: Tensor) -> None:
        """Attend over committed tokens and keep the partial result until `finish`.

        Args:
            layer: index into `specs`.
            q: [A, Hq, Dk]; must stay unchanged until `finish` of this layer returns. May be left
                out if A is 0.
        """
        spec = self._specs[layer]
        expected = (self._num_attending, spec.num_query_heads, spec.head_dim_k)
        assert q.shape == expected, f"q of layer {layer} is {tuple(q.shape)}, not {expected}"
        q = q.to(self._dtype)
        schedule = self._schedules[self._schedule_keys[layer]]
        partial = attend_cached(spec, schedule, q, lambda slots: self._cache.read(layer, slots))
        self._early[layer] = (q, partial)

    @torch.no_grad()
    def finish(self, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """Append the step's k and v, attend to them, and merge with the cached part and the sinks.

        Args:
            k, v: [N, Hkv, Dk] and [N, Hkv, Dv]; free to reuse when the call returns.

        Returns:
            [A, Hq, Dv] in the cache's dtype, contiguous; the caller's.
        """
        spec, sinks = self._specs[layer], self._sinks[layer]
        k, v = k.to(self._dtype), v.to(self._dtype)
        expected = (self._num_rows, spec.num_kv_heads)
        assert k.shape == (*expected, spec.head_dim_k), f"k of layer {layer} is {tuple(k.shape)}"
        assert v.shape == (*expected, spec.head_dim_v), f"v of layer {layer} is {tuple(v.shape)}"
        if self._num_rows:
            self._cache.append(layer, self._new_slots, k, v)
        if self._num_attending == 0:
            return torch.empty(0, spec.num_query_heads, spec.head_dim_v, dtype=self._dtype)
        assert layer in self._early, f"attend_cached({layer}, q) comes before finish({layer}, ...)"
        q, cached = self._early.pop(layer)
        whole = attend_new(spec, self._schedules[self._schedule_keys[layer]], q, k, v, cached)
        if sinks is not None:
            whole = add_sinks(whole, sinks)
        return whole.out.to(self._dtype).contiguous()
