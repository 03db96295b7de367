"""How model families differ where no field of their configs says so."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Field(msgspec.Struct, frozen=True):
    """A setting that the config's field `name` says, else `default`."""

    name: str
    default: bool


Flag = bool | Field


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """The differences of one `model_type` to Llama's arrangement."""

    tied: bool = False
    """Whether the token table makes the logits too, unless the config says."""
    head_dim: int | None = None
    """Unless the config says; None: hidden size over heads."""
    gated: bool = True
    """The MLP has a gate: three matrices, not two."""
    norms: int = 2
    """Per layer, beside those of q and k."""
    norm_vectors: int = 1
    """Parameter vectors of a norm: 2 with a bias, 0 without parameters."""
    qkv_bias: Flag = False
    out_bias: Flag = False
    mlp_bias: Flag = False
    router_bias: bool = False
    head_bias: bool = False
    sinks: bool = False
    qk_norm: Literal["head", "width"] | None = None
    """Norms of q and k: of one head's size, or of all heads together."""
    qk_norm_if: Flag = True
    position_padding: int | None = None
    """Rows of the table of learned positions beyond the context length; None: no such table."""
    window: int | None = None
    """Unless the config says."""
    window_if: Flag = True
    full_every: int | None = None
    """Unless the config says: each so-many-th layer has no window; None: all have one."""
    window_from: str | None = None
    """Unless the config says: field with the first layer that has a window."""


_BIAS = Field("attention_bias", False)
_ATTENTION: dict[str, Any] = {"qkv_bias": _BIAS, "out_bias": _BIAS}
_LLAMA: dict[str, Any] = _ATTENTION | {"mlp_bias": Field("mlp_bias", False)}
_GEMMA: dict[str, Any] = _ATTENTION | {"tied": True, "head_dim": 256}
_PLAIN: dict[str, Any] = {"gated": False, "norm_vectors": 2, "mlp_bias": True}
_QWEN: dict[str, Any] = {"window_if": Field("use_sliding_window", False)}


def _biases(flag: Flag) -> dict[str, Any]:
    return {"qkv_bias": flag, "out_bias": flag, "mlp_bias": flag}


FAMILIES: dict[str, Family] = {
    "cohere": Family(
        tied=True, norms=1, qk_norm="width", qk_norm_if=Field("use_qk_norm", False), **_ATTENTION
    ),
    "cohere2": Family(tied=True, norms=1, window=4096, full_every=4, **_ATTENTION),
    "deepseek_v2": Family(**_LLAMA),
    "deepseek_v3": Family(**_ATTENTION),
    "gemma": Family(**_GEMMA),
    "gemma2": Family(norms=4, window=4096, full_every=2, **_GEMMA),
    "gemma3_text": Family(norms=4, window=4096, full_every=6, qk_norm="head", **_GEMMA),
    "gpt2": Family(tied=True, qkv_bias=True, out_bias=True, position_padding=0, **_PLAIN),
    "gpt_neox": Family(
        qkv_bias=Field("attention_bias", True), out_bias=Field("attention_bias", True), **_PLAIN
    ),
    "gpt_oss": Family(
        head_dim=64, router_bias=True, sinks=True, window=128, full_every=2,
        qkv_bias=Field("attention_bias", True), out_bias=Field("attention_bias", True),
        mlp_bias=True,
    ),
    "granite": Family(**_LLAMA),
    "llama": Family(**_LLAMA),
    "mistral": Family(window=4096),
    "mixtral": Family(),
    "olmo": Family(norm_vectors=0, **_ATTENTION),
    "olmo2": Family(qk_norm="width", **_ATTENTION),
    "opt": Family(
        tied=True, gated=False, norm_vectors=2, position_padding=2,
        **_biases(Field("enable_bias", True)),
    ),
    "phi": Family(
        norms=1, qkv_bias=True, out_bias=True, head_bias=True, qk_norm="head",
        qk_norm_if=Field("qk_layernorm", False), **_PLAIN,
    ),
    "phi3": Family(),
    "qwen2": Family(qkv_bias=True, window_from="max_window_layers", **_QWEN),
    "qwen2_moe": Family(qkv_bias=Field("qkv_bias", True), **_QWEN),
    "qwen3": Family(qk_norm="head", window_from="max_window_layers", **_ATTENTION, **_QWEN),
    "qwen3_moe": Family(qk_norm="head", **_ATTENTION, **_QWEN),
    "smollm3": Family(tied=True, **_LLAMA, **_QWEN),
    "starcoder2": Family(
        tied=True, gated=False, norm_vectors=2, **_biases(Field("use_bias", True))
    ),
}  # fmt: skip
