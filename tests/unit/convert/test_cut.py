"""Cuts and stage order on hand-made and random dataflows."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.convert.cut import UNCARRIABLE, CannotCut, Dataflow, cut


class Graph:
    """A dataflow written down value by value."""

    def __init__(self) -> None:
        self.inputs: list[tuple[int, ...]] = []
        self.prices: list[int | None] = []
        self.heavy: set[int] = set()
        self.attention: list[int] = []
        self.queries: list[int] = []
        self.keys_values: list[tuple[int, int]] = []

    def add(self, *inputs: int, price: int | None = 4, heavy: bool = False) -> int:
        self.inputs.append(inputs)
        self.prices.append(price)
        if heavy:
            self.heavy.add(len(self.inputs) - 1)
        return len(self.inputs) - 1

    def attend(self, q: int, k: int, v: int) -> int:
        self.queries.append(q)
        self.keys_values.append((k, v))
        self.attention.append(self.add(q, k, v))
        return self.attention[-1]

    def flow(self, result: int) -> Dataflow:
        return Dataflow(
            inputs=tuple(self.inputs),
            bytes_per_token=tuple(self.prices),
            heavy=frozenset(self.heavy),
            attention=tuple(self.attention),
            queries=tuple(self.queries),
            keys_values=tuple(self.keys_values),
            result=result,
        )


def _qkv(graph: Graph, source: int) -> tuple[int, int, int]:
    return (
        graph.add(source, heavy=True),
        graph.add(source, heavy=True),
        graph.add(source, heavy=True),
    )


def test_a_residual_model_carries_the_residual_stream_alone() -> None:
    graph = Graph()
    stream = graph.add(graph.add(), heavy=True)
    streams, queries, keys, values = [], [], [], []
    for _ in range(3):
        streams.append(stream)
        norm = graph.add(stream, price=8)
        q, k, v = _qkv(graph, norm)
        queries.append(q)
        keys.append(k)
        values.append(v)
        stream = graph.add(stream, graph.add(graph.attend(q, k, v), heavy=True))
        stream = graph.add(stream, graph.add(stream, heavy=True))
    orders = cut(graph.flow(stream))
    assert [order.carried for order in orders] == [(s,) for s in streams] + [()]
    for order, q, k, v in zip(orders, queries, keys, values, strict=False):
        assert q in order.q
        assert {k, v} == set(order.kv), "what q needs too is computed once, before q"
        assert order.deferred == ()


def test_a_branch_that_needs_no_attention_is_deferred() -> None:
    graph = Graph()
    stream = graph.add(graph.add(), heavy=True)
    q, k, v = _qkv(graph, stream)
    branch = graph.add(graph.add(stream, heavy=True, price=16), heavy=True)
    out = graph.add(graph.attend(q, k, v), stream, branch)
    first, last = cut(graph.flow(out))
    assert first.deferred == (branch - 1, branch)
    assert first.carried == (stream, branch)
    assert last.q == (out,)


def test_a_cheap_wide_value_is_computed_again_from_a_narrow_one() -> None:
    graph = Graph()
    narrow = graph.add(graph.add(), heavy=True, price=2)
    wide = graph.add(narrow, price=100)
    q, k, v = _qkv(graph, wide)
    out = graph.add(graph.attend(q, k, v), wide)
    first, last = cut(graph.flow(out))
    assert first.carried == (narrow,)
    assert last.q == (wide, out)


def test_a_heavy_wide_value_is_carried() -> None:
    graph = Graph()
    narrow = graph.add(graph.add(), heavy=True, price=2)
    wide = graph.add(narrow, price=100, heavy=True)
    q, k, v = _qkv(graph, wide)
    out = graph.add(graph.attend(q, k, v), wide)
    assert cut(graph.flow(out))[0].carried == (wide,)


def test_two_narrow_values_replace_one_wide_sum() -> None:
    graph = Graph()
    ids = graph.add()
    parts = graph.add(ids, heavy=True, price=3), graph.add(ids, heavy=True, price=3)
    total = graph.add(*parts, price=7)
    q, k, v = _qkv(graph, total)
    out = graph.add(graph.attend(q, k, v), total)
    assert cut(graph.flow(out))[0].carried == parts


def test_a_value_used_layers_later_is_carried_over_every_cut_between() -> None:
    graph = Graph()
    early = graph.add(graph.add(), heavy=True, price=1)
    stream = graph.add(early, heavy=True)
    for _ in range(3):
        stream = graph.add(graph.attend(*_qkv(graph, stream)), heavy=True)
    orders = cut(graph.flow(graph.add(stream, early)))
    assert all(early in order.carried for order in orders[:-1])
    assert sum(early in (*o.q, *o.kv, *o.deferred) for o in orders) == 1


def test_a_value_that_cannot_be_carried_is_cut_beside() -> None:
    graph = Graph()
    stream = graph.add(graph.add(), heavy=True, price=9)
    pair = graph.add(stream, price=UNCARRIABLE)
    part = graph.add(pair, price=10)
    out = graph.add(graph.attend(*_qkv(graph, stream)), part)
    assert cut(graph.flow(out))[0].carried == (stream,)


def test_what_cannot_be_cut_is_named() -> None:
    graph = Graph()
    stream = graph.add(graph.add(), heavy=True)
    attended = graph.add(graph.attend(*_qkv(graph, stream)), heavy=True)
    pair = graph.add(attended, heavy=True, price=UNCARRIABLE)
    out = graph.add(graph.attend(*_qkv(graph, attended)), pair)
    with pytest.raises(CannotCut) as caught:
        cut(graph.flow(out))
    assert caught.value.index == 1


@st.composite
def flows(draw: st.DrawFn) -> Dataflow:
    graph = Graph()
    graph.add()
    pool = [0]

    def some(count: int) -> list[int]:
        return draw(st.lists(st.sampled_from(pool), min_size=1, max_size=count, unique=True))

    for _ in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(1, 5))):
            price, heavy = draw(st.integers(1, 9)), draw(st.booleans())
            pool.append(graph.add(*some(2), price=price, heavy=heavy))
        q, k, v = (graph.add(pool[-1], *some(1), heavy=True) for _ in range(3))
        attended = graph.attend(q, k, v)
        pool.append(graph.add(attended, *some(2), price=draw(st.integers(1, 9)), heavy=True))
    return graph.flow(graph.add(*pool[-2:]))


@settings(max_examples=150, deadline=None)
@given(flows())
def test_slices_compute_everything_from_what_they_are_given(flow: Dataflow) -> None:
    carried: set[int] = {0}
    computed: list[int] = []
    for i, order in enumerate(cut(flow)):
        known = set(carried) | ({flow.attention[i - 1]} if i else set())
        for part in (order.q, order.kv, order.deferred):
            for value in part:
                assert value not in known, "nothing is computed twice in a slice"
                assert known.issuperset(flow.inputs[value])
                known.add(value)
                computed.append(value)
            if i < len(flow.attention) and part is order.q:
                assert flow.queries[i] in known
        if i < len(flow.attention):
            assert known.issuperset({*flow.keys_values[i], *order.carried})
        else:
            assert flow.result in known
        carried = set(order.carried)
    heavy = [value for value in computed if value in flow.heavy]
    assert len(heavy) == len(set(heavy)), "heavy values are computed once in the whole model"


def _levels(flow: Dataflow) -> list[int]:
    levels: list[int] = []
    for value, inputs in enumerate(flow.inputs):
        own = flow.attention.index(value) if value in flow.attention else -1
        levels.append(max([own, *(levels[v] for v in inputs)]))
    return levels


def _suffices(flow: Dataflow, carried: set[int], needed: set[int], i: int) -> bool:
    """Whether the slice after attention i can compute `needed` without heavy work done before."""
    levels = _levels(flow)
    stack, seen = list(needed), set()
    while stack:
        value = stack.pop()
        if value in carried or value == flow.attention[i] or value in seen:
            continue
        seen.add(value)
        early = levels[value] < i
        if early and (value in flow.heavy or value in flow.attention or not flow.inputs[value]):
            return False
        stack.extend(flow.inputs[value])
    return True


@settings(max_examples=60, deadline=None)
@given(flows())
def test_no_cheaper_set_of_values_would_do(flow: Dataflow) -> None:
    orders = cut(flow)
    levels = _levels(flow)
    needed = {flow.result}
    for i in reversed(range(len(flow.attention))):
        price = sum(flow.bytes_per_token[v] or 0 for v in orders[i].carried)
        early = [v for v in range(len(flow.inputs)) if levels[v] < i and v not in flow.attention]
        for count in range(min(3, len(early)) + 1):
            for chosen in combinations(early, count):
                if sum(flow.bytes_per_token[v] or 0 for v in chosen) < price:
                    assert not _suffices(flow, set(chosen), needed, i)
        needed = {flow.queries[i], *flow.keys_values[i], *orders[i].carried}
