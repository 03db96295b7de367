"""Slices after the native passes give what the plain slices give, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lamina._native import ThreadPool, available_isas
from lamina.convert import SlicedModel, convert
from lamina.convert.weights import Dtype
from support.families import FAMILIES, save_tiny_model
from support.slices import run_slices

POOL = ThreadPool(2)
PROMPTS = [torch.arange(3, 30), torch.tensor([5]), torch.tensor([99, 4, 30])]
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi")
"""Families whose stages between attention ops are one native call each."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny_model(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def _optimized(folder: Path, dtype: Dtype) -> SlicedModel:
    model = convert(folder, dtype=dtype)
    model.optimize(POOL)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def float32(
    request: pytest.FixtureRequest, folders: dict[str, Path]
) -> tuple[str, list[torch.Tensor], list[torch.Tensor]]:
    """Family, logits of its plain slices and of its optimized ones."""
    model = convert(folders[request.param])
    plain = run_slices(model, PROMPTS)
    model.optimize(POOL)
    return request.param, plain, run_slices(model, PROMPTS)


def test_float32_logits_and_greedy_tokens_are_the_same(
    float32: tuple[str, list[torch.Tensor], list[torch.Tensor]],
) -> None:
    _, plain, optimized = float32
    for got, want in zip(optimized, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_bfloat16_is_as_close_to_float32_as_plain_slices_are(
    float32: tuple[str, list[torch.Tensor], list[torch.Tensor]], folders: dict[str, Path]
) -> None:
    family, (exact, *_), _ = float32
    model = convert(folders[family], dtype="bfloat16")
    (plain,) = run_slices(model, PROMPTS[:1])
    model.optimize(POOL)
    (got,) = run_slices(model, PROMPTS[:1])
    error, allowed = ((x - exact).pow(2).mean().sqrt() for x in (got, plain))
    assert error <= 1.25 * allowed


def test_float16_stays_in_torch(folders: dict[str, Path]) -> None:
    model = convert(folders["qwen3"], dtype="float16")
    plain = run_slices(model, PROMPTS)
    model.optimize(POOL)
    assert model.passes is not None
    assert model.passes.num_packed_linears == 0
    for got, want in zip(run_slices(model, PROMPTS), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("isa", available_isas())
def test_every_instruction_set(isa: str, folders: dict[str, Path]) -> None:
    model = convert(folders["gpt2"])
    (want,) = run_slices(model, PROMPTS[:1])
    model.optimize(POOL, isa=isa)
    (got,) = run_slices(model, PROMPTS[:1])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", DENSE)
def test_a_stage_of_a_dense_model_is_one_native_call(family: str, folders: dict[str, Path]) -> None:
    model = _optimized(folders[family], "bfloat16")
    assert model.passes is not None
    for part in model.slices[1:-1]:
        for stage in (part.q, part.kv, part.deferred):
            if stage is not None:
                ops = [n for n in stage.run.__self__.graph.nodes if n.op == "call_function"]  # type: ignore[attr-defined]
                assert ops == [], "nothing is left to torch"


def test_more_layers_make_no_more_programs(tmp_path: Path) -> None:
    counts = []
    for num_layers in (3, 5):
        config = FAMILIES["qwen3"]()
        config.num_hidden_layers = num_layers
        config.layer_types = ["full_attention"] * num_layers
        config.save_pretrained(tmp_path)
        model = convert(tmp_path, load_format="dummy")
        before = model.num_programs
        model.optimize(POOL)
        assert model.passes is not None
        counts.append(len(model.passes.programs))
        assert counts[-1] <= before == model.num_programs
    assert counts[0] == counts[1]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "gpt2"])
def test_weights_are_held_once(family: str, folders: dict[str, Path]) -> None:
    """Plain matrices stay only where a torch op reads them: the embedding, tied or not."""
    model = _optimized(folders[family], "bfloat16")
    assert model.passes is not None
    plain = {
        weight.data_ptr(): weight
        for part in model.slices
        for stage in (part.q, part.kv, part.deferred)
        if stage is not None
        for weight in stage.weights
        if isinstance(weight, torch.Tensor)
    }
    matrices = [w for w in plain.values() if w.dim() == 2]
    assert [tuple(w.shape) for w in matrices] == [(128, matrices[0].shape[1])]
    used = sum(
        len(weight.region.linears)
        for part in model.slices
        for stage in (part.q, part.kv, part.deferred)
        if stage is not None
        for weight in stage.weights
        if not isinstance(weight, torch.Tensor)
    )
    assert model.passes.num_packed_linears == used, "each linear is packed once"


def test_compiled_slices_give_the_same_logits(folders: dict[str, Path]) -> None:
    """Other numbers of rows do not compile again, except one row, which has code of its own."""
    model = convert(folders["qwen3"])
    plain = [run_slices(model, prompts) for prompts in (PROMPTS, PROMPTS[1:])]
    single = run_slices(model, PROMPTS[1:2])
    model.optimize(POOL, compile=True)
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = [run_slices(model, prompts) for prompts in (PROMPTS, PROMPTS[1:])]
    for got, want in zip(
        [*compiled[0], *compiled[1], *run_slices(model, PROMPTS[1:2])],
        [*plain[0], *plain[1], *single],
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
