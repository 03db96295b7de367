"""A step whose slices run on several replicas in turn gives what one model gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from lamina._native import ThreadPool
from lamina.convert import convert, convert_structure
from lamina.convert.context import ContextValue, pack_context, unpack_context
from support.families import FAMILIES, save_tiny_model
from support.slices import run_in_turns, run_slices

PROMPT = torch.arange(3, 30)
POOL = ThreadPool(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_may_run_on_replicas_in_turn(family: str, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path)
    models = [convert(tmp_path) for _ in range(3)]
    (want,) = run_slices(models[0], [PROMPT])
    assert torch.equal(run_in_turns(models[:2], PROMPT), want)
    for model in models:
        model.optimize(POOL)
    (want,) = run_slices(models[0], [PROMPT])
    for num_replicas in (2, 3):
        assert torch.equal(run_in_turns(models[:num_replicas], PROMPT), want)


def test_bfloat16_context_is_the_residual_stream() -> None:
    model = convert_structure(
        hf.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=3, vocab_size=64,
        ),
        dtype="bfloat16",
    )  # fmt: skip
    assert [model.context_bytes(layer, 5) for layer in range(3)] == [5 * 32 * 2] * 3


def test_parts_of_different_types_are_packed_one_after_the_other() -> None:
    edge = (
        ContextValue(3, torch.int64, (1, None)),
        ContextValue(0, torch.float32, (1, None, 2)),
        ContextValue(1, torch.bool, (None,)),
    )
    sent = [torch.randn(1, 2, 3).transpose(1, 2), torch.tensor([True, False, True]), "other",
            torch.tensor([[7, 8, 9]])]  # fmt: skip
    values = list(sent)
    parts = pack_context(edge, values)
    assert values == [None, None, "other", None], "what was exported is not kept"
    payload = torch.cat([part.view(-1).view(torch.uint8) for part in parts])
    got: list[object] = [None] * 4
    unpack_context(edge, got, payload, 3)
    for slot in (0, 1, 3):
        have, want = got[slot], sent[slot]
        assert isinstance(have, torch.Tensor)
        assert isinstance(want, torch.Tensor)
        assert torch.equal(have, want)
