"""The paged executor against the float32 oracle: every feature, every dtype, any plan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.attention.executor import AttentionExecutor
from lamina.attention.partition import head_units, query_head_range, shard_specs
from lamina.types import ExecutorPlan
from support.attention import (
    Oracle,
    Rows,
    assert_outputs_match,
    make_sinks,
    make_spec,
    run_step,
    span_of,
)
from support.tolerances import ATTENTION_TOLERANCE

PAGE = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SPECS = (
    make_spec(0),
    make_spec(1, num_kv_heads=4),
    make_spec(2, num_kv_heads=1, num_query_heads=3, scale=0.3),
    make_spec(3, window=1),
    make_spec(4, window=PAGE + 1),
    make_spec(5, softcap=2.0),
    make_spec(6, head_dim_v=5),
    make_spec(7, has_sinks=True),
    make_spec(8, head_dim_k=12, window=7, softcap=3.0, has_sinks=True),
)
"""One feature per layer, and all of them together: every plan exercises all."""

lengths = st.one_of(
    st.sampled_from([1, 1, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1]), st.integers(1, 24)
)


@st.composite
def scenarios(draw: st.DrawFn) -> list[ExecutorPlan]:
    """Steps over four sequences: growth, truncation, releases, store-only spans, empty plans."""
    known = dict.fromkeys(range(4), 0)
    plans = []
    for step in range(1, draw(st.integers(1, 6)) + 1):
        releases = draw(st.lists(st.sampled_from(range(5)), max_size=2))
        known.update((s, 0) for s in releases if s in known)
        spans = []
        for sequence in draw(st.lists(st.sampled_from(range(4)), unique=True, max_size=4)):
            context = known[sequence]
            if context and draw(st.integers(0, 4)) == 0:
                context = draw(st.integers(0, context))
            num_rows = draw(lengths)
            attends = draw(st.integers(0, 3)) > 0
            spans.append(span_of(sequence, num_rows, context, attends))
            known[sequence] = context + num_rows
        plans.append(ExecutorPlan(step, 0, tuple(spans), tuple(releases)))
    return plans


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, deadline=None)
@given(plans=scenarios(), replays=st.booleans())
def test_executor_matches_the_oracle(
    dtype: torch.dtype, plans: list[ExecutorPlan], replays: bool
) -> None:
    torch.manual_seed(0)
    sinks = make_sinks(SPECS)
    executor = AttentionExecutor(SPECS, sinks, dtype=dtype, num_pages=160, page_tokens=PAGE)
    oracle = Oracle(SPECS, sinks)
    for plan in plans:
        layers = [Rows(spec, plan, dtype) for spec in SPECS]
        if replays:
            # A first try that was given up half-way, with other contents, leaves no trace.
            run_step(executor, plan, [Rows(spec, plan, dtype) for spec in SPECS[:5]])
        outputs = run_step(executor, plan, layers)
        assert_outputs_match(outputs, oracle.run_step(plan, layers), SPECS, dtype)

        assert executor.check_integrity() == []
        for sequence in range(4):
            assert executor.length(sequence) == oracle.length(sequence)
        used = sum(-(-oracle.length(sequence) // PAGE) for sequence in range(4))
        assert executor.num_pages - executor.num_free_pages == used
    executor.begin(ExecutorPlan(99, 0, (), tuple(range(4))))
    assert executor.num_free_pages == executor.num_pages
    assert executor.sequences == ()


@pytest.mark.parametrize("context", [0, 1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE])
@pytest.mark.parametrize("num_rows", [1, 2, PAGE, 3 * PAGE + 1])
def test_context_and_chunk_lengths_around_page_boundaries(context: int, num_rows: int) -> None:
    torch.manual_seed(0)
    sinks = make_sinks(SPECS)
    executor = AttentionExecutor(SPECS, sinks, dtype=torch.float32, num_pages=40, page_tokens=PAGE)
    oracle = Oracle(SPECS, sinks)
    for spans in ([span_of(1, context, 0, False)], [span_of(1, num_rows, context)]):
        plan = ExecutorPlan(1, 0, tuple(spans))
        layers = [Rows(spec, plan, torch.float32) for spec in SPECS]
        outputs = run_step(executor, plan, layers)
        assert_outputs_match(outputs, oracle.run_step(plan, layers), SPECS, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fragmented_pages_of_real_head_sizes(dtype: torch.dtype) -> None:
    """Decode and chunks over pages that are scattered because sequences came and went."""
    torch.manual_seed(0)
    shape = {"num_query_heads": 8, "num_kv_heads": 4, "head_dim_k": 128, "head_dim_v": 128}
    specs = (make_spec(0, **shape, scale=128**-0.5), make_spec(1, **shape, scale=0.05, window=100))
    sinks = make_sinks(specs)
    executor = AttentionExecutor(specs, sinks, dtype=dtype, num_pages=40, page_tokens=16)
    oracle = Oracle(specs, sinks)
    steps = [
        ExecutorPlan(1, 0, tuple(span_of(s, 32, 0) for s in range(20))),
        ExecutorPlan(2, 0, (span_of(0, 150, 32),), releases=tuple(range(1, 20, 2))),
        ExecutorPlan(3, 0, (span_of(0, 1, 182), span_of(2, 40, 32))),
        ExecutorPlan(4, 0, (span_of(2, 1, 72), span_of(0, 33, 183))),
    ]
    for plan in steps:
        layers = [Rows(spec, plan, dtype) for spec in specs]
        outputs = run_step(executor, plan, layers)
        assert_outputs_match(outputs, oracle.run_step(plan, layers), specs, dtype)
        assert executor.check_integrity() == []


@pytest.mark.parametrize("num_workers", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_shards_side_by_side_are_the_whole(dtype: torch.dtype, num_workers: int) -> None:
    torch.manual_seed(0)
    specs = (
        make_spec(0, num_query_heads=8, num_kv_heads=4),
        make_spec(1, num_query_heads=8, num_kv_heads=8, window=5, has_sinks=True),
        make_spec(2, num_query_heads=12, num_kv_heads=4, softcap=2.0, head_dim_v=6),
    )
    sinks = make_sinks(specs)
    units = head_units(specs)
    size = units // num_workers
    shares = [(i * size, (i + 1) * size) for i in range(num_workers)]
    whole = AttentionExecutor(specs, sinks, dtype=dtype, num_pages=20, page_tokens=PAGE)
    shards = [
        AttentionExecutor(
            shard_specs(specs, *share, units),
            tuple(
                None if s is None else s[slice(*query_head_range(spec, *share, units))]
                for spec, s in zip(specs, sinks, strict=True)
            ),
            dtype=dtype,
            num_pages=20,
            page_tokens=PAGE,
        )
        for share in shares
    ]
    atol, rtol = ATTENTION_TOLERANCE[dtype]
    for spans in ([(1, 9, 0), (2, 3, 0)], [(1, 1, 9), (2, 6, 3)], [(2, 1, 9), (1, 1, 10)]):
        plan = ExecutorPlan(1, 0, tuple(span_of(*span) for span in spans))
        layers = [Rows(spec, plan, dtype) for spec in specs]
        outputs = run_step(whole, plan, layers)
        for shard in shards:
            shard.begin(plan)
        for index, (spec, rows) in enumerate(zip(specs, layers, strict=True)):
            pieces = []
            for shard, (start, stop) in zip(shards, shares, strict=True):
                heads = slice(*query_head_range(spec, start, stop, units))
                kv_heads = slice(heads.start // spec.group_size, heads.stop // spec.group_size)
                shard.attend_cached(index, rows.attending_q[:, heads].contiguous())
                pieces.append(shard.finish(index, rows.k[:, kv_heads], rows.v[:, kv_heads]))
            torch.testing.assert_close(
                torch.cat(pieces, dim=1), outputs[index], atol=atol, rtol=rtol
            )
