"""Routes and outputs: any placement gives the attention of the whole."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina import _native
from lamina.attention.reference import reference_attention
from lamina.attention.spec import AttentionSpec
from lamina.types import LOCAL, Share, Span, StepPlan
from lamina.workers.outputs import Outputs
from lamina.workers.pipeline import executor_parts
from lamina.workers.routes import Route, first_rows, layer_units
from support.executor import PythonExecutor
from support.tolerances import ATTENTION_TOLERANCE

PAGE = 4
UNITS = 6
SPECS = (
    AttentionSpec(
        layer=0, num_query_heads=12, num_kv_heads=6, head_dim_k=8, head_dim_v=4, scale=0.4
    ),
    AttentionSpec(
        layer=1, num_query_heads=24, num_kv_heads=12, head_dim_k=4, head_dim_v=8, scale=0.5,
        window=7,
    ),
)  # fmt: skip


class Cluster:
    """Executors and their ends, steps over them, and every token that was ever stored."""

    def __init__(
        self, num_executors: int, page_units: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.dtype = dtype
        self.executors = [
            PythonExecutor(e, SPECS, page_units=page_units, dtype=dtype)
            for e in (*range(1, num_executors), LOCAL)
        ]
        self.merger = _native.ShareMerger(
            layer_units(SPECS, UNITS, dtype), UNITS, str(dtype).removeprefix("torch."), 1
        )
        self.known: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.num_steps = 0

    def step(self, spans: Sequence[Span]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The output and the expected output of every layer."""
        self.num_steps += 1
        plan = StepPlan(self.num_steps, 0, tuple(spans))
        deadline = time.monotonic() + 5
        parts, rows = executor_parts(plan), first_rows(plan)
        ends = {x.end.executor: x for x in self.executors}
        for executor, part in parts.items():
            ends[executor].plan_end.post(part, deadline)
        routes = [
            Route(x.end, parts[e], rows, plan.num_rows) for e, x in ends.items() if e in parts
        ]
        attending = [route for route in routes if route.attends]
        outputs = Outputs(
            SPECS, attending, self.merger, micro_batch=0, num_rows=plan.num_rows, dtype=self.dtype
        )
        results = []
        for layer, spec in enumerate(SPECS):
            number = plan.step * len(SPECS) + layer
            q, k, v = (
                torch.randn(plan.num_rows, heads, size).to(self.dtype)
                for heads, size in (
                    (spec.num_query_heads, spec.head_dim_k),
                    (spec.num_kv_heads, spec.head_dim_k),
                    (spec.num_kv_heads, spec.head_dim_v),
                )
            )
            for route in attending:
                route.post_q(layer, number, q, deadline)
            for route in routes:
                if route.stores:
                    route.post_kv(layer, number, k, v, deadline)
            out = outputs.wait(layer, number, deadline)
            results.append((out.clone(), self._expected(plan, layer, q, k, v)))
        return results

    def _expected(
        self, plan: StepPlan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        outs, row = [], 0
        for span in plan.spans:
            rows = slice(row, row + span.num_rows)
            row += span.num_rows
            layers = self.known.setdefault(span.sequence, [(x.k[:0], x.v[:0]) for x in EMPTY])
            context = span.context_tokens
            layers[layer] = (
                torch.cat([layers[layer][0][:context], k[rows]]),
                torch.cat([layers[layer][1][:context], v[rows]]),
            )
            whole = reference_attention(
                SPECS[layer], q[rows], *layers[layer], context_tokens=span.context_tokens
            )
            outs.append(whole.out)
        return torch.cat(outs)


class _Empty:
    def __init__(self, spec: AttentionSpec) -> None:
        self.k = torch.empty(0, spec.num_kv_heads, spec.head_dim_k)
        self.v = torch.empty(0, spec.num_kv_heads, spec.head_dim_v)


EMPTY = [_Empty(spec) for spec in SPECS]


def assert_equal(
    results: list[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype = torch.float32
) -> None:
    for out, expected in results:
        assert out.dtype == dtype
        atol, rtol = ATTENTION_TOLERANCE[dtype]
        torch.testing.assert_close(out.float(), expected, atol=atol, rtol=rtol)


@st.composite
def placements(draw: st.DrawFn, page_units: int, num_executors: int) -> tuple[Share, ...]:
    """Shares that cover all units of all tokens once: ranges of units, each cut by tokens."""
    lanes = UNITS // page_units
    cuts = sorted(draw(st.sets(st.integers(1, lanes - 1), max_size=lanes - 1))) if lanes > 1 else []
    shares = []
    for start, stop in zip([0, *cuts], [*cuts, lanes], strict=True):
        pages = sorted(draw(st.sets(st.integers(1, 4), max_size=2)))
        executors = draw(
            st.lists(
                st.integers(0, num_executors - 1), min_size=len(pages) + 1, max_size=len(pages) + 1
            )
        )
        bounds = [0, *(p * PAGE for p in pages)]
        for i, executor in enumerate(executors):
            token_stop = bounds[i + 1] if i + 1 < len(bounds) else None
            shares.append(
                Share(executor, start * page_units, stop * page_units, bounds[i], token_stop)
            )
    return _merged(shares)


def _merged(shares: list[Share]) -> tuple[Share, ...]:
    """One executor has one share of the same units and adjoining tokens."""
    result: list[Share] = []
    for share in shares:
        last = result[-1] if result else None
        if (
            last is not None
            and last.executor == share.executor
            and last.unit_start == share.unit_start
            and last.token_stop == share.token_start
        ):
            result[-1] = Share(
                last.executor, last.unit_start, last.unit_stop, last.token_start, share.token_stop
            )
        else:
            result.append(share)
    return tuple(result)


def _is_served(placement: tuple[Share, ...]) -> bool:
    """An executor keeps one range of tokens per lane of a sequence."""
    units = [(s.executor, u) for s in placement for u in range(s.unit_start, s.unit_stop)]
    return len(units) == len(set(units))


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_any_placement_gives_the_whole(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    page_units = data.draw(st.sampled_from([1, 2, 3, 6]))
    num_executors = data.draw(st.integers(1, 4))
    cluster = Cluster(num_executors, page_units)
    lengths = [0, 0, 0]
    where = [data.draw(placements(page_units, num_executors).filter(_is_served)) for _ in lengths]
    local = (Share(LOCAL, 0, UNITS),)
    targets = data.draw(st.lists(st.integers(1, 14), min_size=3, max_size=3))
    keeps_local = [Share(LOCAL, 0, UNITS) in placement for placement in where]
    uses_local = [any(s.executor == LOCAL for s in placement) for placement in where]
    for _ in range(5):
        spans = []
        for sequence, length in enumerate(lengths):
            left = targets[sequence] - length
            if left > 0 and (keeps_local[sequence] or not uses_local[sequence]):
                rows = data.draw(st.integers(0, min(left, 6)))
                stores = where[sequence] if keeps_local[sequence] else (*local, *where[sequence])
                if rows:
                    spans.append(Span(sequence, rows, length, local, stores))
            else:
                rows = data.draw(st.integers(0, 1))
                if rows:
                    spans.append(Span(sequence, 1, length, where[sequence], where[sequence]))
            lengths[sequence] += rows
        if spans:
            assert_equal(cluster.step(spans))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merged_outputs_are_of_the_models_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    cluster = Cluster(3, page_units=6, dtype=dtype)
    placement = (Share(1, 0, UNITS, 0, 8), Share(2, 0, UNITS, 8, None))
    local = (Share(LOCAL, 0, UNITS),)
    assert_equal(cluster.step([Span(1, 11, 0, local, (*local, *placement))]), dtype)
    assert_equal(cluster.step([Span(1, 1, 11, placement, placement)]), dtype)


def test_a_share_outside_the_window_weighs_nothing() -> None:
    """Layer 1 sees 7 tokens; the first share's 8 lie behind them."""
    torch.manual_seed(2)
    cluster = Cluster(3, page_units=6)
    placement = (Share(1, 0, UNITS, 0, 8), Share(2, 0, UNITS, 8, None))
    local = (Share(LOCAL, 0, UNITS),)
    assert_equal(cluster.step([Span(1, 20, 0, local, (*local, *placement))]))
    assert_equal(cluster.step([Span(1, 1, 20, placement, placement)]))


def test_rows_that_cannot_be_lanes_are_refused() -> None:
    executor = PythonExecutor(1, SPECS, page_units=2)
    with pytest.raises(ValueError, match="lanes"):
        executor.end.native.begin(0, [(0, 4, 0, 3)], [], False)


def test_outputs_are_used_where_they_lie_if_one_executor_computes_all() -> None:
    executor = PythonExecutor(1, SPECS, page_units=6)
    plan = StepPlan(1, 0, (Span(1, 3, 0, (Share(1, 0, 6),), (Share(1, 0, 6),)),))
    (part,) = executor_parts(plan).values()
    assert Route(executor.end, part, first_rows(plan), 3).attends_whole
    two = StepPlan(2, 0, (*plan.spans, Span(2, 1, 0, (Share(2, 0, 6),), (Share(2, 0, 6),))))
    assert not Route(executor.end, executor_parts(two)[1], first_rows(two), 4).attends_whole
