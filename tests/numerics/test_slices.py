"""Sliced models give the logits of transformers' eager models, family by family."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lamina.attention.spec import AttentionSpec
from lamina.convert import SlicedModel, convert
from lamina.convert.op import attention as attention_op
from support.families import FAMILIES, VOCAB_SIZE, WINDOW, save_tiny_model
from support.slices import plain_attention, run_slices

TOLERANCE = 1e-4
WINDOWED = {"mistral", "gemma2", "gemma3", "phi3", "cohere2", "gpt_oss"}
PARALLEL = {"phi", "gpt_neox", "cohere2"}


@dataclass
class Pair:
    family: str
    sliced: SlicedModel
    eager: PreTrainedModel

    def eager_logits(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.eager(ids.unsqueeze(0)).logits[0]
        return logits


def _eager(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    family: str = request.param
    folder = save_tiny_model(family, tmp_path_factory.mktemp(family))
    return Pair(family, convert(folder), _eager(folder))


def _prompt(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator)


def _assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


def test_logits_equal_those_of_transformers_beyond_the_window(pair: Pair) -> None:
    prompt = _prompt(3 * WINDOW)
    (got,) = run_slices(pair.sliced, [prompt])
    want = pair.eager_logits(prompt)
    assert want.std() > 0.3, "logits are spread, so that agreement means something"
    _assert_same(got, want)


def test_logits_of_a_single_token_equal_those_of_transformers(pair: Pair) -> None:
    prompt = _prompt(1)
    _assert_same(run_slices(pair.sliced, [prompt])[0], pair.eager_logits(prompt))


def test_sequences_in_one_step_do_not_touch_each_other(pair: Pair) -> None:
    prompts = [_prompt(5), _prompt(1), _prompt(WINDOW + 3)]
    for got, prompt in zip(run_slices(pair.sliced, prompts), prompts, strict=True):
        _assert_same(got, pair.eager_logits(prompt))


def test_windows_are_those_of_the_family(pair: Pair) -> None:
    windows = {spec.window for spec in pair.sliced.attention_specs}
    assert (WINDOW in windows) == (pair.family in WINDOWED)


def test_the_whole_mlp_is_deferred_exactly_in_parallel_models(pair: Pair) -> None:
    explanation = pair.sliced.explain()
    for layer in explanation.layers:
        assert any(".mlp" in m for m in layer.deferred.modules) == (pair.family in PARALLEL)
        if pair.family in PARALLEL:
            assert not any(".mlp" in m for m in (*layer.q.modules, *layer.kv.modules))
    if pair.family in PARALLEL:
        assert not any(".mlp" in m for m in explanation.last.modules)


def test_chosen_rows_are_the_rows_whose_logits_come_back(pair: Pair) -> None:
    prompt = _prompt(6)
    (want,) = run_slices(pair.sliced, [prompt])
    for rows in ([5], [4, 0], []):
        state = pair.sliced.begin(prompt, torch.arange(6), torch.tensor(rows, dtype=torch.int64))
        for layer, spec in enumerate(pair.sliced.attention_specs):
            q = pair.sliced.run_q(layer, state)
            k, v = pair.sliced.run_kv(layer, state)
            pair.sliced.run_deferred(layer, state)
            state.attention_output = plain_attention(q, k, v, spec, pair.sliced.sinks[layer])
        _assert_same(pair.sliced.run_last(state), want[rows])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_the_op_computes_what_the_spec_says(
    window: int | None, softcap: float | None, with_sinks: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(9, heads, 8, generator=generator) for heads in (4, 2))
    v = torch.randn(9, 2, 6, generator=generator)
    sinks = torch.randn(4, generator=generator) if with_sinks else None
    spec = AttentionSpec(
        layer=0, num_query_heads=4, num_kv_heads=2, head_dim_k=8, head_dim_v=6, scale=0.5,
        window=window, softcap=softcap, has_sinks=with_sinks,
    )  # fmt: skip
    got = attention_op(q, k, v, 0, 0.5, window, softcap, sinks)
    torch.testing.assert_close(got, plain_attention(q, k, v, spec, sinks), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
         "original_max_position_embeddings": 32},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_static_rotary_scaling(rope: dict[str, object], tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=VOCAB_SIZE, max_position_embeddings=64, rope_parameters=rope,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    pair = Pair("llama", convert(tmp_path), _eager(tmp_path))
    prompt = _prompt(64)
    _assert_same(run_slices(pair.sliced, [prompt])[0], pair.eager_logits(prompt))
