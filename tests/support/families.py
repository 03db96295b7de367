"""Tiny random-weight models, one per model family that Lamina promises to serve.

Every model has 6 KV heads where the family's heads are free to choose, so that partitions over
1, 2 and 3 workers all divide, windows of 8 tokens, a vocabulary of 128, and weights spread widely
enough that greedy decoding has no near-ties in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB_SIZE = 128
WINDOW = 8
SEED = 20

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_HEADS: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 8,
}
_DENSE: dict[str, Any] = {**_COMMON, **_HEADS, "intermediate_size": 80, "num_hidden_layers": 3}
_WINDOW_THEN_FULL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}


def _without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**_DENSE),
    "mistral": lambda: hf.MistralConfig(**_DENSE, sliding_window=WINDOW),
    "qwen2": lambda: hf.Qwen2Config(
        **{**_without(_DENSE, "head_dim"), "tie_word_embeddings": True, "hidden_size": 96}
    ),
    "qwen3": lambda: hf.Qwen3Config(**_DENSE),
    "gemma2": lambda: hf.Gemma2Config(
        **{**_DENSE, "num_hidden_layers": 4, "tie_word_embeddings": True},
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=_WINDOW_THEN_FULL,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=30.0,
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **{**_DENSE, "num_hidden_layers": 4, "tie_word_embeddings": True},
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=_WINDOW_THEN_FULL,
    ),
    "phi3": lambda: hf.Phi3Config(
        **{**_without(_DENSE, "head_dim"), "hidden_size": 96}, sliding_window=WINDOW
    ),
    "phi": lambda: hf.PhiConfig(
        **{**_without(_DENSE, "head_dim"), "hidden_size": 96}, partial_rotary_factor=0.5
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(
        **{**_without(_DENSE, "head_dim", "num_key_value_heads"), "num_attention_heads": 6},
        rotary_pct=0.5,
    ),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=512,
        n_embd=48,
        n_layer=3,
        n_head=6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "opt": lambda: hf.OPTConfig(
        **_without(_COMMON, "tie_word_embeddings"),
        hidden_size=48,
        num_attention_heads=6,
        ffn_dim=80,
        num_hidden_layers=3,
        word_embed_proj_dim=48,
        tie_word_embeddings=True,
    ),
    "cohere2": lambda: hf.Cohere2Config(
        **{**_without(_DENSE, "head_dim"), "hidden_size": 96, "num_hidden_layers": 4},
        sliding_window=WINDOW,
        layer_types=_WINDOW_THEN_FULL,
        logit_scale=0.5,
    ),
    "gpt_oss": lambda: hf.GptOssConfig(
        **{**_DENSE, "num_hidden_layers": 4, "intermediate_size": 32},
        **_EXPERTS,
        num_local_experts=4,
        sliding_window=WINDOW,
        layer_types=_WINDOW_THEN_FULL,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "mixtral": lambda: hf.MixtralConfig(
        **{**_DENSE, "num_hidden_layers": 2, "intermediate_size": 32},
        **_EXPERTS,
        num_local_experts=4,
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **{**_DENSE, "num_hidden_layers": 2},
        **_EXPERTS,
        moe_intermediate_size=32,
        num_experts=4,
        norm_topk_prob=True,
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **{**_without(_DENSE, "head_dim"), "num_key_value_heads": 12},
        num_experts_per_tok=2,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
    ),
}


def tiny_model(config: PretrainedConfig, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of `config` in transformers' eager implementation, with spread-out weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    fan_in = parameter.shape[-1]
                    parameter.normal_(0.0, 1.5 / fan_in**0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
            if config.tie_word_embeddings:
                # Else each token's own embedding wins the logits and greedy output repeats it.
                model.get_input_embeddings().weight.mul_(0.3)
        model.tie_weights()
    return model.eval()


def save_tiny_model(
    family: str, folder: Path, *, dtype: torch.dtype = torch.float32, **save_options: Any
) -> Path:
    """Write a checkpoint of the family into `folder` (config.json and safetensors)."""
    tiny_model(FAMILIES[family](), dtype=dtype).save_pretrained(folder, **save_options)
    return folder
