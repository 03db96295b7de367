"""The attention executor: one share of the heads, its KV pages, and the work of each layer.

The same class serves the model worker's own process and every attention worker. It keeps the books
and turns plans into native schedules; the layers run in C++ (`native/attention/`), without it:

    step = executor.begin(plan)
    for each layer:  attend_cached(step, layer, q)      as soon as q is there
                     finish(step, layer, k, v, out)     appends, attends to the new rows, merges

Those two are calls on `executor.native` with addresses. The methods here with tensors do the same,
for tests and direct use. One thread; several steps (micro-batches) may be in progress at once.

Shape letters: A attending rows of the plan, N rows of the plan, R rows, Hq and Hkv this executor's
query and KV heads, Dk and Dv sizes of k and v vectors.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from lamina import _native
from lamina.attention.merge import Partial
from lamina.attention.spec import AttentionSpec
from lamina.errors import ProtocolMismatch
from lamina.kv.pages import PageAllocator, cache_dtype_name, layer_specs
from lamina.types import ExecutorPlan


class AttentionExecutor:
    """Attention over this executor's pages.

    Args:
        specs: one per layer, already of this executor's heads.
        sinks: per layer float32 [Hq], this executor's query heads, or None.
        dtype: of q, k, v and the output.
        num_pages: pages of `page_tokens` tokens over all layers.
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
        kv_cache_dtype: str = "auto",
        pool: _native.ThreadPool | None = None,
        isa: str | None = None,
    ) -> None:
        assert len(specs) == len(sinks), "one entry of sinks per layer"
        self._specs = tuple(specs)
        self._dtype = dtype
        self._pages = PageAllocator(num_pages, page_tokens)
        name = str(dtype).removeprefix("torch.")
        self.native = _native.PagedAttention(
            layer_specs(specs, [None if s is None else s.tolist() for s in sinks]),
            name,
            cache_dtype_name(kv_cache_dtype, name),
            num_pages,
            page_tokens,
            _native.ThreadPool(1) if pool is None else pool,
            isa or "",
        )
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
        return self._pages.sequences

    def length(self, sequence: int) -> int:
        """Tokens stored of a sequence, those of the steps in progress included; 0 if unknown."""
        return self._pages.length(sequence)

    def check_integrity(self) -> list[str]:
        """Everything that is wrong with the page books; empty when they are sound."""
        return self._pages.check_integrity()

    def begin(self, plan: ExecutorPlan) -> _native.StepSchedule:
        """Take up a step: release, truncate, allocate, and decide the work of its layers.

        Replaying a plan, in full or after a step that was given up, leads to the same state.

        Returns:
            What the native calls of this step take. The methods with tensors follow the step that
            was begun last.

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

        tables = [pages.pages(span.sequence) for span in plan.spans]
        assert len({span.sequence for span in plan.spans}) == len(tables), (
            "a sequence has one span per step"
        )
        self._early.clear()
        self._step = self.native.begin(
            array("i", [span.num_rows for span in plan.spans]),
            array("q", [span.context_tokens for span in plan.spans]),
            array("i", [span.attends for span in plan.spans]),
            array("i", [len(table) for table in tables]),
            array("i", [page for table in tables for page in table]),
        )
        return self._step

    def attend_cached(
        self, layer: int, q: Tensor, step: _native.StepSchedule | None = None
    ) -> None:
        """Attend over committed tokens and keep the partial result until `finish`.

        Args:
            layer: index into `specs`.
            q: [A, Hq, Dk]; must stay unchanged until `finish` of this layer returns. May be left
                out if A is 0.
            step: what `begin` returned; the last one if not given.
        """
        step = step or self._current()
        spec = self._specs[layer]
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
            step: what `begin` returned; the last one if not given.

        Returns:
            [A, Hq, Dv] in the dtype of q, k and v, contiguous; the caller's.
        """
        step = step or self._current()
        spec = self._specs[layer]
        k, v = k.to(self._dtype).contiguous(), v.to(self._dtype).contiguous()
        expected = (step.num_rows, spec.num_kv_heads)
        assert k.shape == (*expected, spec.head_dim_k), f"k of layer {layer} is {tuple(k.shape)}"
        assert v.shape == (*expected, spec.head_dim_v), f"v of layer {layer} is {tuple(v.shape)}"
        num_rows = step.num_attending_rows
        assert num_rows == 0 or layer in self._early, (
            f"attend_cached({layer}, q) comes before finish({layer}, ...)"
        )
        out = torch.empty(num_rows, spec.num_query_heads, spec.head_dim_v, dtype=self._dtype)
        self.native.finish(step, layer, k.data_ptr(), v.data_ptr(), out.data_ptr())
        self._early.pop(layer, None)
        return out

    def attend_share(
        self, layer: int, q: Tensor, *, sequence: int, start: int, stop: int, first_position: int
    ) -> Partial:
        """Attend over stored tokens [start, stop) of one sequence only, without sinks.

        Shares of disjoint ranges merge to the whole (`attention.merge`).

        Args:
            q: [R, Hq, Dk], rows at positions first_position, first_position + 1, ...

        Returns:
            out [R, Hq, Dv] and lse [R, Hq], float32; zeros and -inf where nothing takes part.
        """
        assert 0 <= start <= stop <= self.length(sequence), "the range must be stored here"
        spec = self._specs[layer]
        q = q.to(self._dtype).contiguous()
        out = torch.empty(len(q), spec.num_query_heads, spec.head_dim_v)
        lse = torch.empty(len(q), spec.num_query_heads)
        self.native.attend_share(
            layer,
            array("i", self._pages.pages(sequence)),
            start,
            stop,
            first_position,
            len(q),
            q.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
        )
        return Partial(out, lse)

    def _current(self) -> _native.StepSchedule:
        assert self._step is not None, "begin(plan) comes first"
        return self._step
