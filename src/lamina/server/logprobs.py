"""Log-probabilities in the three shapes that clients know: legacy, chat and vLLM's of prompts."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from lamina.engine.outputs import TokenLogprob
from lamina.server.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    LegacyLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)

_Utf8 = codecs.getincrementaldecoder("utf-8")


class LegacyWriter:
    """The legacy parallel lists of one answer, piece by piece.

    `text_offset` counts characters of prompt (if echoed) and answer. Tokens that are left out of
    the text have no width; a token that starts inside a character has that character's offset.
    """

    def __init__(self, num_top: int, hidden_ids: frozenset[int]) -> None:
        self._num_top = num_top
        self._hidden_ids = hidden_ids
        self._offset = 0
        self._decoder = _Utf8("replace")

    def echo(
        self, entries: Sequence[TokenLogprob | None], first: tuple[int, str], text: str
    ) -> LegacyLogprobs:
        """The prompt's part: `first` is the id and text of its first token, which has no value.

        The answer's offsets start behind `text`.
        """
        out = _empty()
        for entry in entries:
            if entry is None:
                token_id, token = first
                self._place(out, token_id, token, token.encode())
                out.token_logprobs.append(None)
                out.top_logprobs.append(None)
            else:
                self._add(out, entry)
        out.text_offset = [min(offset, len(text)) for offset in out.text_offset]
        self._offset = len(text)
        self._decoder.reset()
        return out

    def answer(self, entries: Sequence[TokenLogprob]) -> LegacyLogprobs:
        out = _empty()
        for entry in entries:
            self._add(out, entry)
        return out

    def _add(self, out: LegacyLogprobs, entry: TokenLogprob) -> None:
        self._place(out, entry.token_id, entry.token, entry.utf8)
        out.token_logprobs.append(_finite(entry.logprob))
        top: dict[str, float] = {}
        for _, text, _, logprob in entry.top[: self._num_top]:
            top.setdefault(text, _finite(logprob))
        top.setdefault(entry.token, _finite(entry.logprob))
        out.top_logprobs.append(top)

    def _place(self, out: LegacyLogprobs, token_id: int, token: str, utf8: bytes) -> None:
        out.tokens.append(token)
        out.text_offset.append(self._offset)
        if token_id not in self._hidden_ids:
            self._offset += len(self._decoder.decode(utf8))


def join(parts: Sequence[LegacyLogprobs]) -> LegacyLogprobs:
    """Consecutive pieces as one."""
    whole = _empty()
    for part in parts:
        whole.text_offset += part.text_offset
        whole.token_logprobs += part.token_logprobs
        whole.tokens += part.tokens
        whole.top_logprobs += part.top_logprobs
    return whole


def chat_logprobs(entries: Sequence[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=entry.token,
                logprob=_finite(entry.logprob),
                bytes=list(entry.utf8),
                top_logprobs=[
                    TopLogprob(token=text, logprob=_finite(logprob), bytes=list(utf8))
                    for _, text, utf8, logprob in entry.top
                ],
            )
            for entry in entries
        ]
    )


def prompt_logprobs(entries: Sequence[TokenLogprob | None], num_top: int) -> PromptLogprobs:
    """vLLM's shape: per position the most likely tokens and the prompt's own, by token id."""
    return [None if entry is None else _by_id(entry, num_top) for entry in entries]


def _by_id(entry: TokenLogprob, num_top: int) -> dict[str, PromptLogprob]:
    table = {
        str(token_id): PromptLogprob(logprob=_finite(logprob), rank=rank, decoded_token=text)
        for rank, (token_id, text, _, logprob) in enumerate(entry.top[:num_top], start=1)
    }
    own = PromptLogprob(logprob=_finite(entry.logprob), rank=entry.rank, decoded_token=entry.token)
    return table | {str(entry.token_id): own}


def _finite(logprob: float) -> float:
    """JSON has no minus infinity; OpenAI's servers write -9999 for it."""
    return max(logprob, -9999.0)


def _empty() -> LegacyLogprobs:
    return LegacyLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
