"""The cut point: `lamina::attention`, which every attention layer becomes in the traced graph.

Shapes: T tokens (rows), Hq query heads, Hkv KV heads, Dk and Dv head sizes.

The sliced model never runs this op: slices end before it and begin after it. Its implementation
exists so that a traced graph can be run whole and compared with transformers; it treats the T rows
as one sequence and computes in float32.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("lamina::attention", mutates_args=())
def attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of T rows among themselves, as `AttentionSpec` defines it.

    Args:
        q_THD: [T, Hq, Dk], contiguous.
        k_THD: [T, Hkv, Dk], contiguous; Hkv divides Hq.
        v_THD: [T, Hkv, Dv], contiguous.
        layer: the layer's index in the model; not used in the computation.
        sinks_H: [Hq], one more score per query head with a value of zeros.

    Returns:
        [T, Hq, Dv] in q's dtype.
    """
    num_rows, num_query_heads, _ = q_THD.shape
    group_size = num_query_heads // k_THD.shape[1]
    k_HTD = k_THD.float().repeat_interleave(group_size, dim=1).transpose(0, 1)
    v_HTD = v_THD.float().repeat_interleave(group_size, dim=1).transpose(0, 1)
    scores_HTT = scale * (q_THD.float().transpose(0, 1) @ k_HTD.transpose(1, 2))
    if softcap is not None:
        scores_HTT = softcap * torch.tanh(scores_HTT / softcap)
    position_T = torch.arange(num_rows, device=q_THD.device)
    distance_TT = position_T[:, None] - position_T[None, :]
    hidden_TT = distance_TT < 0
    if window is not None:
        hidden_TT |= distance_TT >= window
    scores_HTT = scores_HTT.masked_fill(hidden_TT, float("-inf"))
    if sinks_H is not None:
        sinks_HT1 = sinks_H.float()[:, None, None].expand(-1, num_rows, 1)
        scores_HTT = torch.cat([scores_HTT, sinks_HT1], dim=-1)
    weights_HTT = torch.softmax(scores_HTT, dim=-1)[..., :num_rows]
    return (weights_HTT @ v_HTD).transpose(0, 1).to(q_THD.dtype).contiguous()


@attention.register_fake
def _attention_fake(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    return q_THD.new_empty(q_THD.shape[0], q_THD.shape[1], v_THD.shape[2])
