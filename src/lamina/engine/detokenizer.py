"""Tokens to text, piece by piece: whole characters only, and stop strings.

Each token stands for some bytes, whatever its neighbours; an incremental UTF-8 decoder turns them
into characters. Text that may be the beginning of a stop string is held back until it is decided.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from lamina.engine.outputs import TokenLogprob
from lamina.engine.tokenizer import Tokenizer
from lamina.types import SamplingParams, TokenLogprobs


class Detokenized(NamedTuple):
    """What one push adds to the answer."""

    text: str
    stop: str | None
    """The stop string that ended the answer."""
    num_tokens: int
    """How many of the pushed tokens belong to the answer; those after a stop string do not."""


class Detokenizer:
    """The text of one answer.

    The answer continues the prompt: where a tokenizer drops the space before the first token of a
    text, the answer keeps it unless the prompt consists of skipped tokens alone.
    """

    def __init__(
        self, tokenizer: Tokenizer, sampling: SamplingParams, prompt_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = all(self._is_skipped(token_id) for token_id in prompt_token_ids)
        self._held = ""
        self._num_tokens = 0
        self._finished = False

    def push(self, token_ids: Sequence[int], finished: bool) -> Detokenized:
        """Add tokens; with `finished`, also everything that was held back.

        Incomplete characters at the end become U+FFFD. After a stop string or `finished`, nothing
        more may be pushed.
        """
        assert not self._finished
        pieces = []
        for count, token_id in enumerate(token_ids, start=1):
            self._num_tokens += 1
            text, stop = self._extend(self._decoder.decode(self._take_bytes(token_id)))
            pieces.append(text)
            if stop is not None:
                self._finished = True
                return Detokenized("".join(pieces), stop, count)
        if finished:
            self._finished = True
            text, stop = self._extend(self._decoder.decode(b"", final=True))
            pieces.append(text if stop is not None else text + self._held)
            return Detokenized("".join(pieces), stop, len(token_ids))
        return Detokenized("".join(pieces), None, len(token_ids))

    def _is_skipped(self, token_id: int) -> bool:
        return self._sampling.skip_special_tokens and self._tokenizer.is_special(token_id)

    def _take_bytes(self, token_id: int) -> bytes:
        if self._is_skipped(token_id):
            return b""
        at_start, self._at_start = self._at_start, False
        return self._tokenizer.token_bytes(token_id, at_start=at_start)

    def _extend(self, new_text: str) -> tuple[str, str | None]:
        """(text that is decided, stop string found)."""
        stops = self._sampling.stop
        if not new_text or not stops:
            return new_text, None
        held, text = self._held, self._held + new_text
        if self._num_tokens >= self._sampling.min_tokens:
            found = _first_stop(text, stops, len(held))
            if found is not None:
                end, stop = found
                keep = end if self._sampling.include_stop_str_in_output else end - len(stop)
                return text[:keep], stop
        num_held = max(_longest_beginning(text, stop) for stop in stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None


def _first_stop(text: str, stops: Sequence[str], already: int) -> tuple[int, str] | None:
    """(end, stop string) of the match that ends first, the longest if several do.

    Only matches that end after the first `already` characters count: this makes the result
    independent of how the text was cut into tokens.
    """
    found = []
    for stop in stops:
        start = text.find(stop, max(0, already - len(stop) + 1))
        if start >= 0:
            found.append((start + len(stop), stop))
    return min(found, key=lambda match: (match[0], -len(match[1])), default=None)


def _longest_beginning(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def describe_logprobs(tokenizer: Tokenizer | None, entry: TokenLogprobs) -> TokenLogprob:
    """Add the tokens' own text and bytes to the engine's log-probabilities.

    Without a tokenizer both are empty.
    """

    def spell(token_id: int) -> tuple[str, bytes]:
        if tokenizer is None:
            return "", b""
        return tokenizer.token_text(token_id), tokenizer.token_bytes(token_id)

    token, utf8 = spell(entry.token_id)
    return TokenLogprob(
        token_id=entry.token_id,
        token=token,
        utf8=utf8,
        logprob=entry.logprob,
        rank=entry.rank,
        top=tuple((token_id, *spell(token_id), logprob) for token_id, logprob in entry.top),
    )
