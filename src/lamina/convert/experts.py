"""Mixture-of-experts layers in a form that exports with any token count and runs well on a CPU.

transformers' own implementations either branch on the routing (not exportable) or gather one copy
of an expert's weights per routed token. Here each projection is one opaque op that visits the hit
experts; everything else (gate, activation, weighting) is ordinary traced code of the model, so no
model needs code of its own.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.library.custom_op("lamina::expert_linear", mutates_args=())
def expert_linear(
    rows_ND: torch.Tensor,
    weight_EOD: torch.Tensor,
    bias_EO: torch.Tensor | None,
    expert_N: torch.Tensor,
    transposed: bool,
    first_expert: int = 0,
) -> torch.Tensor:
    """Row n through expert `expert_N[n]`'s linear layer.

    Args:
        rows_ND: [N, D].
        weight_EOD: [E, O, D], or [E, D, O] when `transposed`.
        bias_EO: [E, O] or None.
        expert_N: [N] int64, not negative.
        first_expert: the weights are those of experts [first_expert, first_expert + E).

    Returns:
        [N, O], in the order of `rows_ND`; zeros for rows of other experts.
    """
    num_out = weight_EOD.shape[2] if transposed else weight_EOD.shape[1]
    out_NO = rows_ND.new_empty(rows_ND.shape[0], num_out)
    order_N = torch.argsort(expert_N, stable=True)
    stop = 0
    for number, count in enumerate(torch.bincount(expert_N, minlength=len(weight_EOD)).tolist()):
        if count == 0:
            continue
        chosen = order_N[stop : stop + count]
        stop += count
        expert = number - first_expert
        if not 0 <= expert < len(weight_EOD):
            out_NO[chosen] = 0
            continue
        weight_OD = weight_EOD[expert].t() if transposed else weight_EOD[expert]
        bias_O = None if bias_EO is None else bias_EO[expert]
        out_NO[chosen] = torch.nn.functional.linear(rows_ND[chosen], weight_OD, bias_O)
    return out_NO


@expert_linear.register_fake
def _expert_linear_fake(
    rows_ND: torch.Tensor,
    weight_EOD: torch.Tensor,
    bias_EO: torch.Tensor | None,
    expert_N: torch.Tensor,
    transposed: bool,
    first_expert: int = 0,
) -> torch.Tensor:
    return rows_ND.new_empty(rows_ND.shape[0], weight_EOD.shape[2 if transposed else 1])


def experts_forward(
    module: Any, hidden_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """An implementation for transformers' experts interface; `module` is its experts module.

    Args:
        hidden_TD: [T, D].
        expert_TK: [T, K] int64, the K experts of each token.
        weight_TK: [T, K], their routing weights.

    Returns:
        [T, D] in `hidden_TD`'s dtype, the weighted sum of the experts' outputs.
    """
    num_rows, num_chosen = expert_TK.shape
    rows_ND = hidden_TD.unsqueeze(1).expand(-1, num_chosen, -1).reshape(num_rows * num_chosen, -1)
    expert_N = expert_TK.reshape(num_rows * num_chosen)

    def project(name: str, rows: torch.Tensor) -> torch.Tensor:
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        out: torch.Tensor = expert_linear(
            rows, getattr(module, name), bias, expert_N, module.is_transposed
        )
        return out

    if module.has_gate:
        rows_ND = module._apply_gate(project("gate_up_proj", rows_ND))
    else:
        rows_ND = module.act_fn(project("up_proj", rows_ND))
    rows_ND = project("down_proj", rows_ND)
    if getattr(module, "has_post_expert_norm", False):
        rows_ND = module.post_expert_norm(rows_ND)
    weighted_TKD = rows_ND.view(num_rows, num_chosen, -1) * weight_TK.unsqueeze(-1)
    out_TD: torch.Tensor = weighted_TKD.sum(dim=1).to(hidden_TD.dtype)
    return out_TD
