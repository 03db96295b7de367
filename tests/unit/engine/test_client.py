"""The client against an engine process that speaks the messages and echoes prompts."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from lamina.config import EngineConfig
from lamina.engine.answers import Answer, sequence_seed
from lamina.engine.client import AsyncEngine
from lamina.engine.outputs import GenerationChunk
from lamina.engine.tokenizer import load_tokenizer
from lamina.errors import CheckpointError, EngineDead, QueueFull, RequestError
from lamina.types import (
    EngineRequest,
    FinishReason,
    SamplingParams,
    SequenceOutput,
    TokenLogprobs,
)

Start = Callable[..., Any]


def run(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test, at most 30 seconds."""

    @wraps(test)
    def runner(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), 30))

    return runner


@pytest.fixture
def start(config: EngineConfig, fake_engine: tuple[str, ...]) -> Start:
    @asynccontextmanager
    async def started(mode: str = "normal", **fields: Any) -> AsyncIterator[AsyncEngine]:
        engine = await AsyncEngine.start(config, command=(*fake_engine, mode))
        try:
            yield engine
        finally:
            await engine.shutdown(1.0)

    return started


async def collect(engine: AsyncEngine, prompt: Any, **sampling: Any) -> list[GenerationChunk]:
    return [chunk async for chunk in engine.generate(prompt, SamplingParams(**sampling))]


def text_of(chunks: list[GenerationChunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def running(engine: AsyncEngine) -> tuple[str, ...]:
    return (await engine.check_integrity()).problems


# --- answers ------------------------------------------------------------------------------------


@run
async def test_an_answer_streams(start: Start) -> None:
    async with start() as engine:
        chunks = await collect(engine, "añb", max_tokens=9)
        assert text_of(chunks) == "añbañba"
        assert len(chunks) == 9
        assert [c.finish_reason for c in chunks] == [None] * 8 + [FinishReason.LENGTH]
        assert [t for c in chunks for t in c.token_ids] == (engine.tokenizer.encode("añb") * 3)[:9]
        assert engine.num_unfinished == 0
        assert engine.stats.steps_total == 9
        assert engine.health() == (True, "")


@run
async def test_many_requests_at_once(start: Start) -> None:
    async with start() as engine:
        prompts = ["one", "two ", "three", "日本"]
        answers = await asyncio.gather(*(collect(engine, p, max_tokens=24) for p in prompts))
        for prompt, chunks in zip(prompts, answers, strict=True):
            assert text_of(chunks) == (prompt * 24).encode()[:24].decode()


@run
async def test_the_answers_of_n_are_interleaved(start: Start) -> None:
    async with start() as engine:
        chunks = await collect(engine, "abc", n=3, max_tokens=5)
        assert [c.index for c in chunks[:6]] == [0, 1, 2, 0, 1, 2]
        for index in range(3):
            assert text_of(chunks, index) == "abcab"
            assert [c.finish_reason for c in chunks if c.index == index][-1] is FinishReason.LENGTH


@run
async def test_end_of_sequence_and_stop_tokens(start: Start) -> None:
    async with start() as engine:
        (z,) = engine.tokenizer.encode("z")
        chunks = await collect(engine, [*engine.tokenizer.encode("ab"), 1], max_tokens=9)
        assert (text_of(chunks), chunks[-1].finish_reason) == ("ab", FinishReason.STOP)
        assert chunks[-1].stop_reason is None
        chunks = await collect(engine, "abz", max_tokens=9, stop_token_ids=(z,))
        assert (text_of(chunks), chunks[-1].stop_reason) == ("ab", z)


@run
async def test_a_stop_string_ends_the_sequence_in_the_engine(start: Start) -> None:
    async with start() as engine:
        chunks = await collect(engine, "hello world ", max_tokens=900, stop=("world h",))
        assert text_of(chunks) == "hello "
        last = chunks[-1]
        assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, "world h")
        assert sum(len(c.token_ids) for c in chunks) == len("hello world h")
        assert engine.num_unfinished == 0
        assert await running(engine) == ()


@run
async def test_logprobs_of_answer_and_prompt(start: Start) -> None:
    async with start() as engine:
        chunks = await collect(engine, "añ", max_tokens=3, logprobs=1, prompt_logprobs=0)
        first, *others = chunks[0].prompt_logprobs
        assert first is None
        assert [(e.utf8, e.token) for e in others] == [(b"\xc3", "\ufffd"), (b"\xb1", "\ufffd")]
        assert all(c.prompt_logprobs is None for c in chunks[1:])
        entries = [entry for c in chunks for entry in c.logprobs]
        assert b"".join(e.utf8 for e in entries).decode() == "añ"
        assert entries[0].top == ((entries[0].token_id, "a", b"a", -1.0),)


@run
async def test_an_error_of_one_sequence_leaves_the_others(start: Start) -> None:
    async with start() as engine:
        bad, good = await asyncio.gather(
            collect(engine, "bad", max_tokens=50, seed=666), collect(engine, "good", max_tokens=8)
        )
        assert (bad[-1].finish_reason, bad[-1].error) == (FinishReason.ERROR, "NaN logits")
        assert text_of(good) == "goodgood"
        assert engine.health().ok


# --- aborts -------------------------------------------------------------------------------------


@run
async def test_leaving_the_iteration_aborts(start: Start) -> None:
    async with start() as engine:
        sampling = SamplingParams(max_tokens=900, n=2)
        async with aclosing(engine.generate("abc", sampling)) as chunks:
            async for _ in chunks:
                assert len(await running(engine)) == 2
                break
        assert engine.num_unfinished == 0
        assert await running(engine) == ()


@run
async def test_cancelling_the_consumer_aborts(start: Start) -> None:
    async with start() as engine:
        task = asyncio.create_task(collect(engine, "abc", max_tokens=900))
        await until(lambda: _is(engine, 1))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await running(engine) == ()


async def _is(engine: AsyncEngine, count: int) -> bool:
    return len(await running(engine)) == count


@run
async def test_abort_by_name(start: Start) -> None:
    async with start() as engine:
        chunks = []
        async for chunk in engine.generate("abc", SamplingParams(max_tokens=900), request_id="x"):
            chunks.append(chunk)
            if len(chunks) == 3:
                await engine.abort("x")
                await engine.abort("x")
        assert chunks[-1].finish_reason is FinishReason.ABORT
        assert await running(engine) == ()
        await engine.abort("x")
        again = engine.generate("abc", SamplingParams(max_tokens=3), request_id="x")
        assert text_of([chunk async for chunk in again]) == "abc"


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "sampling", "field", "words"),
    [
        ("", {}, "prompt", "empty"),
        ([], {}, "prompt", "empty"),
        ([5, 300], {}, "prompt", "299"),
        ([-1], {}, "prompt", "299"),
        ([5] * 1000, {}, "prompt", "1000 tokens"),
        ([5] * 999, {"max_tokens": 2}, "max_tokens", "only 1 fit"),
        ([5] * 999, {"max_tokens": None, "min_tokens": 2}, "min_tokens", "at most"),
        ("a\ud800", {}, "prompt", "Unicode"),
        ("a", {"n": 9}, "n", "8 at once"),
    ],
)
@run
async def test_bad_requests_are_refused(
    start: Start, prompt: Any, sampling: dict[str, Any], field: str, words: str
) -> None:
    async with start() as engine:
        with pytest.raises(RequestError, match=words) as caught:
            await collect(engine, prompt, **sampling)
        assert caught.value.field == field
        assert engine.num_unfinished == 0


@run
async def test_without_max_tokens_the_answer_fills_the_context(start: Start) -> None:
    async with start() as engine:
        chunks = await collect(engine, [70] * 990, max_tokens=None)
        assert sum(len(c.token_ids) for c in chunks) == 10


@run
async def test_a_name_in_use_is_refused(start: Start) -> None:
    async with start() as engine:
        sampling = SamplingParams(max_tokens=900)
        async with aclosing(engine.generate("abc", sampling, request_id="x")) as chunks:
            await anext(chunks)
            with pytest.raises(RequestError, match="in use"):
                await anext(engine.generate("abc", sampling, request_id="x"))


@run
async def test_a_full_queue_is_refused(start: Start) -> None:
    async with start() as engine:
        tasks = [asyncio.create_task(collect(engine, "a", max_tokens=99)) for _ in range(7)]
        await until(lambda: _is(engine, 7))
        with pytest.raises(QueueFull, match="7 requests"):
            await collect(engine, "a", n=2)
        tasks.append(asyncio.create_task(collect(engine, "a", max_tokens=99)))
        await until(lambda: _is(engine, 8))
        with pytest.raises(QueueFull):
            await collect(engine, "a")
        for chunks in await asyncio.gather(*tasks):
            assert text_of(chunks) == "a" * 99
        assert text_of(await collect(engine, "a", n=2, max_tokens=2)) == "aa"


# --- failures -----------------------------------------------------------------------------------


@run
async def test_a_killed_engine_ends_every_stream(start: Start) -> None:
    async with start() as engine:
        tasks = [asyncio.create_task(collect(engine, "a", n=2, max_tokens=900)) for _ in range(3)]
        await until(lambda: _is(engine, 6))
        integrity = asyncio.create_task(engine.check_integrity())
        os.kill(int(engine.model.architecture), signal.SIGKILL)
        killed = time.monotonic()
        for chunks in await asyncio.gather(*tasks):
            errors = [c for c in chunks if c.finish_reason is FinishReason.ERROR]
            assert sorted(c.index for c in errors) == [0, 1]
            assert all("SIGKILL" in c.error for c in errors)
        assert time.monotonic() - killed < 1.0
        await asyncio.wait([integrity])  # answered before the signal, or an error
        assert not engine.health().ok
        assert "SIGKILL" in engine.health().reason
        with pytest.raises(EngineDead, match="SIGKILL"):
            await collect(engine, "a")
        with pytest.raises(EngineDead, match="SIGKILL"):
            await engine.check_integrity()
        assert await engine.shutdown() == -signal.SIGKILL


@run
async def test_a_failed_engine_tells_why(start: Start) -> None:
    async with start("fails later") as engine:
        chunks = await collect(engine, "a", max_tokens=900)
        assert chunks[-1].finish_reason is FinishReason.ERROR
        assert chunks[-1].error == "attention worker 1: no heartbeat"
        assert text_of(chunks) == "aaaaa"
        assert engine.health() == (False, "attention worker 1: no heartbeat")
        assert await engine.shutdown() == 1


@run
async def test_a_lost_executor_is_unhealthy(start: Start) -> None:
    async with start("lost") as engine:
        assert engine.health() == (False, "lost: attention worker 1")


@pytest.mark.parametrize(
    ("mode", "kind", "words"),
    [
        ("fail", CheckpointError, "^weights are truncated$"),
        ("failure of an unknown kind", EngineDead, "^something else$"),
        ("exit", EngineDead, "exit code 3"),
    ],
)
@run
async def test_failures_at_the_start(
    start: Start, mode: str, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        async with start(mode):
            pass


@run
async def test_a_folder_without_a_tokenizer_stops_the_start(
    fake_engine: tuple[str, ...], tmp_path: Path
) -> None:
    command = (*fake_engine, "normal")
    with pytest.raises(CheckpointError, match="tokenizer"):
        await AsyncEngine.start(EngineConfig(model=str(tmp_path)), command=command)


@run
async def test_a_dummy_model_needs_no_tokenizer(
    fake_engine: tuple[str, ...], tmp_path: Path
) -> None:
    config = EngineConfig(model=str(tmp_path), load_format="dummy")
    engine = await AsyncEngine.start(config, command=(*fake_engine, "normal"))
    try:
        assert engine.tokenizer is None
        chunks = await collect(engine, [7, 8], max_tokens=3, logprobs=1)
        assert [t for c in chunks for t in c.token_ids] == [7, 8, 7]
        assert text_of(chunks) == ""
        for prompt, sampling, field in (("text", {}, "prompt"), ([7], {"stop": ("x",)}, "stop")):
            with pytest.raises(RequestError, match="token ids") as caught:
                await collect(engine, prompt, **sampling)
            assert caught.value.field == field
    finally:
        await engine.shutdown()


@run
async def test_cancelling_the_start_ends_the_process(
    config: EngineConfig, fake_engine: tuple[str, ...], tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    command = ("sh", "-c", f'echo $$ > {pid_file}; exec "$@"', "sh", *fake_engine, "never ready")
    task = asyncio.create_task(AsyncEngine.start(config, command=command))
    while not pid_file.exists() or not pid_file.read_text():
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


# --- shutdown -----------------------------------------------------------------------------------


@run
async def test_shutdown_is_orderly_and_ends_open_requests(start: Start) -> None:
    async with start() as engine:
        task = asyncio.create_task(collect(engine, "a", max_tokens=900))
        await until(lambda: _is(engine, 1))
        assert await engine.shutdown() == 0
        chunks = await task
        assert "shut down" in chunks[-1].error
        assert not engine.health().ok
        assert await engine.shutdown() == 0
        folder = engine._address.removeprefix("ipc://")
        assert not os.path.exists(os.path.dirname(folder))


@run
async def test_a_stubborn_engine_is_terminated(start: Start) -> None:
    async with start("stubborn") as engine:
        assert await engine.shutdown(0.2) == -signal.SIGTERM


# --- pieces -------------------------------------------------------------------------------------


def test_seeds_of_the_answers_differ_and_are_fixed() -> None:
    seeds = [sequence_seed(42, index) for index in range(100)]
    assert seeds[0] == 42
    assert len(set(seeds)) == 100
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert sequence_seed(42, 1) == seeds[1] != sequence_seed(43, 1)


def test_tokens_after_a_stop_string_are_not_the_answers(model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder)
    token_ids = tuple(tokenizer.encode("abcd"))
    sampling = SamplingParams(stop=("bc",), logprobs=0)
    request = EngineRequest(request_id="x", prompt_token_ids=(5,), sampling=sampling, seed=0)
    answer = Answer(0, request, tokenizer)
    entries = tuple(TokenLogprobs(t, -1.0, 1, ()) for t in token_ids)
    chunk = answer.advance(SequenceOutput(request_id="x", token_ids=token_ids, logprobs=entries))
    assert chunk is not None
    assert answer.finished
    assert (chunk.text, chunk.stop_reason) == ("a", "bc")
    assert chunk.token_ids == token_ids[:3]
    assert [e.token for e in chunk.logprobs or ()] == ["a", "b", "c"]


@run
async def test_split_answers_know_seed_and_end_of_sequence(start: Start) -> None:
    async with start() as engine:
        answers = Answer.split("x", [5], SamplingParams(n=2), 7, engine.model, None)
        assert [a.request.seed for a in answers] == [7, sequence_seed(7, 1)]
        assert [a.request.request_id for a in answers] == ["x:0", "x:1"]
        assert answers[0].request.eos_token_ids == (1,)
