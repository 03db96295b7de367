"""`AsyncEngine` over real processes: many requests at once, and the executors' books afterwards."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lamina.config import EngineConfig
from lamina.convert import convert
from lamina.engine.client import AsyncEngine
from lamina.errors import EngineDead
from lamina.types import EngineRequest, FinishReason, SamplingParams
from support.engines import run_all, running, tiny_config, tiny_llama_page_bytes, tokens
from support.servers import VOCAB_SIZE, descendants

NUM_REQUESTS = 64
PAGE_BYTES = tiny_llama_page_bytes(8)


def mixed_requests() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 60 tokens, answers of 1 to 34: every second greedy, the others seeded."""
    dice = random.Random(11)
    made = []
    for number in range(NUM_REQUESTS):
        prompt = [dice.randrange(6, VOCAB_SIZE) for _ in range(dice.choice((1, 5, 12, 30, 60)))]
        sampling = SamplingParams(
            max_tokens=dice.choice((1, 8, 20, 34)),
            temperature=0.9 if number % 2 else 0.0,
            top_k=50 if number % 2 else 0,
            seed=number,
            ignore_eos=True,
        )
        made.append((prompt, sampling))
    return made


def config_of(folder: Path, num_workers: int, **changes: Any) -> EngineConfig:
    return tiny_config(
        folder,
        num_workers,
        **{
            "max_model_len": 96,
            "block_size": 8,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 32,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def alone(served_folder: Path) -> list[list[int]]:
    """The tokens of each request run for itself, monolithic, with room for everything."""
    with running(config_of(served_folder, 0), convert(served_folder)) as started:
        answers = []
        for prompt, sampling in mixed_requests():
            request = EngineRequest(
                request_id="0",
                prompt_token_ids=tuple(prompt),
                sampling=sampling,
                seed=sampling.seed,
            )
            answers.append(tokens(run_all(started, [request])["0"]))
        return answers


async def assert_sound(engine: AsyncEngine) -> None:
    report = await engine.check_integrity()
    assert report.problems == ()
    assert [executor.pages_used for executor in report.executors] == [0] * len(report.executors)
    assert [executor.pages_used for executor in engine.stats.executors] == [0] * len(
        report.executors
    )


async def collect(engine: AsyncEngine, prompt: list[int], sampling: SamplingParams) -> list[int]:
    answer: list[int] = []
    async for chunk in engine.generate(prompt, sampling):
        assert chunk.error is None
        answer += chunk.token_ids
    return answer


@pytest.mark.parametrize(
    ("num_workers", "changes"),
    [
        pytest.param(2, {"attention_memory_bytes": 12 * PAGE_BYTES}, id="2 workers by heads"),
        pytest.param(
            3,
            {"attention_memory_bytes": 12 * PAGE_BYTES, "attention_partition": "requests"},
            id="3 workers by requests",
        ),
    ],
)
def test_concurrent_requests_under_preemption(
    num_workers: int, changes: dict[str, Any], served_folder: Path, alone: list[list[int]]
) -> None:
    async def run() -> None:
        engine = await AsyncEngine.start(config_of(served_folder, num_workers, **changes))
        try:
            assert len(engine.stats.executors) == num_workers + 1
            answers = await asyncio.gather(*(collect(engine, *r) for r in mixed_requests()))
            assert engine.stats.preemptions_total > 0
            assert answers == alone
            await assert_sound(engine)
            await abort_some(engine)
            await assert_sound(engine)
            await lose_a_worker(engine, f"attention-worker-{num_workers}")
        finally:
            assert await engine.shutdown() == 1

    asyncio.run(run())


async def abort_some(engine: AsyncEngine) -> None:
    """Sixteen requests that end early: by `abort`, by cancelling, and by closing the iteration."""

    async def start(number: int) -> FinishReason | None:
        sampling = SamplingParams(max_tokens=60, ignore_eos=True)
        stream = engine.generate([7, 8, 9], sampling, request_id=str(number))
        reason = None
        async for chunk in stream:
            reason = chunk.finish_reason
            if number % 3 == 0:
                await stream.aclose()
            elif number % 3 == 1 and reason is None:
                await engine.abort(str(number))
        return reason

    tasks = [asyncio.create_task(start(number)) for number in range(16)]
    await asyncio.sleep(0.1)
    for task in tasks[2::3]:
        task.cancel()
    reasons = await asyncio.gather(*tasks, return_exceptions=True)
    assert reasons[0::3] == [None] * 6
    assert reasons[1::3] == [FinishReason.ABORT] * 5
    assert engine.num_unfinished == 0


async def lose_a_worker(engine: AsyncEngine, name: str) -> None:
    """While nothing runs, the engine notices as well."""
    *_, victim = (
        p
        for p in descendants(os.getpid())
        if p.name == name.replace("attention-worker", "lamina-attn")
    )
    os.kill(victim.pid, signal.SIGKILL)
    start = time.monotonic()
    while engine.health().ok and time.monotonic() - start < 2.0:
        await asyncio.sleep(0.01)
    assert name in engine.health().reason
    with pytest.raises(EngineDead, match=name):
        await collect(engine, [7], SamplingParams())
    with pytest.raises(EngineDead, match=name):
        await engine.check_integrity()
