"""What the front end yields for a request: text with its tokens, piece by piece."""

from __future__ import annotations

import msgspec

from lamina.types import FinishReason


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One token with its text, as OpenAI's servers report it."""

    token_id: int
    token: str
    """The token's own text; undecodable bytes appear as U+FFFD, `utf8` is exact."""
    utf8: bytes
    logprob: float
    rank: int
    top: tuple[tuple[int, str, bytes, float], ...] = ()
    """(token id, text, bytes, log-probability), best first."""


class GenerationChunk(msgspec.Struct, frozen=True, kw_only=True):
    """The next piece of one of a request's `n` answers."""

    index: int
    """Which of the `n` answers."""
    text: str
    """New text; the chunks' texts together are the whole answer. Never ends inside a character."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """With the first chunk, if asked for: one per prompt token, None for the first."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended the answer; None for end of sequence."""
    error: str | None = None


class CompletedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One of a request's `n` answers, whole."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    stop_reason: int | str | None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A request's prompt and all its answers (what `LLM.generate` returns)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    answers: tuple[CompletedAnswer, ...]
