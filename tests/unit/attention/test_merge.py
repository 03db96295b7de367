"""merge(split) == whole, for any split of the tokens, empty shares included."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.attention.merge import Partial, add_sinks, merge, merge_rows
from lamina.attention.reference import reference_attention
from support.attention import make_spec
from support.tolerances import ATTENTION_TOLERANCE

ATOL, RTOL = ATTENTION_TOLERANCE[torch.float32]
SPECS = (
    make_spec(),
    make_spec(window=4),
    make_spec(softcap=2.0, head_dim_v=3),
    make_spec(window=6, has_sinks=True),
)


def empty_partial(num_rows: int, num_query_heads: int, head_dim_v: int) -> Partial:
    return Partial(
        torch.zeros(num_rows, num_query_heads, head_dim_v),
        torch.full((num_rows, num_query_heads), -math.inf),
    )


def assert_partials_match(actual: Partial, expected: Partial) -> None:
    torch.testing.assert_close(actual.out, expected.out, atol=ATOL, rtol=RTOL)
    torch.testing.assert_close(actual.lse, expected.lse, atol=ATOL, rtol=RTOL)


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "window", "softcap", "sinks"])
@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 5),
    context=st.integers(0, 12),
    cuts=st.lists(st.floats(0, 1), max_size=5),
)
def test_merge_of_any_split_is_the_whole(
    spec: object, num_rows: int, context: int, cuts: list[float]
) -> None:
    torch.manual_seed(0)
    num_tokens = context + num_rows
    q = 3 * torch.randn(num_rows, 4, 8)
    k = torch.randn(num_tokens, 2, 8)
    v = torch.randn(num_tokens, 2, spec.head_dim_v)  # type: ignore[attr-defined]
    sinks = torch.randn(4) if spec.has_sinks else None  # type: ignore[attr-defined]
    bounds = [0, *sorted(round(cut * num_tokens) for cut in cuts), num_tokens]
    shares = [
        reference_attention(
            spec,  # type: ignore[arg-type]
            q,
            k[start:stop],
            v[start:stop],
            context_tokens=context,
            start=start,
        )
        for start, stop in itertools.pairwise(bounds)
    ]
    merged = merge(shares)
    if sinks is not None:
        merged = add_sinks(merged, sinks)
    whole = reference_attention(spec, q, k, v, context_tokens=context, sinks=sinks)  # type: ignore[arg-type]
    assert_partials_match(merged, whole)


def test_the_oracle_is_softmax_attention() -> None:
    """Against torch's own attention, so that the oracle does not only agree with itself."""
    torch.manual_seed(0)
    q, k, v = torch.randn(6, 4, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, scale=0.4, enable_gqa=True
    )[0].transpose(0, 1)
    actual = reference_attention(make_spec(scale=0.4), q, k, v, context_tokens=0)
    torch.testing.assert_close(actual.out, expected, atol=ATOL, rtol=RTOL)


def test_oracle_by_hand() -> None:
    spec = make_spec(num_query_heads=1, num_kv_heads=1, head_dim_k=1, head_dim_v=1, scale=1.0)
    q, k, v = (torch.tensor(x)[:, None, None] for x in ([1.0], [0.0, math.log(3.0)], [1.0, 5.0]))
    plain = reference_attention(spec, q, k, v, context_tokens=1)
    assert plain.out.item() == pytest.approx((1 * 1 + 3 * 5) / 4)
    assert plain.lse.item() == pytest.approx(math.log(4))
    with_sink = reference_attention(
        spec, q, k, v, context_tokens=1, sinks=torch.tensor([math.log(4.0)])
    )
    assert with_sink.out.item() == pytest.approx(2.0)
    assert with_sink.lse.item() == pytest.approx(math.log(8))
    windowed = reference_attention(
        make_spec(**{**_fields(spec), "window": 1}), q, k, v, context_tokens=1
    )
    assert windowed.out.item() == pytest.approx(5.0)


def _fields(spec: object) -> dict[str, object]:
    return {
        name: getattr(spec, name)
        for name in ("num_query_heads", "num_kv_heads", "head_dim_k", "head_dim_v", "scale")
    }


def test_empty_shares_change_nothing_and_make_no_nan() -> None:
    share = Partial(torch.randn(2, 3, 4), torch.randn(2, 3))
    empty = empty_partial(2, 3, 4)
    assert_partials_match(merge([empty, share, empty]), share)
    nothing = merge([empty, empty])
    assert_partials_match(nothing, empty)
    sinks_only = add_sinks(nothing, torch.tensor([0.5, -1.0, 2.0]))
    assert not sinks_only.out.any()
    torch.testing.assert_close(sinks_only.lse, torch.tensor([[0.5, -1.0, 2.0]] * 2))


def test_huge_scores_do_not_overflow() -> None:
    low = Partial(torch.full((1, 1, 2), 7.0), torch.full((1, 1), -1e4))
    high = Partial(torch.full((1, 1, 2), 3.0), torch.full((1, 1), 1e4))
    assert_partials_match(merge([low, high]), high)


def test_rows_may_have_any_number_of_shares() -> None:
    a, b, c = (Partial(torch.randn(1, 2, 3), torch.randn(1, 2)) for _ in range(3))
    stacked = Partial(torch.cat([a.out, b.out, c.out]), torch.cat([a.lse, b.lse, c.lse]))
    merged = merge_rows(stacked, torch.tensor([2, 0, 2]), num_rows=3)
    expected = [b, empty_partial(1, 2, 3), merge([a, c])]
    assert_partials_match(
        merged,
        Partial(torch.cat([e.out for e in expected]), torch.cat([e.lse for e in expected])),
    )
