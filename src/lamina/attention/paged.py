"""Attention over a paged cache with torch on the CPU: the step's schedule and a layer's work.

`make_schedule` runs once per step and per distinct window; it decides which rows meet which tokens,
and the layers only follow it. A decode row reads each contiguous run of its sequence's pages in
place. The rows of a prompt chunk meet the tokens in blocks, so that scores never take more memory
than BLOCK x BLOCK per head. Partial results are merged by log-sum-exp.

Shape letters: A attending rows, R rows, Hq query heads, Hkv KV heads, G = Hq / Hkv, T tokens,
Dk and Dv sizes of k and v vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lamina.attention.merge import Partial, concat, merge_rows
from lamina.attention.spec import AttentionSpec
from lamina.kv.cache import slot_runs
from lamina.types import ExecutorSpan

BLOCK = 1024
"""Most rows of a prompt chunk, and most tokens for them, in one piece of work."""


class Work(NamedTuple):
    """Consecutive rows of one sequence meet some of its tokens; every row sees at least one."""

    rows: slice
    """Into the step's attending rows."""
    tokens: slice | Tensor
    """Slots of the cache (a slice, or int64 [T]), or a slice of the step's new tokens."""
    causal: bool = False
    """Row i sees tokens 0 to i only."""
    mask: Tensor | None = None
    """float32 [R, T]: 0 where the row sees the token, else -inf."""


class RowMap(NamedTuple):
    """Where concatenated partial results belong."""

    rows: Tensor
    """int64: the attending row of each row of results."""
    complete: bool
    """The results are exactly the attending rows in order: there is nothing to merge."""


class Schedule(NamedTuple):
    """Who meets whom in a step, for all layers of one window. Made once, read by every layer."""

    cached: tuple[Work, ...]
    """Work over committed tokens."""
    cached_map: RowMap
    new: tuple[Work, ...]
    """Work among the rows of prompt chunks."""
    single_rows: Tensor
    """int64: attending rows of one-row spans; of the step's new tokens each sees its own only."""
    single_tokens: Tensor
    """int64: their tokens among the step's new tokens."""
    final_map: RowMap
    """For the merged result of `cached` (if there is any), the single rows, then `new`."""


def make_schedule(
    spans: Sequence[ExecutorSpan],
    tables: Mapping[int, Sequence[int]],
    page_tokens: int,
    *,
    window: int | None,
    explicit_masks: bool,
) -> Schedule:
    """Decide the work of a step.

    Args:
        spans: the plan's spans.
        tables: sequence -> its pages in token order, enough for its context.
        window: of the layers that will follow this schedule.
        explicit_masks: give a mask where `Work.causal` would do.
    """
    cached: list[Work] = []
    new: list[Work] = []
    single_rows: list[int] = []
    single_tokens: list[int] = []
    row = token = 0
    for span in spans:
        context, stop = span.context_tokens, span.context_tokens + span.num_rows
        if span.attends and span.num_rows == 1:
            single_rows.append(row)
            single_tokens.append(token)
            first = 0 if window is None else max(0, context - window + 1)
            runs = slot_runs(tables[span.sequence], page_tokens, first, context)
            cached += [Work(slice(row, row + 1), run) for run in runs]
        elif span.attends:
            pages = tables[span.sequence]
            for block in _blocks((context, stop), (0, context), window):
                runs = slot_runs(pages, page_tokens, *block.tokens)
                slots = runs[0] if len(runs) == 1 else _indices(runs)
                cached.append(_block_work(block, row - context, slots, window, explicit_masks))
            for block in _blocks((context, stop), (context, stop), window):
                shift = token - context
                tokens = slice(block.tokens[0] + shift, block.tokens[1] + shift)
                new.append(_block_work(block, row - context, tokens, window, explicit_masks))
        if span.attends:
            row += span.num_rows
        token += span.num_rows

    cached_rows = _indices([work.rows for work in cached])
    all_rows = torch.arange(row)
    singles = torch.tensor(single_rows, dtype=torch.int64)
    final_rows = torch.cat(
        [all_rows[: row if cached else 0], singles, _indices([work.rows for work in new])]
    )
    return Schedule(
        cached=tuple(cached),
        cached_map=RowMap(cached_rows, torch.equal(cached_rows, all_rows)),
        new=tuple(new),
        single_rows=singles,
        single_tokens=torch.tensor(single_tokens, dtype=torch.int64),
        final_map=RowMap(final_rows, torch.equal(final_rows, all_rows)),
    )


def slot_indices(
    spans: Sequence[ExecutorSpan], tables: Mapping[int, Sequence[int]], page_tokens: int
) -> Tensor:
    """int64 [N]: the cache slots of the spans' new tokens, in the plan's order."""
    return _indices(
        [
            run
            for span in spans
            for run in slot_runs(
                tables[span.sequence],
                page_tokens,
                span.context_tokens,
                span.context_tokens + span.num_rows,
            )
        ]
    )


def attend_cached(
    spec: AttentionSpec,
    schedule: Schedule,
    q: Tensor,
    read: Callable[[slice | Tensor], tuple[Tensor, Tensor]],
) -> Partial | None:
    """Attention of all attending rows over their committed tokens; None if nobody has any.

    Args:
        q: [A, Hq, Dk] in the cache's dtype.
        read: slots -> (k [Hkv, T, Dk], v [Hkv, T, Dv]) of this layer's cache.
    """
    if not schedule.cached:
        return None
    partials = [_attend(spec, work, q, *read(work.tokens)) for work in schedule.cached]
    return _combine(partials, schedule.cached_map, q.shape[0])


def attend_new(
    spec: AttentionSpec,
    schedule: Schedule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cached: Partial | None,
) -> Partial:
    """Attention of all attending rows over the step's new tokens, merged with the cached part.

    Args:
        q: [A, Hq, Dk], A >= 1, in the cache's dtype.
        k, v: [N, Hkv, Dk] and [N, Hkv, Dv] in the cache's dtype, the step's new tokens.
        cached: what `attend_cached` returned.
    """
    partials = [] if cached is None else [cached]
    if len(schedule.single_rows):
        partials.append(_attend_own_token(spec, schedule, q, k, v))
    for work in schedule.new:
        k_HTD = k[work.tokens].transpose(0, 1)
        v_HTD = v[work.tokens].transpose(0, 1)
        partials.append(_attend(spec, work, q, k_HTD, v_HTD))
    return _combine(partials, schedule.final_map, q.shape[0])


def uses_flash(spec: AttentionSpec) -> bool:
    """Whether torch's fused CPU kernel, which also yields the log-sum-exp, can do this layer."""
    return spec.softcap is None and spec.head_dim_k == spec.head_dim_v


class _Block(NamedTuple):
    """Positions [start, stop) of rows and of tokens of one sequence."""

    rows: tuple[int, int]
    tokens: tuple[int, int]


def _blocks(rows: tuple[int, int], tokens: tuple[int, int], window: int | None) -> Iterator[_Block]:
    """Cut rows x tokens into blocks, without rows and tokens that have nothing to do there."""
    for row_start in range(*rows, BLOCK):
        row_stop = min(row_start + BLOCK, rows[1])
        visible_start, visible_stop = tokens[0], min(tokens[1], row_stop)
        if window is not None:
            visible_start = max(visible_start, row_start - window + 1)
        for start in range(visible_start, visible_stop, BLOCK):
            stop = min(start + BLOCK, visible_stop)
            last_row = row_stop if window is None else min(row_stop, stop - 1 + window)
            yield _Block((max(row_start, start), last_row), (start, stop))


def _block_work(
    block: _Block,
    row_shift: int,
    tokens: slice | Tensor,
    window: int | None,
    explicit_masks: bool,
) -> Work:
    """The work of a block; attending row = position + `row_shift`."""
    (row_start, row_stop), (start, stop) = block
    rows = slice(row_start + row_shift, row_stop + row_shift)
    some_too_new = stop - 1 > row_start
    some_too_old = window is not None and row_stop - 1 - start >= window
    if not some_too_new and not some_too_old:
        return Work(rows, tokens)
    if row_start == start and not some_too_old and not explicit_masks:
        return Work(rows, tokens, causal=True)
    distance_RT = torch.arange(row_start, row_stop)[:, None] - torch.arange(start, stop)
    hidden_RT = distance_RT < 0
    if window is not None:
        hidden_RT |= distance_RT >= window
    mask_RT = torch.zeros(hidden_RT.shape).masked_fill_(hidden_RT, -math.inf)
    return Work(rows, tokens, mask=mask_RT)


def _attend(spec: AttentionSpec, work: Work, q: Tensor, k_HTD: Tensor, v_HTD: Tensor) -> Partial:
    q_RHD = q[work.rows]
    if not uses_flash(spec):
        return _attend_plainly(spec, work.mask, q_RHD, k_HTD, v_HTD)
    if work.rows.stop - work.rows.start == 1:
        # The query heads of a KV head take the place of rows: its keys are then read once.
        q_HGD = q_RHD.view(spec.num_kv_heads, spec.group_size, spec.head_dim_k)
        if spec.group_size == 1 and q.dtype == torch.bfloat16:
            # In bfloat16 the kernel takes about twice as long for one row as for two.
            q_HGD = q_HGD.expand(-1, 2, -1)
        out, lse = _flash(spec, work, q_HGD, k_HTD, v_HTD)
        out, lse = out[:, : spec.group_size], lse[:, : spec.group_size]
        return Partial(out.reshape(1, spec.num_query_heads, -1), lse.reshape(1, -1))
    out, lse = _flash(spec, work, q_RHD.transpose(0, 1), k_HTD, v_HTD)
    return Partial(out.transpose(0, 1), lse.transpose(0, 1))


def _flash(
    spec: AttentionSpec, work: Work, q_HRD: Tensor, k_HTD: Tensor, v_HTD: Tensor
) -> tuple[Tensor, Tensor]:
    """torch's fused kernel: out [H, R, Dv] in q's dtype and lse [H, R] float32 (natural log).

    H, the heads of q, is a multiple of the heads of k and v.
    """
    # `scaled_dot_product_attention` dispatches to this op on the CPU but drops the log-sum-exp.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        q_HRD[None],
        k_HTD[None],
        v_HTD[None],
        0.0,
        work.causal,
        attn_mask=None if work.mask is None else work.mask[None, None],
        scale=spec.scale,
    )
    return out[0], lse[0]


def _attend_plainly(
    spec: AttentionSpec, mask_RT: Tensor | None, q_RHD: Tensor, k_HTD: Tensor, v_HTD: Tensor
) -> Partial:
    """The same in float32 from matrix products, for what the fused kernel cannot do."""
    num_rows, num_kv_heads, group = len(q_RHD), spec.num_kv_heads, spec.group_size
    q_HRGD = q_RHD.float().view(num_rows, num_kv_heads, group, -1).transpose(0, 1)
    q_HRD = q_HRGD.reshape(num_kv_heads, num_rows * group, -1)
    # Keys on the left: for few rows this order of the product is over twice as fast.
    scores_HRT = (k_HTD.float() @ q_HRD.mT).mT.contiguous()
    scores_HRGT = _capped(spec, scores_HRT).view(num_kv_heads, num_rows, group, -1)
    if mask_RT is not None:
        scores_HRGT += mask_RT[:, None, :]
    lse_HRG = scores_HRGT.logsumexp(dim=3)
    weights_HRT = (scores_HRGT - lse_HRG[..., None]).exp_().flatten(1, 2)
    out_HRGD = (weights_HRT @ v_HTD.float()).view(num_kv_heads, num_rows, group, -1)
    return Partial(out_HRGD.transpose(0, 1).flatten(1, 2), lse_HRG.transpose(0, 1).flatten(1, 2))


def _attend_own_token(
    spec: AttentionSpec, schedule: Schedule, q: Tensor, k: Tensor, v: Tensor
) -> Partial:
    """One-row spans and their own token: a softmax over one score is 1, so its value comes out."""
    group = spec.group_size
    q_RHGD = q[schedule.single_rows].float().view(-1, spec.num_kv_heads, group, spec.head_dim_k)
    k_RHD = k[schedule.single_tokens].float()
    scores_RHG = _capped(spec, (q_RHGD * k_RHD[:, :, None]).sum(dim=3))
    out_RHD = v[schedule.single_tokens].float().repeat_interleave(group, dim=1)
    return Partial(out_RHD, scores_RHG.flatten(1, 2))


def _capped(spec: AttentionSpec, products: Tensor) -> Tensor:
    """float32 products of q and k -> scores."""
    if spec.softcap is None:
        return products * spec.scale
    return (products * (spec.scale / spec.softcap)).tanh_().mul_(spec.softcap)


def _combine(partials: Sequence[Partial], row_map: RowMap, num_rows: int) -> Partial:
    joined = concat(partials) if len(partials) > 1 else partials[0]
    if row_map.complete:
        return Partial(joined.out.float(), joined.lse)
    return merge_rows(joined, row_map.rows, num_rows)


def _indices(ranges: Sequence[slice]) -> Tensor:
    """int64: the numbers in all ranges, one range after the other."""
    pieces = [torch.arange(r.start, r.stop) for r in ranges]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
