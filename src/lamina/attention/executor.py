"""The attention executor: the KV pages of its lanes, and the work of each layer.

The same class serves the model worker's own process and every attention worker. It keeps the books
and turns plans into native schedules; the layers run in C++ (`native/attention/`), without it:

    (step,) = executor.begin(plan)
    for each layer:  attend_cached(step, layer, q)      as soon as q is there
                     finish(step, layer, k, v, out)     appends, attends to the new rows, merges

Those two are calls on `executor.native` with addresses. The methods here with tensors do the same,
for tests and direct use. One thread; several steps (micro-batches) may be in progress at once.

A span of a plan is served as lanes of `page_units` head units each (`types.ExecutorPlan`). With
several tensor-parallel ranks a step has a schedule for each, of the lanes whose heads the rank has.

Shape letters: A attending and N stored rows, of all lanes of a schedule, lane by lane; Hq and Hkv
query and KV heads of one lane, Dk and Dv sizes of k and v vectors.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lamina import _native
from lamina.attention.merge import Partial
from lamina.attention.partition import shard_specs
from lamina.attention.spec import AttentionSpec
from lamina.errors import ProtocolMismatch
from lamina.kv.pages import Lane, PageAllocator, cache_dtype_name, lane_name, layer_specs
from lamina.transport.topology import rank_of
from lamina.types import ExecutorPlan, ExecutorSpan

_Part = tuple[Lane, ExecutorSpan]


class AttentionExecutor:
    """Attention over this executor's pages.

    Args:
        specs: one per layer, with all heads.
        sinks: per layer float32, one per query head, or None.
        dtype: of q, k, v and the output.
        num_pages: pages of `page_tokens` tokens of one lane over all layers.
        units: head units of the model.
        page_units: head units of a lane; divides those of every share and rank.
        num_ranks: tensor-parallel ranks of the model worker.
        kv_cache_dtype: `auto` is `dtype`; `int8` takes about half of bfloat16's bytes.
        pool: threads that compute together with the caller; none: the caller alone.
        isa: a level of `_native.available_isas()` to use instead of the process's.

    Raises:
        CapacityError: the machine has less memory available than the pages take.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        sinks: Sequence[Tensor | None],
        *,
        dtype: torch.dtype,
        num_pages: int,
        page_tokens: int,
        units: int = 1,
        page_units: int = 1,
        num_ranks: int = 1,
        kv_cache_dtype: str = "auto",
        pool: _native.ThreadPool | None = None,
        isa: str | None = None,
    ) -> None:
        assert len(specs) == len(sinks), "one entry of sinks per layer"
        assert units % (num_ranks * page_units) == 0, "a lane has heads of one rank only"
        self.specs = tuple(specs)
        self.units = units
        self.num_ranks = num_ranks
        self._page_units = page_units
        self._lane_specs = shard_specs(specs, 0, page_units, units)
        self._dtype = dtype
        self._pages = PageAllocator(num_pages, page_tokens)
        name = str(dtype).removeprefix("torch.")
        self.native = _native.PagedAttention(
            layer_specs(self._lane_specs, [None if s is None else s.tolist() for s in sinks]),
            name,
            cache_dtype_name(kv_cache_dtype, name),
            num_pages,
            page_tokens,
            _native.ThreadPool(1) if pool is None else pool,
            isa or "",
        )
        self._open: list[_OpenStep] = []
        self._step: _native.StepSchedule | None = None
        self._early: dict[int, Tensor] = {}

    @property
    def num_pages(self) -> int:
        return self._pages.num_pages

    @property
    def num_free_pages(self) -> int:
        return self._pages.num_free

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences that have (or may get) pages here."""
        return tuple(dict.fromkeys(sequence for sequence, _ in self._pages.lanes))

    def length(self, sequence: int, unit: int = 0) -> int:
        """Tokens stored of a sequence's lane, those of steps in progress included; 0 if unknown.

        Args:
            unit: the lane's first head unit.
        """
        return self._pages.length((sequence, unit))

    def check_integrity(self) -> list[str]:
        """Everything that is wrong with the page books; empty when they are sound."""
        return self._pages.check_integrity()

    def begin(self, plan: ExecutorPlan) -> tuple[_native.StepSchedule, ...]:
        """Take up a step: release, truncate, allocate, and decide the work of its layers.

        Replaying a plan, in full or after a step that was given up, leads to the same state. Steps
        in progress store nothing more in lanes that this plan releases or truncates; this step
        follows those that are still to store in its other lanes (their k and v may come late, over
        another link than the plan).

        Returns:
            What the native calls of this step take, one per tensor-parallel rank. The methods with
            tensors follow the first of the step that was begun last.

        Raises:
            ProtocolMismatch: the plan builds on tokens that are not here, or does not fit this
                executor's lanes; only releases were done.
            CapacityError: the pages do not suffice; some lanes of the plan may have grown.
        """
        pages = self._pages
        self._open = [step for step in self._open if not step.schedule.is_over]
        for sequence in plan.releases:
            for unit in range(0, self.units, self._page_units):
                self._revoke((sequence, unit))
                pages.release((sequence, unit))
        parts = self._parts(plan)
        truncated = []
        for lane, span in parts:
            length = pages.length(lane)
            if length < span.context_tokens:
                raise ProtocolMismatch(
                    f"the plan of step {plan.step} continues {lane_name(lane)} after "
                    f"{span.context_tokens} tokens, but {length} are stored here; the sequence "
                    "must be computed again from its first token",
                    peer="engine",
                )
            if length > span.context_tokens:
                truncated.append((lane, span))
        # Truncate all before any grows: a replay must not need more pages than the first try.
        for lane, span in truncated:
            self._revoke(lane)
            pages.resize(lane, span.context_tokens)
        for lane, span in parts:
            if span.num_stored:
                pages.resize(lane, span.context_tokens + span.num_stored)
        self._early.clear()
        schedules = tuple(
            self._schedule(of_rank, is_partial=plan.is_partial) for of_rank in self._by_rank(parts)
        )
        self._step = schedules[0]
        return schedules

    def _parts(self, plan: ExecutorPlan) -> list[_Part]:
        """The plan's spans, lane by lane."""
        size = self._page_units
        parts: list[_Part] = []
        for span in plan.spans:
            start, stop = span.unit_start, span.unit_stop
            if start % size or stop % size or not 0 <= start < stop <= self.units:
                raise ProtocolMismatch(
                    f"the plan of step {plan.step} has head units {start} to {stop}, but the lanes "
                    f"here have {size} of {self.units} each; do both sides serve the same model?",
                    peer="engine",
                )
            for unit in range(start, stop, size):
                parts.append(((span.sequence, unit), span))
        assert len({lane for lane, _ in parts}) == len(parts), "a lane has one span per step"
        return parts

    def _by_rank(self, parts: list[_Part]) -> list[list[_Part]]:
        if self.num_ranks == 1:
            return [parts]
        split: list[list[_Part]] = [[] for _ in range(self.num_ranks)]
        for part in parts:
            (_, unit), _ = part
            split[rank_of(unit, self.units, self.num_ranks)].append(part)
        return split

    def _schedule(self, parts: list[_Part], *, is_partial: bool) -> _native.StepSchedule:
        pages = array("i")
        num_pages = array("i", [self._pages.append_pages(lane, pages) for lane, _ in parts])
        schedule = self.native.begin(
            array("i", [span.num_attending for _, span in parts]),
            array("i", [span.num_stored for _, span in parts]),
            array("q", [span.context_tokens for _, span in parts]),
            array("q", [span.first_position for _, span in parts]),
            array("i", [unit // self._page_units for (_, unit), _ in parts]),
            num_pages,
            pages,
            is_partial,
        )
        for step in self._open:
            if any(lane in step.stored for lane, _ in parts):
                schedule.follow(step.schedule)
        stored = {lane: index for index, (lane, span) in enumerate(parts) if span.num_stored}
        if stored:
            self._open.append(_OpenStep(schedule, stored))
        return schedule

    def _revoke(self, lane: Lane) -> None:
        """Let steps in progress leave the lane's pages alone."""
        for step in self._open:
            index = step.stored.pop(lane, None)
            if index is not None:
                step.schedule.revoke(index)

    def attend_cached(
        self, layer: int, q: Tensor, step: _native.StepSchedule | None = None
    ) -> None:
        """Attend over committed tokens and keep the partial result until `finish`.

        Args:
            layer: index into `specs`.
            q: [A, Hq, Dk]; must stay unchanged until `finish` of this layer returns. May be left
                out if A is 0.
            step: one that `begin` returned; the last step's first if not given.
        """
        step = step or self._current()
        spec = self._lane_specs[layer]
        expected = (step.num_attending_rows, spec.num_query_heads, spec.head_dim_k)
        assert q.shape == expected, f"q of layer {layer} is {tuple(q.shape)}, not {expected}"
        q = q.to(self._dtype).contiguous()
        self._early[layer] = q
        self.native.attend_cached(step, layer, q.data_ptr())

    def finish(
        self, layer: int, k: Tensor, v: Tensor, step: _native.StepSchedule | None = None
    ) -> Tensor:
        """Append the step's k and v, attend to them, and merge with the cached part and the sinks.

        Args:
            k, v: [N, Hkv, Dk] and [N, Hkv, Dv]; free to reuse when the call returns.
            step: one that `begin` returned, not partial; the last step's first if not given.

        Returns:
            [A, Hq, Dv] in the dtype of q, k and v, contiguous; the caller's.
        """
        step = step or self._current()
        assert not step.is_partial, "finish_partial is for partial plans"
        spec = self._lane_specs[layer]
        shape = (step.num_attending_rows, spec.num_query_heads, spec.head_dim_v)
        out = torch.empty(shape, dtype=self._dtype)
        self._finish(step, layer, k, v, out)
        return out

    def finish_partial(
        self, layer: int, k: Tensor, v: Tensor, step: _native.StepSchedule | None = None
    ) -> Partial:
        """As `finish`, for a partial plan: sinks count only where rows are stored.

        Returns:
            out [A, Hq, Dv] and lse [A, Hq], float32; zeros and -inf where nothing takes part.
        """
        step = step or self._current()
        assert step.is_partial, "finish is for plans that are not partial"
        spec = self._lane_specs[layer]
        rows, heads, dim = step.num_attending_rows, spec.num_query_heads, spec.head_dim_v
        payload = torch.empty(rows * heads * (dim + 1))
        self._finish(step, layer, k, v, payload)
        out, lse = payload[: rows * heads * dim], payload[rows * heads * dim :]
        return Partial(out.view(rows, heads, dim), lse.view(rows, heads))

    def _finish(
        self, step: _native.StepSchedule, layer: int, k: Tensor, v: Tensor, out: Tensor
    ) -> None:
        spec = self._lane_specs[layer]
        k, v = k.to(self._dtype).contiguous(), v.to(self._dtype).contiguous()
        expected = (step.num_stored_rows, spec.num_kv_heads)
        assert k.shape == (*expected, spec.head_dim_k), f"k of layer {layer} is {tuple(k.shape)}"
        assert v.shape == (*expected, spec.head_dim_v), f"v of layer {layer} is {tuple(v.shape)}"
        assert step.num_attending_rows == 0 or layer in self._early, (
            f"attend_cached({layer}, q) comes before finish({layer}, ...)"
        )
        self.native.finish(step, layer, k.data_ptr(), v.data_ptr(), out.data_ptr())
        self._early.pop(layer, None)

    def _current(self) -> _native.StepSchedule:
        assert self._step is not None, "begin(plan) comes first"
        return self._step


class _OpenStep(NamedTuple):
    """A step that may be in progress."""

    schedule: _native.StepSchedule
    stored: dict[Lane, int]
    """The lanes that it stores rows in, by their place in the schedule."""
