"""Attention by the book: plain torch, float32, one sequence. The oracle of every backend.

Shape letters: R rows, Hq query heads, Hkv KV heads, T tokens, Dk and Dv sizes of k and v vectors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lamina.attention.merge import Partial
from lamina.attention.spec import AttentionSpec


def reference_attention(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    context_tokens: int,
    start: int = 0,
    sinks: Tensor | None = None,
) -> Partial:
    """Attention of consecutive rows of one sequence over a range of its tokens.

    Args:
        q: [R, Hq, Dk], rows at positions context_tokens, context_tokens + 1, ...
        k, v: [T, Hkv, Dk] and [T, Hkv, Dv], the tokens at positions start, start + 1, ...; T may
            be 0. Tokens after a row's position or outside its window do not take part.
        sinks: [Hq], included if given (so give them to one share only).

    Returns:
        out [R, Hq, Dv] and lse [R, Hq], float32; zeros and -inf where nothing takes part.
    """
    num_rows, num_tokens = q.shape[0], k.shape[0]
    k_THD = k.float().repeat_interleave(spec.group_size, dim=1)
    v_THD = v.float().repeat_interleave(spec.group_size, dim=1)
    scores_RHT = torch.einsum("rhd,thd->rht", q.float(), k_THD) * spec.scale
    if spec.softcap is not None:
        scores_RHT = spec.softcap * torch.tanh(scores_RHT / spec.softcap)

    row_positions = torch.arange(context_tokens, context_tokens + num_rows)[:, None]
    token_positions = torch.arange(start, start + num_tokens)[None, :]
    visible_RT = token_positions <= row_positions
    if spec.window is not None:
        visible_RT &= row_positions - token_positions < spec.window
    scores_RHT = scores_RHT.masked_fill(~visible_RT[:, None, :], -math.inf)

    if sinks is not None:
        column = sinks.float()[None, :, None].expand(num_rows, -1, 1)
        scores_RHT = torch.cat([scores_RHT, column], dim=2)
        v_THD = torch.cat([v_THD, v_THD.new_zeros(1, *v_THD.shape[1:])])
    lse = scores_RHT.logsumexp(dim=2)
    weights_RHT = (scores_RHT - lse[:, :, None]).exp().nan_to_num(nan=0.0)
    return Partial(torch.einsum("rht,thd->rhd", weights_RHT, v_THD), lse)
