"""Structure of sliced models: shared programs, what is carried, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers as hf
from typer import Typer
from typer.testing import CliRunner

from lamina.cli.convert import convert as convert_command
from lamina.convert import SlicedModel, convert, convert_structure
from lamina.convert.explain import Explanation
from lamina.convert.op import attention
from lamina.errors import CheckpointError
from support.families import FAMILIES, save_tiny_model


def _llama(num_layers: int) -> SlicedModel:
    return convert_structure(
        hf.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=num_layers, vocab_size=64,
        )
    )  # fmt: skip


def _alternating(num_layers: int) -> SlicedModel:
    return convert_structure(
        hf.Gemma3TextConfig(
            hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=num_layers, head_dim=8, vocab_size=64, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * (num_layers // 2),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> SlicedModel:
    return _llama(8)


def test_equal_layers_share_programs(llama: SlicedModel) -> None:
    assert len(llama.slices) == 9
    assert llama.num_programs == _llama(3).num_programs
    assert llama.num_programs <= 6
    middle = llama.slices[2:7]
    assert len({id(part.q.stage.program) for part in middle}) == 1
    assert len({id(part.kv.stage.program) for part in middle if part.kv}) == 1


def test_alternating_windows_share_programs_too() -> None:
    deep = _alternating(6)
    assert {spec.window for spec in deep.attention_specs} == {8, None}
    assert deep.num_programs == _alternating(4).num_programs
    assert deep.num_programs <= 8


def test_llama_carries_the_residual_stream_and_positions(llama: SlicedModel) -> None:
    explanation = llama.explain()
    for layer in explanation.layers:
        residual, *rest = layer.carried
        assert residual.shape == (1, "T", 32)
        assert residual.bytes_per_token == 32 * 4
        assert [c.name for c in rest] == (["position_ids"] if layer.layer < 7 else [])
        assert layer.carried_bytes_per_token == 32 * 4 + (8 if rest else 0)
        assert layer.q_bytes_per_token == layer.out_bytes_per_token == 4 * 8 * 4
        assert layer.k_bytes_per_token == layer.v_bytes_per_token == 2 * 8 * 4
        assert layer.deferred.num_ops == 0
    assert explanation.hop_bytes_per_token == 8 * 2 * (4 + 2) * 8 * 4


def test_q_is_sent_before_k_and_v_are_computed(llama: SlicedModel) -> None:
    for layer in llama.explain().layers:
        prefix = f"model.layers.{layer.layer}.self_attn"
        assert f"{prefix}.q_proj" in layer.q.modules
        assert not {f"{prefix}.k_proj", f"{prefix}.v_proj"} & {*layer.q.modules}
        assert {f"{prefix}.k_proj", f"{prefix}.v_proj"} < {*layer.kv.modules}


def test_rotary_tables_are_made_once_per_step(llama: SlicedModel) -> None:
    explanation = llama.explain()
    assert any("rotary" in m for m in explanation.once_per_step.modules)
    for layer in explanation.layers:
        assert not any("rotary" in m for m in (*layer.q.modules, *layer.kv.modules))


def test_in_parallel_models_branch_and_residual_are_carried() -> None:
    layer = convert_structure(FAMILIES["gpt_neox"]()).explain().layers[1]
    assert [c.bytes_per_token for c in layer.carried] == [48 * 4, 48 * 4, 8]
    assert any(name.endswith("mlp.dense_4h_to_h") for name in layer.deferred.modules)


def test_bytes_follow_the_dtype() -> None:
    config = FAMILIES["deepseek_v3"]()
    layer = convert_structure(config, dtype="bfloat16").explain().layers[0]
    assert layer.carried[0].dtype == "bfloat16"
    assert layer.q_bytes_per_token == 12 * 16 * 2
    assert layer.k_bytes_per_token == 12 * 16 * 2
    assert layer.v_bytes_per_token == 12 * 12 * 2
    assert layer.out_bytes_per_token == 12 * 12 * 2


def test_an_explanation_survives_json(llama: SlicedModel) -> None:
    explanation = llama.explain()
    assert msgspec.json.decode(msgspec.json.encode(explanation), type=Explanation) == explanation
    assert "cut 7: carries model.layers.6: add (128 B)" in str(explanation)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("phi", tmp_path_factory.mktemp("phi"))


def _invoke(*arguments: Any) -> Any:
    app = Typer()
    app.command()(convert_command)
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_the_command_explains_as_table_and_json(checkpoint: Path) -> None:
    table = _invoke(checkpoint, "--explain")
    assert table.exit_code == 0, table.output
    assert "PhiForCausalLM" in table.output
    assert "mlp.fc1" in table.output
    assert "q 384 B" in table.output, "12 heads of 8 in float32"
    assert "position_ids: 8 B" in table.output
    document = json.loads(_invoke(checkpoint, "--json", "--dtype", "bfloat16").output)
    assert document["dtype"] == "bfloat16"
    assert len(document["layers"]) == 3


def test_the_command_checks_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    done = _invoke(checkpoint)
    assert done.exit_code == 0, done.output
    assert "4 slices around 3 attention ops" in done.output
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    failed = _invoke(tmp_path)
    assert isinstance(failed.exception, CheckpointError)
    assert "no weights" in str(failed.exception)


def test_states_are_independent(checkpoint: Path) -> None:
    model = convert(checkpoint)
    rows = torch.arange(4)
    states = [model.begin(ids, rows, rows) for ids in (rows + 3, rows + 50)]
    queries = [model.run_q(0, state) for state in states]
    again = model.run_q(0, model.begin(rows + 3, rows, rows))
    torch.testing.assert_close(again, queries[0], rtol=0, atol=0)
    assert not torch.equal(queries[0], queries[1])


def test_a_model_that_returns_all_logits_is_indexed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = convert(checkpoint)
    forward = hf.PhiForCausalLM.forward

    def all_logits(self: Any, input_ids: Any, position_ids: Any, use_cache: bool) -> Any:
        return forward(self, input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    monkeypatch.setattr(hf.PhiForCausalLM, "forward", all_logits)
    ids = torch.arange(3, 9)
    for rows in ([5], [2, 0]):
        got, expected = (_logits(m, ids, rows) for m in (convert(checkpoint), want))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def _logits(model: SlicedModel, ids: torch.Tensor, rows: list[int]) -> torch.Tensor:
    state = model.begin(ids, torch.arange(len(ids)), torch.tensor(rows))
    for layer, spec in enumerate(model.attention_specs):
        q = model.run_q(layer, state)
        k, v = model.run_kv(layer, state)
        model.run_deferred(layer, state)
        state.attention_output = attention(q, k, v, layer, spec.scale, None, None, None)
    logits = model.run_last(state)
    assert logits.shape == (len(rows), model.vocab_size)
    return logits


def test_a_given_config_is_left_as_it_was() -> None:
    config = FAMILIES["qwen3_moe"]()
    before = config.to_dict()
    convert_structure(config, dtype="bfloat16")
    assert config.to_dict() == before
    assert config._attn_implementation is None
