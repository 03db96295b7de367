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


def run_in_turns(models: list[SlicedModel], ids: torch.Tensor) -> torch.Tensor:
    """One sequence over replicas: slice i runs on models[i % n]; float32 logits [T, V]."""
    num_rows = len(ids)
    states = [m.begin(ids, torch.arange(num_rows), torch.arange(num_rows)) for m in models]
    attention_output = payload = None
    for layer in range(models[0].num_layers + 1):
        model, state = models[layer % len(models)], states[layer % len(models)]
        if layer and payload is not None:
            state.attention_output = attention_output
            model.import_context(layer - 1, state, payload)
        if layer == model.num_layers:
            return model.run_last(state).float()
        q = model.run_q(layer, state)
        k, v = model.run_kv(layer, state)
        model.run_deferred(layer, state)
        spec, sinks = model.attention_specs[layer], model.sinks[layer]
        attention_output = plain_attention(q, k, v, spec, sinks)
        parts = model.export_context(layer, state)
        payload = torch.cat([part.view(-1).view(torch.uint8) for part in parts])
        assert len(payload) == model.context_bytes(layer, num_rows)
    raise AssertionError("the last slice returns")
