"""From logits to tokens: penalties, temperature, top-k, top-p, min-p, and one draw per row.

Nothing here has state. A row's random number is a pure function of the sequence's seed and of how
many tokens it has already, so a sequence that is preempted, replayed or rebuilt draws the same
numbers; and every operation works row by row, so a row's token does not depend on its batch.

Tensor names end in their shape: R rows of the batch, S rows that need more than an argmax,
F rows with top-k or top-p, V vocabulary, K best tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lamina._native import argmax_rows
from lamina.types import SamplingParams, TokenLogprobs

_GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would leave one token anyway."""
_NUCLEUS_WIDTH = 1024
"""How many of the best tokens top-p looks at before it sorts the whole vocabulary."""
_MASK64 = 2**64 - 1
_NEVER = -math.inf
_NATIVE_ELEMENTS = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


class SamplerRow(NamedTuple):
    """What the sampler must know of the sequence behind one row of logits."""

    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    eos_token_ids: Sequence[int] = ()


class SampleResult(NamedTuple):
    """One entry per row. A row named in `errors` has token id -1 and must not be continued."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    errors: dict[int, str]


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) with which the sequence of this seed draws its output token `position`.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) of the mixed seed, with the position as counter.
    """
    state = _mix64(seed & _MASK64) + (position + 1) * 0x9E3779B97F4A7C15
    return (_mix64(state & _MASK64) >> 11) * 2.0**-53


def _mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


class Sampler:
    """Chooses the next token of every row, in the order of vLLM.

    Log-probabilities come from the raw logits. Then: repetition penalty (prompt and output),
    presence and frequency penalties (output), min_tokens, temperature, top-k, top-p (of what
    top-k leaves), min-p. Tokens that tie with the last one that top-k or top-p keeps are kept too.
    """

    def sample(self, logits_RV: Tensor, rows: Sequence[SamplerRow]) -> SampleResult:
        """Choose one token per row.

        Args:
            logits_RV: [R, V] of any floating type on any device, read only. What needs more than an
                argmax is computed in float32.
            rows: R descriptions, in the order of the logits.

        Blocks until the tokens are on the host. Does not raise for bad logits: such rows are
        reported in `SampleResult.errors`, the others are unaffected.
        """
        assert logits_RV.shape[0] == len(rows)
        if not rows:
            return SampleResult([], [], {})
        token_ids, best = _argmax(logits_RV)
        errors = {
            r: "the model's logits are NaN or infinite "
            f"after {len(rows[r].output_token_ids)} output tokens; try another dtype, "
            "and check that the checkpoint is sound"
            for r, value in enumerate(best)
            if not math.isfinite(value)
        }
        special = [r for r, row in enumerate(rows) if r not in errors and not _is_argmax(row)]
        if special:
            index_S = torch.tensor(special, device=logits_RV.device)
            chosen = _choose(logits_RV[index_S].float(), [rows[r] for r in special])
            for r, token_id in zip(special, chosen, strict=True):
                token_ids[r] = token_id
                if token_id < 0:
                    errors[r] = (
                        "min_tokens forbids every token that the model could continue with; "
                        "lower min_tokens or list fewer stop_token_ids"
                    )
        for r in errors:
            token_ids[r] = -1
        return SampleResult(token_ids, _row_logprobs(logits_RV, rows, token_ids), errors)


def prompt_logprobs(
    logits_RV: Tensor, target_token_ids: Sequence[int], num_top: int
) -> list[TokenLogprobs]:
    """Log-probabilities of the prompt tokens that follow R prompt rows.

    Args:
        logits_RV: [R, V] of any floating type, read only; row r is the logits after some prompt
            token.
        target_token_ids: the R tokens that come next in the prompt.
        num_top: how many of the most likely tokens to report at each position.
    """
    assert logits_RV.shape[0] == len(target_token_ids)
    return _token_logprobs(logits_RV, target_token_ids, [num_top] * len(target_token_ids))


def _argmax(logits_RV: Tensor) -> tuple[list[int], list[float]]:
    """Each row's best token, the first of equals, and its logit; NaN wins."""
    element = _NATIVE_ELEMENTS.get(logits_RV.dtype)
    if element is None or not logits_RV.is_cpu or logits_RV.stride(1) != 1:
        best_R, best_ids_R = logits_RV.max(dim=-1)
        return best_ids_R.tolist(), best_R.tolist()
    num_rows, vocab_size = logits_RV.shape
    return argmax_rows(element, logits_RV.data_ptr(), num_rows, vocab_size, logits_RV.stride(0))


def _masked_stops(row: SamplerRow) -> set[int]:
    """Token ids that would end the sequence before min_tokens."""
    params = row.params
    if len(row.output_token_ids) >= params.min_tokens:
        return set()
    return {*params.stop_token_ids, *(() if params.ignore_eos else row.eos_token_ids)}


def _has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < _GREEDY_BELOW or params.top_k == 1


def _is_argmax(row: SamplerRow) -> bool:
    return _is_greedy(row.params) and not _has_penalties(row.params) and not _masked_stops(row)


def _choose(logits_SV: Tensor, rows: Sequence[SamplerRow]) -> list[int]:
    """Tokens of rows with finite logits; -1 where no token is allowed. Overwrites its argument."""
    vocab_size = logits_SV.shape[1]
    for s, row in enumerate(rows):
        if _has_penalties(row.params):
            _penalise(logits_SV[s], row)
        if stops := [t for t in _masked_stops(row) if t < vocab_size]:
            logits_SV[s, stops] = _NEVER
    best_S, best_ids_S = logits_SV.max(dim=-1)
    chosen: list[int] = best_ids_S.masked_fill(best_S == _NEVER, -1).tolist()
    random = [s for s, row in enumerate(rows) if chosen[s] >= 0 and not _is_greedy(row.params)]
    if random:
        drawn = _draw(logits_SV[random], [rows[s] for s in random])
        for s, token_id in zip(random, drawn, strict=True):
            chosen[s] = token_id
    return chosen


def _penalise(logits_V: Tensor, row: SamplerRow) -> None:
    """Apply the row's penalties in place."""
    params = row.params
    output_counts_V = _count(row.output_token_ids, logits_V)
    if params.repetition_penalty != 1.0:
        seen_V = output_counts_V + _count(row.prompt_token_ids, logits_V) > 0
        factor_V = torch.where(
            logits_V > 0, 1.0 / params.repetition_penalty, params.repetition_penalty
        )
        logits_V.mul_(torch.where(seen_V, factor_V, 1.0))
    logits_V -= params.frequency_penalty * output_counts_V
    logits_V -= params.presence_penalty * (output_counts_V > 0)


def _count(token_ids: Sequence[int], like_V: Tensor) -> Tensor:
    """How often each token of the vocabulary occurs, int64 [V]."""
    ids = torch.tensor(list(token_ids), dtype=torch.long, device=like_V.device)
    return torch.bincount(ids, minlength=like_V.shape[0])


def _draw(logits_SV: Tensor, rows: Sequence[SamplerRow]) -> list[int]:
    """One random token per row, by inverse CDF in the order of token ids.

    Every row has a finite maximum. Overwrites its argument.
    """
    device, vocab_size = logits_SV.device, logits_SV.shape[1]
    temperature_S1 = torch.tensor([[row.params.temperature] for row in rows], device=device)
    # The maximum goes first, so that no temperature makes the division overflow upwards.
    x_SV = logits_SV.sub_(logits_SV.amax(dim=-1, keepdim=True)).div_(temperature_S1)

    lowest_S = torch.tensor(
        [math.log(row.params.min_p) if row.params.min_p > 0 else _NEVER for row in rows],
        device=device,
    )
    filtered = [
        s
        for s, row in enumerate(rows)
        if row.params.top_p < 1.0 or 0 < row.params.top_k < vocab_size
    ]
    if filtered:
        top_k_F = [rows[s].params.top_k for s in filtered]
        top_k_F = [k if 0 < k < vocab_size else vocab_size for k in top_k_F]
        top_p_F = [rows[s].params.top_p for s in filtered]
        lowest_F = _lowest_kept(x_SV[filtered], top_k_F, top_p_F)
        lowest_S[filtered] = torch.maximum(lowest_S[filtered], lowest_F)
    if filtered or any(row.params.min_p > 0 for row in rows):
        x_SV.masked_fill_(x_SV < lowest_S[:, None], _NEVER)

    weights_SV = x_SV.exp_()
    cdf_SV = weights_SV.cumsum(dim=-1, dtype=torch.float64)
    uniform_S1 = torch.tensor(
        [[uniform(row.seed, len(row.output_token_ids))] for row in rows],
        dtype=torch.float64,
        device=device,
    )
    chosen_S1 = torch.searchsorted(cdf_SV, uniform_S1 * cdf_SV[:, -1:], right=True)
    tokens: list[int] = chosen_S1.squeeze(1).tolist()
    return tokens


def _lowest_kept(
    x_FV: Tensor, top_k: Sequence[int], top_p: Sequence[float], width: int = _NUCLEUS_WIDTH
) -> Tensor:
    """The smallest value [F] that top-k and then top-p keep.

    `x_FV` holds scaled logits minus their maximum; top_k is V where it is off. Only the `width`
    best tokens (more if a top-k asks for more) are sorted, unless a nucleus does not fit into them.
    """
    device, vocab_size = x_FV.device, x_FV.shape[1]
    width = min(vocab_size, max(width, *(k for k in top_k if k < vocab_size), 1))
    values_FK = x_FV.topk(width, dim=-1).values
    weights_FK = values_FK.exp()
    mass_FK = weights_FK.cumsum(dim=-1, dtype=torch.float64)
    top_k_F1 = torch.tensor(top_k, device=device)[:, None]
    total_F1 = mass_FK.gather(1, (top_k_F1 - 1).clamp(max=width - 1))
    if width < vocab_size and max(top_k) == vocab_size:
        all_F1 = x_FV.exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
        total_F1 = torch.where(top_k_F1 > width, all_F1, total_F1)
    top_p_F1 = torch.tensor(top_p, dtype=torch.float64, device=device)[:, None]
    wanted_F1 = total_F1 * top_p_F1
    # A token stays while the tokens better than it have not reached the wanted mass.
    kept_FK = (mass_FK - weights_FK < wanted_F1) | (top_p_F1 == 1.0)
    kept_FK &= torch.arange(width, device=device) < top_k_F1
    last_F1 = (kept_FK.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    lowest_F = values_FK.gather(1, last_F1).squeeze(1)
    if width < vocab_size:
        unfinished = ((top_k_F1 > width) & (mass_FK[:, -1:] < wanted_F1)).squeeze(1)
        again = unfinished.nonzero().squeeze(1).tolist()
        if again:
            lowest_F[again] = _lowest_kept(
                x_FV[again], [top_k[f] for f in again], [top_p[f] for f in again], vocab_size
            )
    return lowest_F


def _row_logprobs(
    logits_RV: Tensor, rows: Sequence[SamplerRow], token_ids: Sequence[int]
) -> list[TokenLogprobs | None]:
    result: list[TokenLogprobs | None] = [None] * len(rows)
    wanted = [
        (r, row.params.logprobs)
        for r, row in enumerate(rows)
        if row.params.logprobs is not None and token_ids[r] >= 0
    ]
    if wanted:
        index = [r for r, _ in wanted]
        logprobs = _token_logprobs(
            logits_RV[index], [token_ids[r] for r in index], [n for _, n in wanted]
        )
        for r, entry in zip(index, logprobs, strict=True):
            result[r] = entry
    return result


def _token_logprobs(
    logits_RV: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """Log-probability, rank and best alternatives of one given token per row."""
    if not token_ids:
        return []
    logprobs_RV = logits_RV.log_softmax(dim=-1, dtype=torch.float32)
    ids_R1 = torch.tensor(token_ids, device=logits_RV.device)[:, None]
    own_R1 = logprobs_RV.gather(1, ids_R1)
    ranks = ((logprobs_RV > own_R1).sum(dim=-1) + 1).tolist()
    top_RK, top_ids_RK = logprobs_RV.topk(min(max(num_top), logits_RV.shape[1]), dim=-1)
    return [
        TokenLogprobs(
            token_id=token_id,
            logprob=logprob,
            rank=rank,
            # Equal values in the order of their ids: topk alone does not fix one.
            top=tuple(sorted(zip(ids, values, strict=True), key=lambda e: (-e[1], e[0]))[:n]),
        )
        for token_id, logprob, rank, ids, values, n in zip(
            token_ids,
            own_R1.squeeze(1).tolist(),
            ranks,
            top_ids_RK.tolist(),
            top_RK.tolist(),
            num_top,
            strict=True,
        )
    ]
