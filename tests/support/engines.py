"""Running whole engines in tests: greedy tokens of prompts, and what transformers says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lamina.attention.spec import AttentionSpec
from lamina.config import AttentionWorkerConfig, EngineConfig
from lamina.convert import SlicedModel
from lamina.engine.start import StartedEngine, start_engine
from lamina.kv.pages import bytes_per_page
from lamina.types import EngineRequest, FinishReason, SamplingParams, SequenceOutput


def tiny_config(folder: Path, num_workers: int, **changes: Any) -> EngineConfig:
    """An engine for a tiny float32 model; pages and chunks are short, so that both are crossed."""
    fields: dict[str, Any] = {
        "model": str(folder),
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 24,
        "block_size": 16,
        "attention": "remote" if num_workers else "local",
        "attention_workers": tuple(AttentionWorkerConfig() for _ in range(num_workers)),
        "num_threads": 1,
        "worker_num_threads": 1,
        "step_deadline_s": 30.0,
    }
    return EngineConfig(**(fields | changes))


def tiny_llama_page_bytes(page_tokens: int, num_workers: int = 1) -> int:
    """Bytes of a page of the tiny Llama: 3 layers of 6 KV heads of 8, float32, shared by heads."""
    spec = AttentionSpec(
        layer=0, num_query_heads=6, num_kv_heads=6, head_dim_k=8, head_dim_v=8, scale=1.0
    )
    return bytes_per_page([spec.shard(0, 6 // num_workers)] * 3, page_tokens, "float32")


@contextmanager
def running(config: EngineConfig, model: SlicedModel | None = None) -> Iterator[StartedEngine]:
    """A started engine, closed in the end."""
    started = start_engine(config, model=model)
    try:
        yield started
    finally:
        started.close()


def requests(prompts: Iterable[Sequence[int]], **sampling: Any) -> list[EngineRequest]:
    """One request per prompt, named by its index; greedy unless `sampling` says otherwise."""
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 64} | sampling))
    return [
        EngineRequest(
            request_id=str(index), prompt_token_ids=tuple(prompt), sampling=params, seed=index
        )
        for index, prompt in enumerate(prompts)
    ]


def run_all(
    started: StartedEngine, batch: Sequence[EngineRequest], max_steps: int = 5000
) -> dict[str, list[SequenceOutput]]:
    """Run until every request has ended and all pages are released; outputs by request."""
    engine = started.engine
    for request in batch:
        engine.add(request)
    outputs: dict[str, list[SequenceOutput]] = {request.request_id: [] for request in batch}
    for _ in range(max_steps):
        if not engine.has_work:
            return outputs
        for output in engine.step():
            outputs[output.request_id].append(output)
    raise AssertionError(f"the engine is not done after {max_steps} steps")


def tokens(outputs: Sequence[SequenceOutput]) -> list[int]:
    """All tokens of one request; it must have ended without an error."""
    assert outputs[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH), outputs[-1]
    return [token for output in outputs for token in output.token_ids]


def assert_sound(started: StartedEngine) -> None:
    """Every page is free, and every allocator's books are right."""
    problems, executors = started.engine.check_integrity()
    assert problems == []
    assert [e.pages_used for e in executors] == [0] * len(executors)


@torch.inference_mode()
def transformers_greedy(
    model: Any, prompts: Iterable[Sequence[int]], num_tokens: int
) -> list[list[int]]:
    """Greedy tokens of an eager transformers model, one prompt at a time with its own cache."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        cache = None
        answer: list[int] = []
        for _ in range(num_tokens):
            output = model(ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ids = output.logits[:, -1:].argmax(-1)
            answer.append(int(ids))
        answers.append(answer)
    return answers
