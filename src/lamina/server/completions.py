"""POST /v1/completions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence

import msgspec
from fastapi import Request, Response
from msgspec import UNSET
from msgspec.structs import replace

from lamina.engine.outputs import GenerationChunk, TokenLogprob
from lamina.server.body import decode, read_body
from lamina.server.errors import json_response
from lamina.server.logprobs import LegacyWriter, join, prompt_logprobs
from lamina.server.prompts import Prompt
from lamina.server.protocol import CompletionRequest
from lamina.server.responses import Completion, CompletionChoice, Usage, new_id, now
from lamina.server.serving import Job, Piece, Serving
from lamina.server.streaming import event_stream, while_connected
from lamina.types import FinishReason, SamplingParams


async def create_completion(serving: Serving, request: Request) -> Response:
    """Raises LaminaError for every refusal, ClientDisconnect when nobody waits any more."""
    asked = decode(await read_body(request, serving.max_body_bytes), CompletionRequest)
    serving.check_model(asked.model)
    sampling = asked.sampling()
    prompts = await serving.prompts.completion(asked.prompt, sampling.n)
    if asked.echo:
        prompts = [await _with_text(serving, prompt, sampling) for prompt in prompts]
    answer = _Answer(serving, asked, sampling, prompts)
    if asked.stream:
        return await event_stream(request, answer.stream())
    return json_response(await while_connected(request, answer.whole()))


async def _with_text(serving: Serving, prompt: Prompt, sampling: SamplingParams) -> Prompt:
    """A prompt that can be echoed; token ids are decoded as the answer will be."""
    if prompt.text is not None:
        return prompt
    text = await serving.prompts.decode(
        prompt.token_ids, "prompt", skip_special=sampling.skip_special_tokens
    )
    return Prompt(prompt.token_ids, text)


class _Answer:
    """One request's way from chunks to response bodies."""

    def __init__(
        self,
        serving: Serving,
        asked: CompletionRequest,
        sampling: SamplingParams,
        prompts: Sequence[Prompt],
    ) -> None:
        self._serving = serving
        self._asked = asked
        self._sampling = sampling
        self._prompts = prompts
        self._id = new_id("cmpl")
        self._created = now()
        self._writers: dict[int, LegacyWriter] = {}
        self._num_generated = 0

    def _jobs(self) -> list[Job]:
        """Without max_tokens, a prompt near the context's end gets what room is left."""
        if self._asked.max_tokens is not None:
            return [Job(prompt, self._sampling) for prompt in self._prompts]
        default, context = self._sampling.max_tokens, self._serving.engine.model.max_model_len
        assert default is not None
        return [
            Job(
                prompt,
                replace(
                    self._sampling, max_tokens=max(min(default, context - len(prompt.token_ids)), 1)
                ),
            )
            for prompt in self._prompts
        ]

    async def whole(self) -> Completion:
        num_choices = len(self._prompts) * self._sampling.n
        parts: list[list[CompletionChoice]] = [[] for _ in range(num_choices)]
        pieces = self._serving.generate(self._id, self._jobs())
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if choice := self._choice(piece):
                    parts[choice.index].append(choice)
        return self._body([_joined(part) for part in parts], self._usage())

    async def stream(self) -> AsyncGenerator[object, None]:
        usage = None if self._asked.include_usage else UNSET
        pieces = self._serving.generate(self._id, self._jobs())
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if choice := self._choice(piece):
                    yield self._body([choice], usage)
        if self._asked.include_usage:
            yield self._body([], self._usage())

    def _choice(self, piece: Piece) -> CompletionChoice | None:
        """What `piece` adds to its answer; None when there is nothing to show yet."""
        chunk = piece.chunk
        self._num_generated += len(chunk.token_ids)
        if self._asked.only_echo:
            chunk = _without_token(chunk)
        index = piece.job * self._sampling.n + chunk.index
        choice = CompletionChoice(
            index=index,
            text=chunk.text,
            finish_reason=chunk.finish_reason,
            stop_reason=chunk.stop_reason,
        )
        is_first = index not in self._writers
        if is_first:
            self._begin(choice, self._prompts[piece.job], chunk.prompt_logprobs or ())
        if self._asked.logprobs is not None:
            answer = self._writers[index].answer(chunk.logprobs or ())
            choice.logprobs = join([choice.logprobs, answer]) if choice.logprobs else answer
        has_news = bool(chunk.text or chunk.logprobs or chunk.finish_reason)
        return choice if is_first or has_news else None

    def _begin(
        self,
        choice: CompletionChoice,
        prompt: Prompt,
        entries: Sequence[TokenLogprob | None],
    ) -> None:
        """What only an answer's first piece has: the echo and the prompt's log-probabilities."""
        asked = self._asked
        hidden = (
            self._serving.prompts.special_ids()
            if self._sampling.skip_special_tokens
            else frozenset[int]()
        )
        writer = self._writers[choice.index] = LegacyWriter(asked.logprobs or 0, hidden)
        if asked.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(entries, asked.prompt_logprobs)
        if asked.echo:
            text = prompt.text or ""
            choice.text = text + choice.text
            if asked.logprobs is not None:
                first_id = prompt.token_ids[0]
                choice.logprobs = writer.echo(
                    entries, (first_id, self._serving.prompts.token_text(first_id)), text
                )

    def _usage(self) -> Usage:
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in self._prompts)
        return Usage.of(num_prompt_tokens, 0 if self._asked.only_echo else self._num_generated)

    def _body(
        self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None
    ) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._serving.model_name,
            choices=choices,
            usage=usage,
        )


def _without_token(chunk: GenerationChunk) -> GenerationChunk:
    """`chunk` for a request with max_tokens 0: its token was generated for the prompt's sake."""
    return GenerationChunk(
        index=chunk.index,
        text="",
        prompt_logprobs=chunk.prompt_logprobs,
        finish_reason=chunk.finish_reason and FinishReason.LENGTH,
    )


def _joined(parts: Sequence[CompletionChoice]) -> CompletionChoice:
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return CompletionChoice(
        index=parts[0].index,
        text="".join(part.text for part in parts),
        logprobs=join(logprobs) if logprobs else None,
        finish_reason=parts[-1].finish_reason,
        stop_reason=parts[-1].stop_reason,
        prompt_logprobs=parts[0].prompt_logprobs,
    )
