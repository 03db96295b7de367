"""Run a sliced model without any of Lamina's workers or kernels."""

from __future__ import annotations

import torch

from lamina.attention.spec import AttentionSpec
from lamina.convert import SlicedModel


def plain_attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    spec: AttentionSpec,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of one sequence's rows, one query at a time, in float64."""
    num_rows = len(q_THD)
    out_THD = torch.empty(num_rows, spec.num_query_heads, spec.head_dim_v, dtype=torch.float64)
    for head in range(spec.num_query_heads):
        k_TD = k_THD[:, head // spec.group_size].double()
        v_TD = v_THD[:, head // spec.group_size].double()
        for row in range(num_rows):
            first = 0 if spec.window is None else max(0, row - spec.window + 1)
            scores = spec.scale * (k_TD[first : row + 1] @ q_THD[row, head].double())
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            weights = scores.exp()
            total = weights.sum()
            if sinks_H is not None:
                total = total + sinks_H[head].double().exp()
            out_THD[row, head] = (weights / total) @ v_TD[first : row + 1]
    return out_THD.to(q_THD.dtype)


def run_slices(model: SlicedModel, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """All rows of all sequences in one step; float32 logits [T, V] of each sequence."""
    lengths = [len(ids) for ids in sequences]
    state = model.begin(
        torch.cat(sequences),
        torch.cat([torch.arange(length) for length in lengths]),
        torch.arange(sum(lengths)),
    )
    for layer, (spec, sinks) in enumerate(zip(model.attention_specs, model.sinks, strict=True)):
        q = model.run_q(layer, state)
        k, v = model.run_kv(layer, state)
        model.run_deferred(layer, state)
        assert q.is_contiguous()
        assert k.is_contiguous()
        assert v.is_contiguous()
        parts = [x.split(lengths) for x in (q, k, v)]
        state.attention_output = torch.cat(
            [plain_attention(*rows, spec, sinks) for rows in zip(*parts, strict=True)]
        )
    logits = model.run_last(state)
    assert logits.dtype == model.dtype
    assert all(value is None for value in state.values), "every value is dropped after its last use"
    return list(logits.float().split(lengths))
