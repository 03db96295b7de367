"""POST /v1/chat/completions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import msgspec
from fastapi import Request, Response
from msgspec import UNSET

from lamina.engine.outputs import GenerationChunk, TokenLogprob
from lamina.errors import RequestError
from lamina.server.body import decode, read_body
from lamina.server.errors import json_response
from lamina.server.logprobs import chat_logprobs, prompt_logprobs
from lamina.server.prompts import Prompt
from lamina.server.protocol import ChatRequest
from lamina.server.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    Delta,
    PromptLogprobs,
    Usage,
    new_id,
    now,
)
from lamina.server.serving import Job, Serving
from lamina.server.streaming import event_stream, while_connected
from lamina.types import SamplingParams


async def create_chat_completion(serving: Serving, request: Request) -> Response:
    """Raises LaminaError for every refusal, ClientDisconnect when nobody waits any more."""
    asked = decode(await read_body(request, serving.max_body_bytes), ChatRequest)
    serving.check_model(asked.model)
    try:
        sampling = asked.sampling()
        prompt = await serving.prompts.chat(asked.messages, asked)
        answer = _Answer(serving, asked, sampling, prompt)
        if asked.stream:
            return await event_stream(request, answer.stream())
        return json_response(await while_connected(request, answer.whole()))
    except RequestError as error:
        raise _renamed(error, asked.field_names) from error


def _renamed(error: RequestError, names: dict[str, str]) -> RequestError:
    """The same error with the field under the name that the client sent."""
    if error.field not in names:
        return error
    name = names[error.field]
    message = str(error)
    if message.startswith(error.field):
        message = name + message.removeprefix(error.field)
    return RequestError(message, name)


class _Answer:
    """One request's way from chunks to response bodies."""

    def __init__(
        self, serving: Serving, asked: ChatRequest, sampling: SamplingParams, prompt: Prompt
    ) -> None:
        self._serving = serving
        self._asked = asked
        self._sampling = sampling
        self._prompt = prompt
        self._id = new_id("chatcmpl")
        self._created = now()
        self._num_generated = 0

    async def whole(self) -> ChatCompletion:
        chunks: list[list[GenerationChunk]] = [[] for _ in range(self._sampling.n)]
        pieces = self._serving.generate(self._id, [Job(self._prompt, self._sampling)])
        async with contextlib.aclosing(pieces):
            async for _, chunk in pieces:
                chunks[chunk.index].append(chunk)
        self._num_generated = sum(len(c.token_ids) for parts in chunks for c in parts)
        entries = [c.prompt_logprobs for parts in chunks for c in parts if c.prompt_logprobs]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._serving.model_name,
            choices=[self._choice(index, parts) for index, parts in enumerate(chunks)],
            usage=self._usage(),
            prompt_logprobs=self._prompt_logprobs(entries[0] if entries else None),
        )

    async def stream(self) -> AsyncGenerator[object, None]:
        started: set[int] = set()
        usage = None if self._asked.include_usage else UNSET
        pieces = self._serving.generate(self._id, [Job(self._prompt, self._sampling)])
        async with contextlib.aclosing(pieces):
            async for _, chunk in pieces:
                self._num_generated += len(chunk.token_ids)
                if chunk.index not in started:
                    # Every answer brings the prompt's log-probabilities; one copy is enough.
                    entries = None if started else chunk.prompt_logprobs
                    started.add(chunk.index)
                    role = ChatChunkChoice(
                        index=chunk.index, delta=Delta(role="assistant", content="")
                    )
                    yield self._event([role], usage, self._prompt_logprobs(entries))
                if chunk.text or chunk.finish_reason is not None or chunk.logprobs:
                    yield self._event([self._delta(chunk)], usage)
        if self._asked.include_usage:
            yield self._event([], self._usage())

    def _choice(self, index: int, parts: list[GenerationChunk]) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=AssistantMessage(content="".join(chunk.text for chunk in parts)),
            logprobs=chat_logprobs([entry for chunk in parts for entry in chunk.logprobs or ()])
            if self._asked.logprobs
            else None,
            finish_reason=parts[-1].finish_reason,
            stop_reason=parts[-1].stop_reason,
        )

    def _delta(self, chunk: GenerationChunk) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=chunk.index,
            delta=Delta(content=chunk.text) if chunk.text else Delta(),
            logprobs=chat_logprobs(chunk.logprobs or ()) if self._asked.logprobs else None,
            finish_reason=chunk.finish_reason,
            stop_reason=chunk.stop_reason,
        )

    def _prompt_logprobs(
        self, entries: tuple[TokenLogprob | None, ...] | None
    ) -> PromptLogprobs | msgspec.UnsetType:
        if self._asked.prompt_logprobs is None or entries is None:
            return UNSET
        return prompt_logprobs(entries, self._asked.prompt_logprobs)

    def _usage(self) -> Usage:
        return Usage.of(len(self._prompt.token_ids), self._num_generated)

    def _event(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | msgspec.UnsetType | None,
        entries: PromptLogprobs | msgspec.UnsetType = UNSET,
    ) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._serving.model_name,
            choices=choices,
            usage=usage,
            prompt_logprobs=entries,
        )
