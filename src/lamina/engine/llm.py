"""`LLM`: an engine for scripts and notebooks, without a server and without asyncio."""

from __future__ import annotations

import asyncio
import threading
import uuid
import weakref
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from lamina.config import EngineConfig, parse_attention_workers
from lamina.demo import demo_model_path
from lamina.engine.client import AsyncEngine
from lamina.engine.messages import ModelInfo
from lamina.engine.outputs import CompletedAnswer, Completion, GenerationChunk, TokenLogprob
from lamina.errors import ConfigError, EngineDead, LaminaError, RequestError
from lamina.types import FinishReason, SamplingParams

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
_T = TypeVar("_T")


class LLM:
    """A model that is ready to generate.

        with LLM("path/to/model", attention_workers=2) as llm:
            for completion in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
                print(completion.answers[0].text)

    The engine runs in processes of its own; they end with `close`, or with this process.
    """

    def __init__(self, model: str | Path | None = None, **engine_config: Any) -> None:
        """Start the engine and wait until it serves.

        Args:
            model: folder of a Hugging Face checkpoint; None: the bundled demo model.
            engine_config: fields of `EngineConfig`; attention_workers may also be a count or a
                text such as "cpu:8GiB,cpu:4GiB".

        Raises:
            ConfigError, CheckpointError, ConversionError, CapacityError: it cannot start so.
            EngineDead: the engine ended without a word.
        """
        config = _config(demo_model_path() if model is None else model, engine_config)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="lamina-llm", daemon=True)
        thread.start()
        try:
            self._engine = _run(self._loop, AsyncEngine.start(config))
        except BaseException:
            _end_loop(self._loop, thread)
            raise
        self._close = weakref.finalize(self, _close, self._engine, self._loop, thread)

    @property
    def model(self) -> ModelInfo:
        return self._engine.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        return self._engine.tokenizer

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in order. Blocks until all are done.

        Args:
            prompts: a text, or several texts or lists of token ids.
            sampling_params: one for all prompts, or one per prompt; None: the defaults.

        Raises:
            RequestError: a prompt cannot be served; the others are abandoned too.
            EngineDead: the engine no longer serves.
        """
        asked: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        if any(isinstance(prompt, int) for prompt in asked):
            raise RequestError(
                "prompts holds token ids; put the ids of each prompt into a list of its own",
                "prompt",
            )
        if sampling_params is None:
            sampling_params = SamplingParams()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(asked)
        if len(sampling_params) != len(asked):
            raise RequestError(
                f"{len(asked)} prompts need as many sampling_params, or a single one for all; "
                f"got {len(sampling_params)}",
                "sampling_params",
            )
        if not self._close.alive:
            raise EngineDead("this LLM is closed")
        return _run(self._loop, _complete_all(self._engine, asked, sampling_params))

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template_arguments: Any,
    ) -> list[Completion]:
        """Answer one conversation, or several, in the format of the model's chat template.

        Args:
            messages: mappings with `role` and `content`, or a list of such conversations.
            sampling_params: as for `generate`.
            template_arguments: what the chat template takes besides, for instance `tools`.

        Raises:
            RequestError: as `generate`, or the model has no chat template.
        """
        chats = [messages] if all(isinstance(m, Mapping) for m in messages) else messages
        return self.generate(
            [self._engine.chat_prompt(chat, **template_arguments) for chat in chats],  # type: ignore[arg-type]
            sampling_params,
        )

    def close(self) -> None:
        """Stop the engine and its workers; a second call does nothing."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _config(model: str | Path, fields: dict[str, Any]) -> EngineConfig:
    workers = fields.get("attention_workers")
    if isinstance(workers, int | str):
        fields = fields | {"attention_workers": parse_attention_workers(str(workers))}
    try:
        return msgspec.convert({"model": str(model), **fields}, EngineConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{error}; see EngineConfig for the fields and their types") from error


def _run(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, _T]) -> _T:
    """Run `work` in the loop's thread; an interrupt here cancels it there."""
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _close(engine: AsyncEngine, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    _run(loop, engine.shutdown())
    _end_loop(loop, thread)


def _end_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


async def _complete_all(
    engine: AsyncEngine, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams]
) -> list[Completion]:
    """All prompts at once, except that the engine's queue is never overfilled."""
    largest = max((params.n for params in sampling), default=1)
    places = engine.model.max_num_seqs + engine.model.max_num_waiting
    limit = asyncio.Semaphore(max(1, places // largest))

    async def complete(prompt: Prompt, params: SamplingParams) -> Completion:
        async with limit:
            return await _complete(engine, prompt, params)

    tasks = [
        asyncio.create_task(complete(prompt, params))
        for prompt, params in zip(prompts, sampling, strict=True)
    ]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _complete(engine: AsyncEngine, prompt: Prompt, sampling: SamplingParams) -> Completion:
    request_id = uuid.uuid4().hex
    token_ids = await engine.encode(prompt) if isinstance(prompt, str) else prompt
    pieces: list[list[GenerationChunk]] = [[] for _ in range(sampling.n)]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    async with aclosing(engine.generate(token_ids, sampling, request_id=request_id)) as chunks:
        async for chunk in chunks:
            if chunk.finish_reason is FinishReason.ERROR:
                message = chunk.error or "the engine gave no reason"
                raise LaminaError(message) if engine.health().ok else EngineDead(message)
            pieces[chunk.index].append(chunk)
            if chunk.prompt_logprobs is not None:
                prompt_logprobs = chunk.prompt_logprobs
    return Completion(
        request_id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=tuple(token_ids),
        prompt_logprobs=prompt_logprobs,
        answers=tuple(_join(own) for own in pieces),
    )


def _join(chunks: Sequence[GenerationChunk]) -> CompletedAnswer:
    last = chunks[-1]
    assert last.finish_reason is not None
    return CompletedAnswer(
        index=last.index,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(_flatten(chunk.token_ids for chunk in chunks)),
        logprobs=(
            tuple(_flatten(chunk.logprobs or () for chunk in chunks))
            if any(chunk.logprobs is not None for chunk in chunks)
            else None
        ),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )


def _flatten(parts: Iterable[Sequence[_T]]) -> list[_T]:
    return [item for part in parts for item in part]
