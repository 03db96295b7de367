"""The front end's record of its requests: checking and splitting them, tokens to chunks of text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from lamina.engine.detokenizer import Detokenized, Detokenizer, describe_logprobs
from lamina.engine.messages import ModelInfo
from lamina.engine.outputs import GenerationChunk, TokenLogprob
from lamina.engine.tokenizer import Tokenizer
from lamina.errors import RequestError
from lamina.types import EngineRequest, FinishReason, SamplingParams, SequenceOutput, TokenLogprobs


def check_request(
    prompt_token_ids: Sequence[int], sampling: SamplingParams, model: ModelInfo
) -> SamplingParams:
    """`sampling` with max_tokens resolved, if the model can serve the request.

    Raises:
        RequestError: the prompt is empty, too long or has unknown ids, or max_tokens does not fit.
    """
    num_prompt = len(prompt_token_ids)
    if num_prompt == 0:
        raise RequestError("prompt is empty: it needs at least one token", "prompt")
    for token_id in prompt_token_ids:
        if not 0 <= token_id < model.vocab_size:
            raise RequestError(
                f"prompt has token id {token_id}, but ids run from 0 to {model.vocab_size - 1}",
                "prompt",
            )
    room = model.max_model_len - num_prompt
    if room < 1:
        raise RequestError(
            f"prompt has {num_prompt} tokens, but prompt and answer together may have "
            f"{model.max_model_len}; shorten the prompt, or serve with a larger max_model_len",
            "prompt",
        )
    if sampling.max_tokens is None:
        return msgspec.structs.replace(sampling, max_tokens=room)
    if sampling.max_tokens > room:
        raise RequestError(
            f"max_tokens is {sampling.max_tokens}, but after a prompt of {num_prompt} tokens only "
            f"{room} fit into the context of {model.max_model_len}; lower max_tokens or leave it "
            "out",
            "max_tokens",
        )
    return sampling


def sequence_seed(seed: int, index: int) -> int:
    """The seed of answer `index` of a request with this seed; the first answer's is the seed."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


class Answer:
    """One of a request's `n` answers: a sequence in the engine and its text so far."""

    def __init__(self, index: int, request: EngineRequest, tokenizer: Tokenizer | None) -> None:
        self.index = index
        self.request = request
        self.finished = False
        self._tokenizer = tokenizer
        self._prompt_logprobs: list[TokenLogprob | None] | None = None
        if request.sampling.prompt_logprobs is not None:
            self._prompt_logprobs = [None]
        self._detokenizer = (
            Detokenizer(tokenizer, request.sampling, request.prompt_token_ids)
            if tokenizer is not None
            else None
        )

    @classmethod
    def split(
        cls,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        seed: int,
        model: ModelInfo,
        tokenizer: Tokenizer | None,
    ) -> list[Answer]:
        """The `n` answers of a request that `check_request` has passed."""
        prompt = tuple(prompt_token_ids)
        return [
            cls(
                index,
                EngineRequest(
                    request_id=f"{request_id}:{index}",
                    prompt_token_ids=prompt,
                    sampling=sampling,
                    seed=sequence_seed(seed, index),
                    eos_token_ids=model.eos_token_ids,
                ),
                tokenizer,
            )
            for index in range(sampling.n)
        ]

    def advance(self, output: SequenceOutput) -> GenerationChunk | None:
        """The chunk for what a step added; None as long as only the prompt advances."""
        if self._prompt_logprobs is not None:
            self._prompt_logprobs += self._describe(output.prompt_logprobs)
        finish_reason = output.finish_reason
        if not output.token_ids and finish_reason is None:
            return None
        added = self._detokenize(output.token_ids, finish_reason is not None)
        stop_reason: int | str | None = added.stop
        if added.stop is not None:
            finish_reason = FinishReason.STOP
        elif not self._is_end_of_sequence(output.stop_token_id):
            stop_reason = output.stop_token_id
        self.finished = finish_reason is not None
        logprobs = None
        if self.request.sampling.logprobs is not None:
            logprobs = tuple(self._describe(output.logprobs[: added.num_tokens]))
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return GenerationChunk(
            index=self.index,
            text=added.text,
            token_ids=output.token_ids[: added.num_tokens],
            logprobs=logprobs,
            prompt_logprobs=tuple(prompt_logprobs) if prompt_logprobs is not None else None,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            error=output.error if finish_reason is FinishReason.ERROR else None,
        )

    def end(self, reason: FinishReason, error: str | None = None) -> GenerationChunk:
        """The last chunk of an answer that ends for a reason outside the engine's step."""
        text = self._detokenize((), True).text
        self.finished = True
        return GenerationChunk(index=self.index, text=text, finish_reason=reason, error=error)

    def _detokenize(self, token_ids: tuple[int, ...], finished: bool) -> Detokenized:
        if self._detokenizer is None:
            return Detokenized("", None, len(token_ids))
        return self._detokenizer.push(token_ids, finished)

    def _describe(self, entries: Sequence[TokenLogprobs]) -> list[TokenLogprob]:
        return [describe_logprobs(self._tokenizer, entry) for entry in entries]

    def _is_end_of_sequence(self, stop_token_id: int | None) -> bool:
        return stop_token_id in self.request.eos_token_ids and not self.request.sampling.ignore_eos
