"""The nouns of Lamina that cross module and process boundaries. No torch here.

A *row* is one token of a step's flattened token dimension. A step plan says everything about a
step except tensors; it is made once per step by `sched.batcher` and split once per executor.
"""

from __future__ import annotations

import math
from enum import StrEnum

import msgspec

from lamina.errors import RequestError

LOCAL = 0
"""Executor id of the one in the model worker's own process; remote ones are 1, 2, ..."""

MAX_LOGPROBS = 20


class FinishReason(StrEnum):
    """Why a sequence ended. The values are OpenAI's, plus `abort` and `error`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose tokens and when to stop. Names and meanings are those of vLLM and OpenAI.

    Raises:
        RequestError: a value is out of range; `field` names it.
    """

    n: int = 1
    max_tokens: int | None = 16
    """None: up to the model's context length."""
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """Log-probabilities of each generated token and of this many most likely ones; None: off."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""

    def __post_init__(self) -> None:
        def need(ok: bool, field: str, want: str) -> None:
            if not ok:
                raise RequestError(f"{field} must be {want}, got {getattr(self, field)}", field)

        for field in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty",
                      "repetition_penalty"):  # fmt: skip
            need(math.isfinite(getattr(self, field)), field, "a finite number")
        need(1 <= self.n <= 128, "n", "between 1 and 128")
        need(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        need(self.min_tokens >= 0, "min_tokens", "at least 0")
        need(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"at most max_tokens ({self.max_tokens})",
        )
        need(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        need(0.0 < self.top_p <= 1.0, "top_p", "greater than 0 and at most 1")
        need(self.top_k >= -1, "top_k", "-1 (off), 0 (off) or positive")
        need(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        need(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        need(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        need(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", "in (0, 100]")
        need(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a signed 64-bit integer")
        need(all(self.stop), "stop", "non-empty strings")
        need(all(t >= 0 for t in self.stop_token_ids), "stop_token_ids", "non-negative token ids")
        for field in ("logprobs", "prompt_logprobs"):
            count = getattr(self, field)
            need(
                count is None or 0 <= count <= MAX_LOGPROBS, field, f"between 0 and {MAX_LOGPROBS}"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence that the engine is asked to continue (the front end splits `n` > 1 itself)."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    """The sequence's own seed, drawn at random by the front end if the user gave none."""
    eos_token_ids: tuple[int, ...] = ()


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, before temperature and penalties (natural log)."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...]
    """The most likely tokens and their log-probabilities, best first."""


class SequenceOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one step of the engine adds to one request."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """For prompt positions 1, 2, ...; piece by piece in order, before or with the first token."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The stop token (or end of sequence) that ended the sequence; it is not in `token_ids`."""
    error: str | None = None
    """What went wrong when `finish_reason` is ERROR."""


class Share(msgspec.Struct, frozen=True, array_like=True):
    """The part of a sequence's KV that one executor keeps: some head units of some tokens.

    Head units: see `attention.partition`. A *placement* is shares that cover every unit of every
    token exactly once; for each unit the one with an open end takes the new tokens.
    """

    executor: int
    unit_start: int
    unit_stop: int
    token_start: int = 0
    """A multiple of the page's tokens."""
    token_stop: int | None = None
    """None: open. Otherwise a multiple of the page's tokens."""

    @property
    def num_units(self) -> int:
        return self.unit_stop - self.unit_start

    def num_tokens(self, length: int) -> int:
        """Tokens that lie here of a sequence of `length` tokens."""
        stop = length if self.token_stop is None else min(length, self.token_stop)
        return max(0, stop - self.token_start)


class Span(msgspec.Struct, frozen=True, array_like=True):
    """The consecutive rows of one sequence in a step."""

    sequence: int
    num_rows: int
    context_tokens: int
    """Tokens of the sequence whose k and v are committed; the first row's position."""
    attend_on: tuple[Share, ...]
    """Where these rows' attention is computed: disjoint shares, together all units and tokens."""
    store_on: tuple[Share, ...]
    """Where these rows' k and v are kept; contains `attend_on`. A share takes the rows whose
    positions lie in it."""


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """Everything about a step except tensors. Rows are the spans' rows in order."""

    step: int
    """Counts up from 1, over all micro-batches of an engine."""
    micro_batch: int
    spans: tuple[Span, ...]
    releases: tuple[tuple[int, int], ...] = ()
    """(executor, sequence): drop all pages of the sequence before this step runs."""

    @property
    def num_rows(self) -> int:
        return sum(span.num_rows for span in self.spans)

    def executors(self) -> set[int]:
        """Executors that take part in this step or have pages to release."""
        return {s.executor for span in self.spans for s in span.store_on} | {
            e for e, _ in self.releases
        }

    def for_executor(self, executor: int) -> ExecutorPlan:
        """The part of this plan that concerns one executor."""
        spans = []
        is_partial = False
        for span in self.spans:
            for share in span.store_on:
                if share.executor != executor:
                    continue
                attends = share in span.attend_on
                part = _executor_span(span, share, attends=attends)
                if part is not None:
                    spans.append(part)
                    is_partial |= attends and share.num_tokens(
                        span.context_tokens + span.num_rows
                    ) < (span.context_tokens + span.num_rows)
        return ExecutorPlan(
            step=self.step,
            micro_batch=self.micro_batch,
            spans=tuple(spans),
            releases=tuple(sequence for e, sequence in self.releases if e == executor),
            is_partial=is_partial,
        )


def _executor_span(span: Span, share: Share, *, attends: bool) -> ExecutorSpan | None:
    """What one share has to do with a span; None: nothing yet or nothing any more."""
    before = share.num_tokens(span.context_tokens)
    num_stored = share.num_tokens(span.context_tokens + span.num_rows) - before
    if num_stored == 0 and not (attends and before):
        return None
    assert not attends or num_stored in (0, span.num_rows), (
        "rows that attend to each other are stored by one executor"
    )
    return ExecutorSpan(
        sequence=span.sequence,
        unit_start=share.unit_start,
        unit_stop=share.unit_stop,
        context_tokens=before,
        num_attending=span.num_rows if attends else 0,
        num_stored=num_stored,
        first_position=span.context_tokens - share.token_start,
    )


class ExecutorSpan(msgspec.Struct, frozen=True, array_like=True):
    """A share of a span as its executor sees it: tokens and positions count from the share's first
    token."""

    sequence: int
    unit_start: int
    unit_stop: int
    context_tokens: int
    """The committed length: the executor truncates the share to it before it appends."""
    num_attending: int
    """Rows that attend here: all of the span, or none (no q comes, no output goes)."""
    num_stored: int
    """Rows whose k and v are appended here. If rows attend: the same rows, or none."""
    first_position: int
    """Of the first row that attends, from the share's first token; `context_tokens` or more. If
    rows are stored that do not attend, they begin at `context_tokens` all the same."""


class ExecutorPlan(msgspec.Struct, frozen=True, array_like=True):
    """What one executor must know of a step, ahead of layer 0.

    An executor keeps KV in *lanes*: one per sequence and `page_units` head units (set when it is
    started), each with pages of its own. Payloads hold, span by span and for each of its lanes in
    the order of the units, the rows of the lane's heads: q and out those that attend, k and v those
    that are stored (all k, then all v).
    """

    step: int
    micro_batch: int
    spans: tuple[ExecutorSpan, ...]
    releases: tuple[int, ...] = ()
    is_partial: bool = False
    """Other executors attend to other tokens of some rows: outputs are float32, followed by the
    float32 LSE of every row and head, and sinks count only where the row itself is stored."""


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for a >= 0 and b > 0."""
    return -(-a // b)
