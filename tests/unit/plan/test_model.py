"""Costs from configs, beside transformers' own models and the converter's counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from lamina.convert import convert_structure
from lamina.errors import ConfigError
from lamina.plan.model import ModelCost, load_model, model_cost, named_configs
from support.families import FAMILIES

_SHAPE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 12, "num_key_value_heads": 6, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_OPT: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 96, "ffn_dim": 80, "num_hidden_layers": 2,
    "num_attention_heads": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OTHERS: dict[str, PretrainedConfig] = {
    "gemma": hf.GemmaConfig(**_SHAPE, head_dim=8),
    "granite": hf.GraniteConfig(**_SHAPE),
    "olmo": hf.OlmoConfig(**_SHAPE),
    "olmo2": hf.Olmo2Config(**_SHAPE),
    "cohere": hf.CohereConfig(**_SHAPE, use_qk_norm=True),
    "qwen2_moe": hf.Qwen2MoeConfig(
        **_SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=24, mlp_only_layers=[1],
    ),
    "deepseek_v2": hf.DeepseekV2Config(
        **_SHAPE | {"num_key_value_heads": 12}, n_routed_experts=8, n_shared_experts=2,
        num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1,
        q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
        topk_method="greedy",
    ),
    "starcoder2": hf.Starcoder2Config(**_SHAPE, sliding_window=8),
    "smollm3": hf.SmolLM3Config(**_SHAPE),
    "llama with biases": hf.LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True),
    "phi with norms of q and k": hf.PhiConfig(**_SHAPE, qk_layernorm=True),
    "qwen3 with windows": hf.Qwen3Config(
        **_SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1,
        attention_bias=True,
    ),
    "opt with narrow embeddings": hf.OPTConfig(
        **_OPT, word_embed_proj_dim=48, do_layer_norm_before=False
    ),
    "opt without biases": hf.OPTConfig(**_OPT, word_embed_proj_dim=96, enable_bias=False),
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {name: make() for name, make in FAMILIES.items()} | OTHERS

_ROWS = 5


def written(config: PretrainedConfig) -> dict[str, Any]:
    """What config.json would hold."""
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return fields


def cost_of(name: str) -> ModelCost:
    return model_cost(written(CONFIGS[name]), name=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_transformers_model(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    parameters = dict(model.named_parameters())
    cost = cost_of(name)
    assert cost.num_params == sum(p.numel() for p in parameters.values())
    for index, layer in enumerate(cost.layers):
        own = [p.numel() for n, p in parameters.items() if f".{index}." in n]
        if "narrow embeddings" not in name:  # their projections count to the first layer
            assert layer.weight_params == sum(own)


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_of_the_transformers_model(name: str) -> None:
    """Eager attention computes the whole square of rows, so that is what is counted beside."""
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name], attn_implementation="eager", experts_implementation="batched_mm"
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, _ROWS, dtype=torch.long), use_cache=False)
    cost = cost_of(name)
    assert counter.get_total_flops() == cost.slice_flops(_ROWS) + _ROWS * sum(
        2 * x.query_heads * (x.head_dim_k + x.head_dim_v) * _ROWS for x in cost.layers
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_what_crosses_is_what_the_converter_counts(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    config.save_pretrained(tmp_path)
    explanation = convert_structure(tmp_path, dtype="bfloat16").explain()
    cost = load_model(tmp_path)
    item = cost.bytes_per_element
    cost = msgspec.structs.replace(cost, bytes_per_element=2.0)
    assert item in (2.0, 4.0)
    assert len(cost.layers) == explanation.num_layers
    for layer, counted in zip(cost.layers, explanation.layers, strict=True):
        assert 2 * layer.query_heads * layer.head_dim_k == counted.q_bytes_per_token
        assert 2 * layer.kv_heads * layer.head_dim_k == counted.k_bytes_per_token
        assert 2 * layer.kv_heads * layer.head_dim_v == counted.v_bytes_per_token
        assert 2 * layer.query_heads * layer.head_dim_v == counted.out_bytes_per_token
        assert layer.window == counted.window
    assert cost.hop_bytes_per_row == explanation.hop_bytes_per_token
    assert cost.kv_bytes_per_token == sum(
        x.k_bytes_per_token + x.v_bytes_per_token for x in explanation.layers
    )


@pytest.mark.parametrize("name", ["qwen3 with windows", "starcoder2", "qwen2_moe"])
def test_windows_of_other_families_are_those_of_the_converter(name: str, tmp_path: Path) -> None:
    CONFIGS[name].save_pretrained(tmp_path)
    explanation = convert_structure(tmp_path, dtype="float32").explain()
    assert [x.window for x in cost_of(name).layers] == [x.window for x in explanation.layers]


def test_older_configs_leave_out_what_is_the_default() -> None:
    gemma2 = written(CONFIGS["gemma2"])
    for field in ("layer_types", "tie_word_embeddings"):
        del gemma2[field]
    assert [x.window for x in model_cost(gemma2, name="g").layers] == [8, None, 8, None]
    assert model_cost(gemma2, name="g").tied
    gpt2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768,
            "n_layer": 12, "n_head": 12}  # fmt: skip
    assert model_cost(gpt2, name="gpt2").num_params == 124_439_808


def test_the_text_part_of_a_config_is_used() -> None:
    outer = {"model_type": "gemma3", "text_config": written(CONFIGS["gemma3"])}
    assert model_cost(outer, name="g").num_params == cost_of("gemma3").num_params


class TestMixtureOfExperts:
    def test_one_row_touches_its_own_experts(self) -> None:
        layer = cost_of("mixtral").layers[0]
        assert (layer.num_experts, layer.experts_per_token) == (4, 2)
        assert layer.experts_touched(1) == pytest.approx(2)
        assert layer.params_touched(1) == pytest.approx(
            layer.weight_params - 2 * layer.params_per_expert
        )

    def test_many_rows_touch_all(self) -> None:
        layer = cost_of("mixtral").layers[0]
        assert layer.params_touched(1000) == pytest.approx(layer.weight_params)

    def test_the_expectation_is_that_of_random_choices(self) -> None:
        layer = cost_of("deepseek_v3").layers[1]
        generator = torch.Generator().manual_seed(0)
        choices = torch.rand(4000, 3, layer.num_experts, generator=generator).topk(
            layer.experts_per_token
        )
        touched = [len(set(trial.flatten().tolist())) for trial in choices.indices]
        assert layer.experts_touched(3) == pytest.approx(sum(touched) / len(touched), rel=0.02)

    def test_dense_layers_before_them_have_none(self) -> None:
        dense, sparse = cost_of("deepseek_v3").layers[:2]
        assert dense.num_experts == 0
        assert dense.params_touched(1) == dense.weight_params
        assert sparse.num_experts == 8


class TestBytes:
    def test_a_step_reads_the_weights_once_and_grows_with_its_rows(self) -> None:
        cost = cost_of("llama")
        fixed = cost.slice_bytes(0)
        assert fixed == cost.weight_bytes() - cost.embedding_params * cost.bytes_per_param
        assert cost.slice_bytes(8) - fixed == pytest.approx(8 * (cost.slice_bytes(1) - fixed))

    def test_tied_heads_are_read_though_they_are_no_memory_of_their_own(self) -> None:
        cost = cost_of("qwen2")
        assert cost.tied
        assert cost.slice_bytes(0) == cost.weight_bytes()

    def test_only_asked_logits_cost(self) -> None:
        cost = cost_of("llama")
        saved = cost.slice_flops(8) - cost.slice_flops(8, logit_rows=1)
        assert saved == 2 * 7 * 48 * 128
        assert cost.slice_bytes(8, logit_rows=1) < cost.slice_bytes(8)

    def test_windows_bound_what_is_read_not_what_is_kept(self) -> None:
        cost = cost_of("gemma2")
        assert cost.attention_bytes(8) == cost.kv_bytes(8)
        assert cost.attention_bytes(100) == 2 * (8 + 100) / 400 * cost.kv_bytes(100)
        assert cost.kv_bytes(100) == 100 * cost.kv_bytes_per_token
        assert cost.attention_flops(100) == 2 * 2 * 12 * 16 * (8 + 100)

    def test_types_of_weights_and_cache_are_free(self) -> None:
        cost = msgspec.structs.replace(cost_of("llama"), bytes_per_param=1, bytes_per_element=2)
        assert cost.weight_bytes() == cost.num_params
        assert cost.weight_bytes(4) == 4 * cost.num_params
        assert cost.kv_bytes_per_token == 2 * 3 * 2 * 6 * 8


class TestLatentAttention:
    def test_deepseek_v3_keeps_576_elements_per_layer_when_compressed(self) -> None:
        config = written(CONFIGS["deepseek_v3"]) | {
            "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512,
            "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        }  # fmt: skip
        cost = model_cost(config, name="d")
        assert cost.kv_bytes_per_token == 3 * cost.bytes_per_element * 128 * (192 + 128)
        small = cost.compressed()
        assert small.kv_bytes_per_token == 3 * cost.bytes_per_element * 576
        assert small.attention_flops(1) == 3 * 2 * 128 * (576 + 512)
        assert small.num_params == cost.num_params

    def test_other_models_have_nothing_to_compress(self) -> None:
        assert cost_of("llama").compressed() == cost_of("llama")


class TestNamedModels:
    def test_sizes_of_the_papers_models(self) -> None:
        """The paper prints 64.7, 130.1 and 137.5 GB; our counts without the token table, which is
        looked up and not multiplied, are within 1.2 %."""
        for name, gigabytes, layers, hidden, group in (
            ("LLaMA-33B", 64.7, 60, 6656, 1),
            ("LLaMA-65B", 130.1, 80, 8192, 1),
            ("LLaMA3-70B", 137.5, 80, 8192, 8),
        ):
            cost = load_model(name)
            multiplied = cost.weight_bytes() - 2 * cost.embedding_params
            assert multiplied / 1e9 == pytest.approx(gigabytes, rel=0.012)
            assert (len(cost.layers), cost.hidden_size) == (layers, hidden)
            assert cost.layers[0].query_heads == group * cost.layers[0].kv_heads

    def test_hops_of_the_papers_formula(self) -> None:
        """(2 + 2/G) e d L bytes per row."""
        for name, group in (("LLaMA-65B", 1), ("LLaMA3-70B", 8)):
            assert load_model(name).hop_bytes_per_row == (2 + 2 / group) * 2 * 8192 * 80

    def test_sizes_of_llama_2(self) -> None:
        assert load_model("Llama-2-7B").num_params == 6_738_415_616
        assert load_model("llama 2 13b").num_params == 13_015_864_320

    def test_each_has_a_source(self) -> None:
        for config in named_configs().values():
            assert "https://" in config["source"]


_LLAMA = written(CONFIGS["llama"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_LLAMA | {"model_type": "lama"}, "model_type 'lama' is unknown; did you mean llama"),
        ({}, "model_type 'nothing' is unknown"),
        ({k: v for k, v in _LLAMA.items() if k != "hidden_size"}, "has no hidden_size or n_embd"),
        (_LLAMA | {"vocab_size": "many"}, "vocab_size must be a positive whole number, got 'many'"),
        (_LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number"),
        (_LLAMA | {"num_key_value_heads": 5}, "num_key_value_heads must be a divisor of 12, got 5"),
        (_LLAMA | {"num_key_value_heads": 0}, "num_key_value_heads must be a divisor of 12, got 0"),
        (_LLAMA | {"dtype": "float8"}, "dtype must be one of float32"),
        (_LLAMA | {"quantization_config": {}}, "quantized"),
        (_LLAMA | {"layer_types": ["full_attention"]}, "layer_types must be 3 entries, got 1"),
        (_LLAMA | {"layer_types": ["linear_attention"] * 3}, "layer_types must be full_attention"),
        (
            written(CONFIGS["mixtral"]) | {"num_experts_per_tok": 9},
            "num_experts_per_tok must be at most 4, got 9",
        ),
    ],
)
def test_a_wrong_config_is_refused_with_the_reason(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_cost(config, name="m")


def test_models_are_found_by_name_folder_or_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(_LLAMA))
    assert load_model(tmp_path).num_params == load_model(file).num_params
    assert load_model(tmp_path).name == tmp_path.name
    with pytest.raises(ConfigError, match="did you mean LLaMA-65B"):
        load_model("LLaMA-66B")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_model(tmp_path / "empty")
    file.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as a model's config"):
        load_model(tmp_path)
