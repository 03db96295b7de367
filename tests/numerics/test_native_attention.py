"""The native kernels against the float32 oracle: every level, cache type and shape."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina import _native
from lamina.attention.executor import AttentionExecutor
from lamina.attention.spec import AttentionSpec
from lamina.types import ExecutorPlan
from support.attention import Oracle, Rows, make_sinks, make_spec, plan_of, run_step, span_of
from support.tolerances import ATTENTION_TOLERANCE

ISAS = _native.available_isas()
CACHES = (
    (torch.float32, "auto"),
    (torch.float16, "auto"),
    (torch.bfloat16, "auto"),
    (torch.float32, "int8"),
    (torch.float16, "int8"),
    (torch.bfloat16, "int8"),
)
POOLS = {count: _native.ThreadPool(count) for count in (1, 2, 3)}
PAGE = 16

every_isa = pytest.mark.parametrize("isa", ISAS)
every_cache = pytest.mark.parametrize(
    ("dtype", "cache"), CACHES, ids=lambda value: str(value).removeprefix("torch.")
)


def make_executor(
    specs: tuple[AttentionSpec, ...],
    sinks: tuple[Tensor | None, ...],
    dtype: torch.dtype = torch.float32,
    cache: str = "auto",
    isa: str | None = None,
    *,
    page_tokens: int = PAGE,
    num_pages: int = 64,
    threads: int = 1,
) -> AttentionExecutor:
    return AttentionExecutor(
        specs,
        sinks,
        dtype=dtype,
        num_pages=num_pages,
        page_tokens=page_tokens,
        kv_cache_dtype=cache,
        pool=POOLS[threads],
        isa=isa,
    )


def stored(rows: Rows, cache: str) -> Rows:
    """The same rows with keys and values as the cache gives them back."""
    if cache == "int8":
        rows = copy.copy(rows)
        rows.k, rows.v = (
            (x * torch.full_like(peak, 127).div(peak)).round().nan_to_num() * (peak / 127)
            for x in (rows.k.float(), rows.v.float())
            for peak in [x.abs().amax(dim=2, keepdim=True)]
        )
    return rows


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, cache: str) -> None:
    tolerances = [ATTENTION_TOLERANCE[dtype]]
    if cache == "int8":
        tolerances.append(ATTENTION_TOLERANCE[torch.int8])
    atol, rtol = map(max, zip(*tolerances, strict=True))
    torch.testing.assert_close(got.float(), want, atol=atol, rtol=rtol)


def scatter(executor: AttentionExecutor, sequences: int, page_tokens: int) -> None:
    """Leave free pages in single places only, so that what comes next is scattered."""
    ids = range(1000, 1000 + sequences)
    plan = plan_of(*((s, page_tokens, 0, False) for s in ids))
    executor.begin(plan)
    executor.begin(plan_of(releases=tuple(ids)[::2]))


@st.composite
def shapes(draw: st.DrawFn) -> AttentionSpec:
    kv_heads = draw(st.integers(1, 3))
    return make_spec(
        0,
        num_kv_heads=kv_heads,
        num_query_heads=kv_heads * draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16])),
        head_dim_k=8 * draw(st.integers(1, 32)),
        head_dim_v=8 * draw(st.integers(1, 32)),
        scale=draw(st.sampled_from([0.05, 0.125])),
        window=draw(st.sampled_from([None, None, 1, 5, PAGE, 70])),
        softcap=draw(st.sampled_from([None, None, 2.0, 30.0])),
        has_sinks=draw(st.booleans()),
    )


@every_isa
@every_cache
@settings(max_examples=12, deadline=None)
@given(
    spec=shapes(),
    spans=st.lists(
        st.tuples(
            st.sampled_from([1, 1, 1, 2, 5, 33]),
            st.sampled_from([0, 1, PAGE - 1, PAGE, PAGE + 1, 63, 64, 65, 130]),
        ),
        min_size=1,
        max_size=4,
    ),
    page_tokens=st.sampled_from([1, 4, 16, 24, 64, 128]),
    threads=st.sampled_from([1, 2, 3]),
)
def test_any_shape_matches_the_oracle(
    isa: str,
    dtype: torch.dtype,
    cache: str,
    spec: AttentionSpec,
    spans: list[tuple[int, int]],
    page_tokens: int,
    threads: int,
) -> None:
    torch.manual_seed(0)
    sinks = make_sinks((spec,))
    executor = make_executor(
        (spec,), sinks, dtype, cache, isa, page_tokens=page_tokens, num_pages=1200, threads=threads
    )
    scatter(executor, 30, page_tokens)
    oracle = Oracle((spec,), sinks)
    contexts = plan_of(*((s, context, 0, False) for s, (_, context) in enumerate(spans)))
    rows = plan_of(*((s, count, context) for s, (count, context) in enumerate(spans)), step=2)
    for plan in (contexts, rows):
        layers = [Rows(spec, plan, dtype)]
        (out,) = run_step(executor, plan, layers)
        (want,) = oracle.run_step(plan, [stored(rows, cache) for rows in layers])
    assert_close(out, want, dtype, cache)


@every_isa
@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_a_context_of_100_000_tokens(isa: str, cache: str) -> None:
    """Split over threads, whose partial results are merged."""
    torch.manual_seed(0)
    context = 100_000
    spec = make_spec(num_query_heads=2, num_kv_heads=1, scale=0.3)
    executor = make_executor(
        (spec,), (None,), torch.bfloat16, cache, isa, page_tokens=64, num_pages=1600, threads=2
    )
    oracle = Oracle((spec,), (None,))
    for plan in (plan_of((1, context, 0, False)), plan_of((1, 1, context), step=2)):
        layers = [Rows(spec, plan, torch.bfloat16)]
        (out,) = run_step(executor, plan, layers)
        (want,) = oracle.run_step(plan, [stored(rows, cache) for rows in layers])
    assert_close(out, want, torch.bfloat16, cache)


@every_isa
@every_cache
@pytest.mark.parametrize("page_tokens", [5, 16, 64])
def test_what_lies_in_reused_pages_does_not_leak(
    isa: str, dtype: torch.dtype, cache: str, page_tokens: int
) -> None:
    torch.manual_seed(0)
    specs = (make_spec(0), make_spec(1, head_dim_k=24, head_dim_v=40, window=3))
    executor = make_executor(specs, (None, None), dtype, cache, isa, page_tokens=page_tokens)
    poison = plan_of(*((s, 4 * page_tokens, 0, False) for s in range(16)))
    layers = [Rows(spec, poison, dtype) for spec in specs]
    for rows in layers:
        rows.k.fill_(torch.nan)
        rows.v.fill_(torch.nan)
    run_step(executor, poison, layers)
    executor.begin(plan_of(releases=tuple(range(16))))
    oracle = Oracle(specs, (None, None))
    length = 0
    for step, count in enumerate((3, 1, 1, 15, 1, 18, 1)):
        plan = plan_of((1, count, length), step=step + 2)
        layers = [Rows(spec, plan, dtype) for spec in specs]
        outputs = run_step(executor, plan, layers)
        for out, want in zip(
            outputs, oracle.run_step(plan, [stored(rows, cache) for rows in layers]), strict=True
        ):
            assert_close(out, want, dtype, cache)
        length += count


def test_a_replaced_token_that_was_not_a_number_does_not_leak() -> None:
    torch.manual_seed(0)
    spec = make_spec()
    for dtype, cache, isa in ((*pair, isa) for pair in CACHES for isa in ISAS):
        executor = make_executor((spec,), (None,), dtype, cache, isa)
        oracle = Oracle((spec,), (None,))
        prompt, again = plan_of((1, 7, 0)), plan_of((1, 1, 5), step=2)
        rows = Rows(spec, prompt, dtype)
        rows.v[5:] = torch.nan
        run_step(executor, prompt, [rows])
        oracle.run_step(prompt, [stored(rows, cache)])
        rows = Rows(spec, again, dtype)
        (out,) = run_step(executor, again, [rows])
        assert_close(out, oracle.run_step(again, [stored(rows, cache)])[0], dtype, cache)


@every_isa
def test_a_chunk_of_512_rows(isa: str) -> None:
    torch.manual_seed(0)
    spec = make_spec(num_query_heads=4, num_kv_heads=2, head_dim_k=64, head_dim_v=64, scale=0.125)
    for dtype in (torch.float32, torch.bfloat16):
        executor = make_executor((spec,), (None,), dtype, isa=isa, page_tokens=64, threads=2)
        oracle = Oracle((spec,), (None,))
        for plan in (plan_of((1, 100, 0)), plan_of((1, 512, 100), step=2)):
            layers = [Rows(spec, plan, dtype)]
            (out,) = run_step(executor, plan, layers)
            (want,) = oracle.run_step(plan, layers)
            assert_close(out, want, dtype, "auto")


def test_steps_of_two_micro_batches_in_progress_at_once() -> None:
    torch.manual_seed(0)
    specs = (make_spec(0), make_spec(1, window=3))
    executor, plain = (make_executor(specs, (None, None)) for _ in range(2))
    prompts = plan_of((1, 9, 0), (2, 20, 0))
    layers = [Rows(spec, prompts, torch.float32) for spec in specs]
    for each in (executor, plain):
        run_step(each, prompts, layers)
    plans = [plan_of((1, 1, 9), step=2), plan_of((2, 3, 20), step=3)]
    rows = [[Rows(spec, plan, torch.float32) for spec in specs] for plan in plans]
    want = [run_step(plain, plan, mine) for plan, mine in zip(plans, rows, strict=True)]
    steps = [executor.begin(plan)[0] for plan in plans]
    for layer in range(2):
        qs = [mine[layer].attending_q.contiguous() for mine in rows]
        for step, q in zip(steps, qs, strict=True):
            executor.native.attend_cached(step, layer, q.data_ptr())
        for step, mine, wanted in zip(steps, rows, want, strict=True):
            out = torch.empty_like(wanted[layer])
            k, v = mine[layer].k, mine[layer].v
            executor.native.finish(step, layer, k.data_ptr(), v.data_ptr(), out.data_ptr())
            assert torch.equal(out, wanted[layer])


def test_threads_do_not_change_the_result_beyond_rounding() -> None:
    torch.manual_seed(0)
    spec = make_spec(num_query_heads=8, num_kv_heads=4, head_dim_k=64, head_dim_v=64)
    spans = tuple(span_of(s, 300 + 70 * s, 0, attends=False) for s in range(5))
    prompt = ExecutorPlan(1, 0, spans)
    decode = ExecutorPlan(2, 0, tuple(span_of(s.sequence, 1, s.num_stored) for s in spans))
    first, second = Rows(spec, prompt, torch.float32), Rows(spec, decode, torch.float32)
    outputs = []
    for threads in POOLS:
        executor = make_executor((spec,), (None,), threads=threads, num_pages=200)
        run_step(executor, prompt, [first])
        outputs += run_step(executor, decode, [second])
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0], atol=1e-5, rtol=1e-5)
