"""Combining attention over disjoint shares of the tokens.

Every share yields its output, normalised over the share alone, and the log-sum-exp of its scores;
together these say how much the share weighs in the whole. Any split of a sequence's tokens merges
to the same result, up to rounding.

Shape letters: R rows, Hq query heads, Dv size of v and output vectors, P rows of partial results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention of R rows over a share of the tokens."""

    out: Tensor
    """[R, Hq, Dv] float32, normalised over the share; zeros where the share is empty."""
    lse: Tensor
    """[R, Hq] float32: natural log-sum-exp of the scaled scores; -inf where the share is empty."""


def merge(shares: Sequence[Partial]) -> Partial:
    """The whole from at least one disjoint share, each of the same R rows."""
    num_rows = shares[0].lse.shape[0]
    rows = torch.arange(num_rows).repeat(len(shares))
    return merge_rows(concat(shares), rows, num_rows)


def concat(partials: Sequence[Partial]) -> Partial:
    """At least one partial result, one after the other along the rows."""
    return Partial(
        torch.cat([partial.out for partial in partials]),
        torch.cat([partial.lse for partial in partials]),
    )


def merge_rows(partials: Partial, rows: Tensor, num_rows: int) -> Partial:
    """Merge shares that come in any number per row.

    Args:
        partials: P rows of partial results; `out` may be of a narrower dtype than float32.
        rows: int64 [P], the row that each belongs to; a row without any gets the empty share.
        num_rows: R.
    """
    out, lse = partials
    num_heads = lse.shape[1]
    index = rows[:, None].expand_as(lse)
    peak = torch.full((num_rows, num_heads), -math.inf).scatter_reduce_(0, index, lse, "amax")
    # Where all shares are empty, -inf - (-inf) would be NaN; any finite peak gives weights of 0.
    peak.masked_fill_(peak == -math.inf, 0.0)
    weight = (lse - peak[rows]).exp_()
    total = torch.zeros(num_rows, num_heads).index_add_(0, rows, weight)
    merged = torch.zeros(num_rows, num_heads, out.shape[2])
    merged.index_add_(0, rows, out * weight[:, :, None])
    # Where anything was there at all the total is at least 1: its largest share weighs 1.
    merged.div_(total.clamp(min=1.0)[:, :, None])
    return Partial(merged, peak.add_(total.log_()))


def add_sinks(whole: Partial, sinks: Tensor) -> Partial:
    """Merge attention sinks: one more share per row, of value zero.

    Args:
        whole: attention over all tokens.
        sinks: [Hq] float32, the sinks' scores (not scaled).
    """
    lse = torch.logaddexp(whole.lse, sinks)
    return Partial(whole.out * (whole.lse - lse).exp_()[:, :, None], lse)
