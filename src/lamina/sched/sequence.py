"""A sequence as the scheduler sees it: its tokens, its progress, and where its KV lives."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamina.types import EngineRequest, FinishReason, Share


@dataclass(slots=True)
class Sequence:
    """One request's sequence. Only the batcher changes it."""

    id: int
    request: EngineRequest
    output_token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose k and v are committed on `placement`."""
    prefill_target: int = 0
    """Tokens that it had when it was admitted; its rows attend locally until they are computed."""
    placement: tuple[Share, ...] = ()
    """Where its KV is kept; empty while it waits."""
    reserved_tokens: int = 0
    """Its pages hold this many tokens."""
    micro_batch: int = 0
    """Whose steps it runs in, unless it waits."""
    rows_in_flight: int = 0
    """Its rows in a step that is planned and not yet applied."""
    aborted: bool = False
    """It ends when the step in flight is applied."""
    starved: bool = False
    """It was left out of a step for want of a page, and is the next to get one."""
    num_scored: int = 0
    """Prompt positions whose next token's log-probability was reported (if asked for)."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def in_flight(self) -> bool:
        return self.rows_in_flight > 0

    @property
    def prompt_rows_left(self) -> int:
        """Rows of `prefill_target` that no step has, not even one in flight."""
        return max(0, self.prefill_target - self.num_computed - self.rows_in_flight)

    def longest(self, max_model_len: int) -> int:
        """Most tokens that it may ever have."""
        max_tokens = self.request.sampling.max_tokens
        if max_tokens is None:
            return max_model_len
        return min(max_model_len, self.num_prompt_tokens + max_tokens)

    @property
    def prefilling(self) -> bool:
        return self.num_computed < self.prefill_target

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions [start, stop), over prompt and output."""
        num_prompt = self.num_prompt_tokens
        result = list(self.request.prompt_token_ids[start:stop])
        if stop > num_prompt:
            result += self.output_token_ids[max(start - num_prompt, 0) : stop - num_prompt]
        return result


@dataclass(frozen=True, slots=True)
class Finish:
    """Why and how a sequence ended."""

    reason: FinishReason
    stop_token_id: int | None = None
    """The token that ended it; it is not part of the output."""


def check_finish(sequence: Sequence, token_id: int, max_model_len: int) -> Finish | None:
    """Whether `token_id`, sampled as the sequence's next token, ends it (before it is appended)."""
    params = sequence.request.sampling
    num_output = len(sequence.output_token_ids)
    if num_output >= params.min_tokens:
        is_eos = not params.ignore_eos and token_id in sequence.request.eos_token_ids
        if is_eos or token_id in params.stop_token_ids:
            return Finish(FinishReason.STOP, token_id)
    if params.max_tokens is not None and num_output + 1 >= params.max_tokens:
        return Finish(FinishReason.LENGTH)
    if sequence.num_tokens + 1 >= max_model_len:
        return Finish(FinishReason.LENGTH)
    return None
