"""The row-wise operations that passes put in place of what transformers wrote out.

Each is a plain function over torch tensors that rounds where the eager model rounds: the meaning of
the operation, run as it is wherever the native code does not apply.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, rounds_once: bool) -> Tensor:
    """x / rms(x) * weight over the last dimension, in float32.

    Args:
        weight: of the last dimension's size.
        rounds_once: round to x's dtype after the weight (Gemma), not before and after it (Llama).
    """
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return y.to(x.dtype)
    return (y * weight.float()).to(x.dtype) if rounds_once else weight * y.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def activation(x: Tensor, gate: Tensor | None, name: str) -> Tensor:
    """One of ACTIVATIONS of x, times `gate` of the same shape if there is one."""
    y = ACTIVATIONS[name](x)
    return y if gate is None else y * gate


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R of the last dimension's elements, half against half; keep the others.

    Args:
        cos, sin: last dimension R, otherwise broadcast against x.
    """
    width = cos.shape[-1]
    rotated, kept = x[..., :width], x[..., width:]
    first, second = rotated.chunk(2, dim=-1)
    y = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((y, kept), dim=-1) if kept.shape[-1] else y


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, is_transposed: bool
) -> Tensor:
    """residual + (x @ weight^T + bias).

    Args:
        weight: [outputs, inputs], or [inputs, outputs] if `is_transposed`.
        residual: of the result's shape.
    """
    y = functional.linear(x, weight.T if is_transposed else weight, bias)
    return y if residual is None else residual + y
