"""Greedy tokens over deployments of the grid, with what a family needs made once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lamina._native import ThreadPool
from lamina.convert import SlicedModel, convert
from support.engines import (
    assert_sound,
    requests,
    run_all,
    running,
    tiny_config,
    tokens,
    transformers_greedy,
)
from support.families import VOCAB_SIZE, save_tiny_model

NUM_TOKENS = 24
PROMPT_LENGTHS = (1, 33, 7, 20, 45, 12, 26)
"""Above and below the windows (8), the pages (16) and the chunks (24); some for each of four
micro-batches."""


class FamilyTokens:
    """A tiny model, prompts, and the tokens that transformers gives for them."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = save_tiny_model(family, folder)
        generator = torch.Generator().manual_seed(1)
        self.prompts = [
            torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
            for length in PROMPT_LENGTHS
        ]

    @cached_property
    def expected(self) -> list[list[int]]:
        eager: Any = AutoModelForCausalLM.from_pretrained(
            self.folder, attn_implementation="eager", dtype=torch.float32
        )
        return transformers_greedy(eager, self.prompts, NUM_TOKENS)

    @cached_property
    def model(self) -> SlicedModel:
        model = convert(self.folder)
        model.optimize(ThreadPool(1))
        return model

    def check(self, num_workers: int, **settings: Any) -> None:
        """A deployment's tokens are those of transformers, and it leaves no page behind.

        Args:
            settings: fields of the engine's config.
        """
        config = tiny_config(self.folder, num_workers, **settings)
        # Ranks load the model themselves.
        is_alone = config.model_replicas == config.tensor_parallel_size == 1
        with running(config, self.model if is_alone else None) as started:
            batch = requests(self.prompts, ignore_eos=True, max_tokens=NUM_TOKENS)
            outputs = run_all(started, batch)
            answers = [tokens(outputs[request.request_id]) for request in batch]
            assert answers == self.expected
            assert_sound(started)
