"""Checkpoints in, tensors out; bad folders give errors that say what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamina.convert import SlicedModel, convert
from lamina.convert.weights import read_config, read_eos_token_ids
from lamina.errors import CheckpointError, ConversionError, LaminaError
from support.families import FAMILIES, save_tiny_model
from support.slices import run_slices

PROMPT = torch.arange(3, 15)


def _logits(model: SlicedModel) -> torch.Tensor:
    return run_slices(model, [PROMPT])[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"), max_shard_size="100KB")


@pytest.fixture(scope="module")
def converted(checkpoint: Path) -> SlicedModel:
    return convert(checkpoint)


def test_a_sharded_checkpoint_equals_one_in_a_single_file(
    checkpoint: Path, converted: SlicedModel, tmp_path: Path
) -> None:
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    whole = save_tiny_model("llama", tmp_path)
    assert len(list(whole.glob("*.safetensors"))) == 1
    torch.testing.assert_close(_logits(convert(whole)), _logits(converted), rtol=0, atol=0)


def test_facts_that_the_engine_needs(converted: SlicedModel, checkpoint: Path) -> None:
    assert converted.name == checkpoint.name
    assert converted.architecture == "LlamaForCausalLM"
    assert converted.vocab_size == 128
    assert converted.max_model_len == 512
    assert converted.eos_token_ids == (2,)
    assert converted.dtype == torch.float32
    assert converted.sinks == (None, None, None)
    spec = converted.attention_specs[2]
    assert (spec.layer, spec.num_query_heads, spec.num_kv_heads, spec.head_dim_k) == (2, 12, 6, 8)


def test_end_tokens_come_from_the_generation_config_first(checkpoint: Path, tmp_path: Path) -> None:
    config = read_config(checkpoint)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 5]}))
    assert read_eos_token_ids(tmp_path, config) == (5, 9)
    (tmp_path / "generation_config.json").unlink()
    assert read_eos_token_ids(tmp_path, config) == (2,)


def test_tied_embeddings_share_memory(tmp_path: Path) -> None:
    model = convert(save_tiny_model("qwen2", tmp_path))
    tied = [
        tensor.data_ptr()
        for part in (model.slices[0].q, model.slices[-1].q)
        for tensor in part.weights
        if tensor.shape == (128, 96)
    ]
    assert len(tied) == 2
    assert tied[0] == tied[1]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_checkpoint_keeps_its_dtype_unless_told_otherwise(
    stored: torch.dtype, converted: SlicedModel, tmp_path: Path
) -> None:
    folder = save_tiny_model("llama", tmp_path, dtype=stored)
    model = convert(folder)
    assert model.dtype == stored
    state = model.begin(PROMPT, torch.arange(12), torch.arange(12))
    assert model.run_q(0, state).dtype == stored
    assert all(part.dtype == stored for part in model.run_kv(0, state))
    want = _logits(converted)
    spread = want.std()
    assert (_logits(model) - want).abs().max() < 0.25 * spread
    widened = convert(folder, dtype="float32")
    assert widened.dtype == torch.float32
    assert (_logits(widened) - want).abs().max() < 0.25 * spread


def test_dummy_weights_need_only_a_config_and_follow_the_seed(tmp_path: Path) -> None:
    config = FAMILIES["gpt_oss"]()
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    config.save_pretrained(tmp_path)
    first = _logits(convert(tmp_path, load_format="dummy", seed=1))
    assert first.isfinite().all()
    assert first.std() > 0
    torch.testing.assert_close(
        _logits(convert(tmp_path, load_format="dummy", seed=1)), first, rtol=0, atol=0
    )
    assert not torch.equal(_logits(convert(tmp_path, load_format="dummy", seed=2)), first)


def _without_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def _first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def _halve(folder: Path) -> None:
    file = _first_shard(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _drop_a_tensor(folder: Path) -> None:
    for file in folder.glob("model-*.safetensors"):
        tensors = load_file(file)
        kept = {n: t for n, t in tensors.items() if "layers.1.self_attn.q_proj" not in n}
        save_file(kept, file, metadata={"format": "pt"})


def _set(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), CheckpointError, "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), CheckpointError, "config.json"),
        (_without_weights, CheckpointError, "has no weights"),
        (_halve, CheckpointError, "truncated"),
        (lambda folder: _first_shard(folder).write_bytes(b""), CheckpointError, "truncated"),
        (lambda folder: _first_shard(folder).unlink(), CheckpointError, "download"),
        (_drop_a_tensor, CheckpointError, "layers.1.self_attn.q_proj"),
        (_set(intermediate_size=96), CheckpointError, "other shapes"),
        (_set(num_attention_heads=7), CheckpointError, "number of attention heads"),
        (_set(model_type="quux"), ConversionError, "does not know this architecture"),
        (_set(quantization_config={"quant_method": "mxfp4"}), ConversionError, "quantized"),
        (
            lambda folder: (folder / "generation_config.json").write_text("{"),
            CheckpointError,
            "generation_config.json",
        ),
    ],
)
def test_damaged_checkpoints(
    damage: Callable[[Path], None],
    error: type[LaminaError],
    says: str,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(error, match=says):
        convert(folder)


def test_a_name_that_is_not_a_folder_is_refused_without_a_download() -> None:
    with pytest.raises(CheckpointError, match="local"):
        convert("meta-llama/Llama-3.2-1B")
