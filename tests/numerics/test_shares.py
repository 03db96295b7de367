"""Shares of a sequence's heads and tokens on several executors: together they are the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.attention.executor import AttentionExecutor
from lamina.attention.merge import Partial, merge
from lamina.attention.reference import reference_attention
from lamina.types import ExecutorPlan, ExecutorSpan, Share, Span, StepPlan
from numerics.test_native_attention import CACHES, ISAS, POOLS, assert_close, stored
from support.attention import Rows, make_sinks, make_spec

PAGE = 4
UNITS = 4
SPECS = (
    make_spec(0, num_query_heads=8, num_kv_heads=4),
    make_spec(1, num_query_heads=4, num_kv_heads=4, window=7, has_sinks=True),
    make_spec(2, num_query_heads=12, num_kv_heads=4, softcap=2.0, head_dim_v=6),
    make_spec(3, num_query_heads=8, num_kv_heads=8, head_dim_k=24, window=5, softcap=3.0),
    make_spec(4, num_query_heads=16, num_kv_heads=4, has_sinks=True),
)
HALVES = ((0, 2), (2, 4))

Placement = tuple[Share, ...]

every_cache = pytest.mark.parametrize(
    ("dtype", "cache"), CACHES, ids=lambda value: str(value).removeprefix("torch.")
)


class Sequences:
    """Tokens of sequences, all heads, on the executors of their placements and side by side."""

    def __init__(
        self,
        dtype: torch.dtype,
        cache: str,
        isa: str,
        placements: dict[int, Placement],
        page_units: int,
        threads: int = 1,
    ) -> None:
        torch.manual_seed(0)
        self._dtype, self._cache, self._page_units = dtype, cache, page_units
        self._sinks = make_sinks(SPECS)
        self._placements = placements
        self._executors = {
            number: AttentionExecutor(
                SPECS,
                self._sinks,
                dtype=dtype,
                num_pages=600,
                page_tokens=PAGE,
                units=UNITS,
                page_units=page_units,
                kv_cache_dtype=cache,
                pool=POOLS[threads],
                isa=isa,
            )
            for number in {share.executor for shares in placements.values() for share in shares}
        }
        # Per sequence and layer all of its tokens.
        self._tokens: dict[int, list[Rows]] = {sequence: [] for sequence in placements}
        self._length = 0

    def step(self, num_rows: int, *, attends: bool) -> None:
        """`num_rows` more tokens of every sequence; what attends is compared with the reference."""
        context, self._length = self._length, self._length + num_rows
        plan = StepPlan(
            1,
            0,
            tuple(
                Span(sequence, num_rows, context, shares if attends else (), shares)
                for sequence, shares in self._placements.items()
            ),
        )
        new = {s: self._fresh(num_rows) for s in self._placements}
        for sequence, layers in new.items():
            old = self._tokens[sequence]
            for layer, rows in enumerate(layers):
                if old:
                    for name in ("q", "k", "v"):
                        both = torch.cat([getattr(old[layer], name), getattr(rows, name)])
                        setattr(rows, name, both)
            self._tokens[sequence] = layers
        shares: dict[tuple[int, int, int], list[Partial | Tensor]] = {}
        for number, executor in self._executors.items():
            self._run(executor, plan.for_executor(number), shares)
        assert bool(shares) == attends
        for (layer, sequence, unit), parts in shares.items():
            self._compare(layer, sequence, unit, context, parts)

    def _fresh(self, num_rows: int) -> list[Rows]:
        spans = (ExecutorSpan(0, 0, UNITS, 0, num_rows, num_rows, 0),)
        return [Rows(spec, ExecutorPlan(1, 0, spans), self._dtype) for spec in SPECS]

    def _run(
        self,
        executor: AttentionExecutor,
        plan: ExecutorPlan,
        shares: dict[tuple[int, int, int], list[Partial | Tensor]],
    ) -> None:
        """A step of one executor: what it gives per layer, sequence and head unit."""
        executor.begin(plan)
        if not plan.spans:
            return
        for layer, spec in enumerate(SPECS):
            payloads: list[list[Tensor]] = [[], [], []]
            for span in plan.spans:
                rows = self._tokens[span.sequence][layer]
                first = self._first_token(executor, span)
                for unit in range(span.unit_start, span.unit_stop, self._page_units):
                    attending = rows.q[self._length - span.num_attending :][: span.num_attending]
                    payloads[0].append(self._heads(attending, unit, self._page_units))
                    for payload, x in zip(payloads[1:], (rows.k, rows.v), strict=True):
                        stored_rows = x[first + span.context_tokens :][: span.num_stored]
                        payload.append(self._heads(stored_rows, unit, self._page_units))
            lanes = [self._heads(x[:0], 0, self._page_units) for x in (rows.q, rows.k, rows.v)]
            q, k, v = (torch.cat([x, *p]) for x, p in zip(lanes, payloads, strict=True))
            executor.attend_cached(layer, q)
            if plan.is_partial:
                out, lse = executor.finish_partial(layer, k, v)
            else:
                out, lse = executor.finish(layer, k, v), None
            at = 0
            heads = spec.num_query_heads // UNITS
            for span in plan.spans:
                for unit in range(span.unit_start, span.unit_stop, self._page_units):
                    mine = slice(at, at + span.num_attending)
                    at += span.num_attending
                    for i in range(self._page_units if span.num_attending else 0):
                        columns = slice(i * heads, (i + 1) * heads)
                        of_unit = out[mine, columns]
                        shares.setdefault((layer, span.sequence, unit + i), []).append(
                            of_unit if lse is None else Partial(of_unit, lse[mine, columns])
                        )

    def _first_token(self, executor: AttentionExecutor, span: ExecutorSpan) -> int:
        (number,) = [n for n, e in self._executors.items() if e is executor]
        (start,) = {
            share.token_start
            for share in self._placements[span.sequence]
            if share.executor == number and share.unit_start == span.unit_start
        }
        return start

    @staticmethod
    def _heads(x_THD: Tensor, unit: int, count: int) -> Tensor:
        heads = x_THD.shape[1] // UNITS
        return x_THD[:, unit * heads : (unit + count) * heads]

    def _compare(
        self, layer: int, sequence: int, unit: int, context: int, parts: list[Partial | Tensor]
    ) -> None:
        spec, sinks = SPECS[layer], self._sinks[layer]
        rows = stored(self._tokens[sequence][layer], self._cache)
        q, k, v = (self._heads(x, unit, 1) for x in (rows.q, rows.k, rows.v))
        heads = spec.num_query_heads // UNITS
        want = reference_attention(
            spec.shard(0, spec.num_kv_heads // UNITS),
            q[context:],
            k,
            v,
            context_tokens=context,
            sinks=None if sinks is None else sinks[unit * heads : (unit + 1) * heads],
        )
        if isinstance(parts[0], Partial):
            whole = merge([part for part in parts if isinstance(part, Partial)])
            assert_close(whole.lse, want.lse, self._dtype, self._cache)
            assert_close(whole.out, want.out, self._dtype, self._cache)
        else:
            (out,) = parts
            assert_close(out, want.out, self._dtype, self._cache)


def tokens_placed(cuts: tuple[int, ...], first_executor: int = 1) -> Placement:
    """All heads, the tokens between cuts on one executor after the other."""
    starts, stops = (0, *cuts), (*cuts, None)
    return tuple(
        Share(first_executor + i, 0, UNITS, start, stop)
        for i, (start, stop) in enumerate(zip(starts, stops, strict=True))
    )


@st.composite
def placements(draw: st.DrawFn, context: int, num_rows: int) -> Placement:
    """Heads in one or two groups, each with its tokens over up to four executors.

    No cut in the middle of the last rows: they attend to each other.
    """
    places = [c for c in range(0, context + 9, PAGE) if not context < c < context + num_rows]
    shares: list[Share] = []
    for units in draw(st.sampled_from([((0, UNITS),), HALVES])):
        cuts = sorted(draw(st.sets(st.sampled_from(places), max_size=3)) - {0})
        executors = draw(st.permutations(range(1, 5)))
        starts, stops = (0, *cuts), (*cuts, None)
        shares += [
            Share(executors[i], *units, start, stop)
            for i, (start, stop) in enumerate(zip(starts, stops, strict=True))
        ]
    return tuple(shares)


@every_cache
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shares_are_the_whole(dtype: torch.dtype, cache: str, data: st.DataObject) -> None:
    """Of heads and tokens, with windows that end before some shares and rows of whole sequences."""
    context, num_rows = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 1, 2, 5]))
    placed = {
        1: data.draw(placements(context, num_rows)),
        2: data.draw(placements(context, num_rows)),
        3: (Share(1, 0, UNITS),),
    }
    sequences = Sequences(
        dtype,
        cache,
        data.draw(st.sampled_from(ISAS)),
        placed,
        data.draw(st.sampled_from([1, 2])),
        threads=data.draw(st.sampled_from([1, 2, 3])),
    )
    chunk = data.draw(st.integers(1, context))
    sequences.step(chunk, attends=False)
    if context > chunk:
        sequences.step(context - chunk, attends=False)
    sequences.step(num_rows, attends=True)


@pytest.mark.parametrize("isa", ISAS)
@every_cache
@pytest.mark.parametrize("page_units", [1, 2, UNITS])
def test_lanes_of_any_size_are_the_whole(
    isa: str, dtype: torch.dtype, cache: str, page_units: int
) -> None:
    sequences = Sequences(
        dtype, cache, isa, dict.fromkeys((1, 2), (Share(1, 0, UNITS),)), page_units, threads=2
    )
    for num_rows in (9, 1, 1, 5, 17, 1):
        sequences.step(num_rows, attends=True)


@pytest.mark.parametrize("isa", ISAS)
@every_cache
def test_shares_of_the_tokens_merge_to_the_whole(isa: str, dtype: torch.dtype, cache: str) -> None:
    """Also where a share has one page, or none that a window sees."""
    placed = {1: tokens_placed((4, 8, 64, 112)), 2: tokens_placed((152,), first_executor=3)}
    sequences = Sequences(dtype, cache, isa, placed, UNITS, threads=2)
    sequences.step(150, attends=False)
    sequences.step(1, attends=True)
    sequences.step(1, attends=True)
    sequences.step(5, attends=True)
    sequences.step(20, attends=True)


@pytest.mark.parametrize("page_units", [1, UNITS])
def test_a_share_without_visible_tokens_gives_zeros(page_units: int) -> None:
    """Nothing within the window: zeros, and an LSE of -inf."""
    spec = make_spec(num_query_heads=4, num_kv_heads=4, window=3, has_sinks=True)
    (sinks,) = make_sinks((spec,))
    executor = AttentionExecutor(
        (spec,),
        (sinks,),
        dtype=torch.float32,
        num_pages=16,
        page_tokens=PAGE,
        units=UNITS,
        page_units=page_units,
    )
    heads = 4 * page_units // UNITS
    lanes = UNITS // page_units
    store = ExecutorSpan(1, 0, UNITS, 0, 0, 8, 0)
    executor.begin(ExecutorPlan(1, 0, (store,)))
    rows = torch.randn(8 * lanes, heads, 8)
    executor.finish(0, rows, rows)
    attend = ExecutorSpan(1, 0, UNITS, 8, 2, 0, 10)
    executor.begin(ExecutorPlan(2, 0, (attend,), is_partial=True))
    executor.attend_cached(0, torch.randn(2 * lanes, heads, 8))
    none = torch.empty(0, heads, 8)
    out, lse = executor.finish_partial(0, none, none)
    assert out.shape == (2 * lanes, heads, 8)
    assert not out.any()
    assert (lse == -torch.inf).all()
