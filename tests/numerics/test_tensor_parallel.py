"""Two ranks together give what the whole model gives, family by family, plain and native."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lamina._native import ThreadPool
from lamina.convert import SlicedModel, convert
from support.families import FAMILIES, save_tiny_model
from support.ranks import LockstepRank, convert_ranks, run_sharded
from support.slices import run_slices

PROMPTS = [torch.arange(3, 30), torch.tensor([5]), torch.tensor([99, 4, 30])]
NAMED = ("llama", "gemma3", "gpt_oss", "mixtral")
"""Families that the promises name."""
PARALLEL = ("phi", "gpt_neox", "cohere2")
"""Attention and MLP side by side: their sums meet before they are reduced."""


Outcome = tuple[list[torch.Tensor], list[LockstepRank]]
"""Logits, and what the ranks called."""


@dataclass
class Sharded:
    family: str
    whole: SlicedModel
    logits: list[torch.Tensor]
    """Of the whole model."""
    ranks: list[SlicedModel]
    """As they are after optimize."""
    plain: Outcome
    native: Outcome


@pytest.fixture(scope="module", params=FAMILIES)
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    family: str = request.param
    folder = save_tiny_model(family, tmp_path_factory.mktemp(family))
    whole, ranks = convert(folder), convert_ranks(folder, 2)
    plain = run_sharded(ranks, PROMPTS)
    for rank in ranks:
        rank.optimize(ThreadPool(1))
    return Sharded(
        family, whole, run_slices(whole, PROMPTS), ranks, plain, run_sharded(ranks, PROMPTS)
    )


def _assert_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        assert torch.equal(a.argmax(-1), b.argmax(-1)), "greedy tokens"


def test_each_rank_has_half_of_the_heads(sharded: Sharded) -> None:
    for rank in sharded.ranks:
        for mine, whole in zip(rank.attention_specs, sharded.whole.attention_specs, strict=True):
            assert mine == whole.shard(0, whole.num_kv_heads // 2)
    for parts in zip(*(rank.sinks for rank in sharded.ranks), sharded.whole.sinks, strict=True):
        *halves, whole_sinks = parts
        if whole_sinks is not None:
            assert torch.equal(torch.cat(halves), whole_sinks)  # type: ignore[arg-type]


def test_logits_and_greedy_tokens_are_the_whole_model_s(sharded: Sharded) -> None:
    got, (first, second) = sharded.plain
    _assert_same(got, sharded.logits)
    assert first.calls == second.calls
    per_layer = 1 if sharded.family in PARALLEL else 2
    assert [name for name, _ in first.calls] == (
        ["all_reduce"] * per_layer * sharded.whole.num_layers + ["all_gather"]
    )
    widths = {shape[-1] for name, shape in first.calls if name == "all_reduce"}
    hidden = sharded.whole.config.get_text_config().hidden_size
    assert widths == {hidden}, "experts are summed up before they are reduced"


def test_native_stages_give_the_same(sharded: Sharded) -> None:
    got, (first, second) = sharded.native
    _assert_same(got, sharded.logits)
    assert first.calls == second.calls
    assert len(first.calls) == len(sharded.plain[1][0].calls)


def test_all_matrices_but_the_embedding_and_small_ones_are_shared_out(sharded: Sharded) -> None:
    halves = [rank.explain().tensor_parallel for rank in sharded.ranks]
    whole = {
        weight.data_ptr(): weight.nbytes
        for part in sharded.whole.slices
        for stage in (part.q, part.kv, part.deferred)
        for weight in (stage.weights if stage else ())
    }
    tied = {"lm_head"} if sharded.whole.config.tie_word_embeddings else set()
    for half in halves:
        assert half is not None
        assert {name.split(".")[-2] for name in half.replicated} <= tied | {
            "embed_tokens", "embed_in", "wte", "wpe", "embed_positions",
            "gate", "router", "experts",  # experts: the bias of what they sum up to
            "q_a_proj", "kv_a_proj_with_mqa",  # low-rank projections, normed as a whole
        }  # fmt: skip
        assert half.sharded_bytes == pytest.approx(sum(whole.values()) / 2, rel=0.15)


@pytest.mark.parametrize("family", NAMED)
def test_generated_tokens_are_the_same(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path)
    whole, ranks = convert(folder), convert_ranks(folder, 2)
    for rank in ranks:
        rank.optimize(ThreadPool(1))
    want = got = torch.arange(3, 9)
    for _ in range(6):
        (logits,) = run_slices(whole, [want])
        want = torch.cat((want, logits[-1:].argmax(-1)))
        (logits,), _ = run_sharded(ranks, [got])
        got = torch.cat((got, logits[-1:].argmax(-1)))
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "deepseek_v3", "gpt2"])
def test_three_ranks_whose_features_do_not_divide(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path)
    whole = convert(folder)
    got, _ = run_sharded(convert_ranks(folder, 3), PROMPTS)
    _assert_same(got, run_slices(whole, PROMPTS))


def test_bfloat16_is_as_close_to_float32_as_the_whole_model_is(tmp_path: Path) -> None:
    folder = save_tiny_model("qwen3", tmp_path)
    exact = run_slices(convert(folder), PROMPTS)
    plain = run_slices(convert(folder, dtype="bfloat16"), PROMPTS)
    ranks = convert_ranks(folder, 2, dtype="bfloat16")
    for rank in ranks:
        rank.optimize(ThreadPool(1))
    got, _ = run_sharded(ranks, PROMPTS)
    error, allowed = ((torch.cat(x) - torch.cat(exact)).pow(2).mean().sqrt() for x in (got, plain))
    assert error <= 1.25 * allowed
