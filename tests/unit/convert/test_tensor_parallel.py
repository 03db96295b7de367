"""What a rank's graph looks like: collectives, weights, refusals, explanation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers as hf
from transformers import PretrainedConfig
from typer import Typer
from typer.testing import CliRunner

from lamina._native import ThreadPool
from lamina.cli.convert import convert as convert_command
from lamina.convert import SlicedModel, TensorParallel, convert, convert_structure
from lamina.convert.explain import Explanation
from lamina.errors import ConfigError
from support.families import FAMILIES, save_tiny_model, tiny_model
from support.ranks import convert_ranks, run_ranks, run_sharded
from support.slices import plain_attention, run_slices

PROMPTS = [torch.arange(3, 12), torch.tensor([5])]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"))


def _explain(config: PretrainedConfig, rank: int, size: int) -> Explanation:
    return convert_structure(config, parallel=TensorParallel(rank=rank, size=size)).explain()


def test_heads_that_do_not_divide_are_refused_with_the_sizes_that_work() -> None:
    with pytest.raises(ConfigError, match="6 KV heads evenly; use 1 or 2 or 3 or 6"):
        _explain(FAMILIES["llama"](), 0, 4)


@pytest.mark.parametrize(("rank", "size"), [(0, 0), (2, 2), (-1, 2)])
def test_ranks_that_do_not_exist_are_refused(rank: int, size: int) -> None:
    with pytest.raises(ConfigError, match="tensor"):
        TensorParallel(rank=rank, size=size)


def test_one_rank_is_the_whole_model(llama: Path) -> None:
    model = convert(llama, parallel=TensorParallel(rank=0, size=1))
    explanation = model.explain()
    assert explanation.last.collectives == ()
    assert all(layer.collectives == () for layer in explanation.layers)
    for got, want in zip(
        run_slices(model, PROMPTS), run_slices(convert(llama), PROMPTS), strict=True
    ):
        assert torch.equal(got, want)


def test_the_explanation_says_where_ranks_meet_and_how_much_they_say() -> None:
    explanation = _explain(FAMILIES["llama"](), 1, 2)
    first, *others = explanation.layers
    assert first.collectives == ()
    for layer in others:
        assert [(c.kind, c.module, c.bytes_per_token) for c in layer.collectives] == [
            ("all_reduce", f"model.layers.{layer.layer - 1}.self_attn.o_proj", 48 * 4),
            ("all_reduce", f"model.layers.{layer.layer - 1}.mlp.down_proj", 48 * 4),
        ]
    *_, gather = explanation.last.collectives
    assert (gather.kind, gather.module, gather.bytes_per_token) == ("all_gather", "lm_head", 512)
    summary = explanation.tensor_parallel
    assert summary is not None
    assert (summary.rank, summary.size) == (1, 2)
    assert summary.replicated == ("model.embed_tokens.weight",)
    assert summary.all_reduce_bytes_per_token == 3 * 2 * 48 * 4
    assert "rank 1 of 2" in str(explanation)
    assert "all_reduce model.layers.0.mlp.down_proj (192 B)" in str(explanation)
    again = msgspec.json.decode(msgspec.json.encode(explanation), type=Explanation)
    assert again == explanation


def test_the_command_shows_rank_0(llama: Path) -> None:
    app = Typer()
    app.command()(convert_command)
    arguments = [str(llama), "--explain", "--tensor-parallel-size", "2"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "all_reduce: 192 B" in done.output
    assert "Rank 0 of 2" in done.output


def _programs_of(num_layers: int) -> int:
    config = FAMILIES["llama"]()
    config.num_hidden_layers = num_layers
    return convert_structure(config, parallel=TensorParallel(rank=0, size=2)).num_programs


def test_equal_layers_of_a_rank_share_programs() -> None:
    assert _programs_of(5) == _programs_of(3)


def _weights(model: SlicedModel) -> list[torch.Tensor]:
    return [
        weight
        for part in model.slices
        for stage in (part.q, part.kv, part.deferred)
        for weight in (stage.weights if stage else ())
    ]


def test_parts_are_memory_of_their_own_and_the_rest_is_freed(llama: Path) -> None:
    whole = {w.data_ptr(): w.nbytes for w in _weights(convert(llama))}
    embedding = 128 * 48 * 4
    for model in convert_ranks(llama, 2):
        mine = {w.data_ptr(): w for w in _weights(model)}
        assert all(w.untyped_storage().nbytes() == w.nbytes for w in mine.values())
        num_bytes = sum(w.nbytes for w in mine.values()) - embedding
        assert num_bytes == pytest.approx((sum(whole.values()) - embedding) / 2, rel=0.02)


def test_a_tied_head_s_part_is_a_view_of_the_embedding(tmp_path: Path) -> None:
    for rank, model in enumerate(convert_ranks(save_tiny_model("qwen2", tmp_path), 2)):
        (embedding,) = (w for w in _weights(model) if w.shape == (128, 96))
        (head,) = (w for w in _weights(model) if w.shape == (64, 96))
        assert head.data_ptr() == embedding[64 * rank :].data_ptr()


def test_biases_of_sums_are_added_once(tmp_path: Path) -> None:
    first, second = convert_ranks(save_tiny_model("gpt2", tmp_path), 2)
    assert [w.shape for w in _weights(first)].count((48,)) == 3 * (4 + 2) + 2, "norms and biases"
    assert [w.shape for w in _weights(second)].count((48,)) == 3 * 4 + 2, "norms alone"


def test_only_collectives_stand_between_native_calls(llama: Path) -> None:
    (model, _) = convert_ranks(llama, 2)
    model.optimize(ThreadPool(1))
    for part in model.slices[1:-1]:
        assert _calls(part.q) == ["native", "all_reduce", "native", "all_reduce", "native"]
        assert _calls(part.kv) == ["native"]


def _calls(stage: Any) -> list[str]:
    names = {"__call__": "native", "__getitem__": None}
    calls = []
    for node in stage.run.__self__.graph.nodes:
        if node.op.startswith("call"):
            name = names.get(node.target, getattr(node.target, "__name__", str(node.target)))
            calls += [name.removesuffix("_in_place")] if name else []
    return calls


def test_rows_without_logits_are_not_reduced_in_the_last_slice(llama: Path) -> None:
    models = convert_ranks(llama, 2)
    want = _last_logits(convert(llama))
    for model in models:
        model.optimize(ThreadPool(1))
    (got, _), (rank, _) = run_ranks(2, lambda rank: _last_logits(models[rank]))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert [shape[1] for _, shape in rank.calls] == [9] * 4 + [2] * 3


def _last_logits(model: SlicedModel) -> torch.Tensor:
    state = model.begin(torch.arange(3, 12), torch.arange(9), torch.tensor([7, 2]))
    for layer, spec in enumerate(model.attention_specs):
        q = model.run_q(layer, state)
        k, v = model.run_kv(layer, state)
        model.run_deferred(layer, state)
        state.attention_output = plain_attention(q, k, v, spec, None)
    return model.run_last(state)


def test_a_rank_without_a_group_says_so(llama: Path) -> None:
    (model, _) = convert_ranks(llama, 2)
    with pytest.raises(ConfigError, match="use_group"):
        run_slices(model, PROMPTS)


def _saved(config: PretrainedConfig, folder: Path) -> Path:
    tiny_model(config).save_pretrained(folder)
    return folder


def test_experts_too_narrow_to_share_are_divided_among_the_ranks(tmp_path: Path) -> None:
    config = FAMILIES["gpt_oss"]()
    config.intermediate_size = 1
    folder = _saved(config, tmp_path)
    want = run_slices(convert(folder), PROMPTS)
    models = convert_ranks(folder, 2)
    got, (rank, _) = run_sharded(models, PROMPTS)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert len(rank.calls) == 4 * 2 + 1, "a layer's experts are reduced once"
    for model in models:
        experts = [w for w in _weights(model) if w.dim() == 3]
        assert {len(w) for w in experts} == {2}, "two of four experts"


def test_one_narrow_expert_is_replicated_and_said_to_be(tmp_path: Path) -> None:
    config = FAMILIES["mixtral"]()
    config.intermediate_size, config.num_local_experts, config.num_experts_per_tok = 1, 1, 1
    folder = _saved(config, tmp_path)
    models = convert_ranks(folder, 2)
    got, _ = run_sharded(models, PROMPTS)
    for a, b in zip(got, run_slices(convert(folder), PROMPTS), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    summary = models[0].explain().tensor_parallel
    assert summary is not None
    assert "model.layers.*.mlp.experts.down_proj" in summary.replicated


OTHERS: dict[str, PretrainedConfig] = {
    # Norms over the features of all heads: q and k are computed whole, then sliced.
    "olmo2": hf.Olmo2Config(
        vocab_size=128, hidden_size=96, num_attention_heads=12, num_key_value_heads=6,
        num_hidden_layers=2, intermediate_size=80, eos_token_id=2, tie_word_embeddings=False,
    ),
    # A norm of its own for every head, interleaved rotary tables, one sum per layer.
    "stablelm": hf.StableLmConfig(
        vocab_size=128, hidden_size=96, num_attention_heads=12, num_key_value_heads=6,
        num_hidden_layers=2, intermediate_size=80, eos_token_id=2, tie_word_embeddings=False,
        use_parallel_residual=True, qk_layernorm=True,
    ),
    # A shared expert behind a gate that every rank computes.
    "qwen2_moe": hf.Qwen2MoeConfig(
        vocab_size=128, hidden_size=96, num_attention_heads=12, num_key_value_heads=6,
        num_hidden_layers=2, intermediate_size=80, eos_token_id=2, tie_word_embeddings=False,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_less_usual_shapes(family: str, tmp_path: Path) -> None:
    folder = _saved(OTHERS[family], tmp_path)
    models = convert_ranks(folder, 2)
    got, (rank, _) = run_sharded(models, PROMPTS)
    for a, b in zip(got, run_slices(convert(folder), PROMPTS), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    summary = models[0].explain().tensor_parallel
    assert summary is not None
    assert any("q_proj" in name for name in summary.replicated) == (family == "olmo2")
    per_layer = 1 if family == "stablelm" else 2
    assert len(rank.calls) == 2 * per_layer + 1
