"""Messages between the front end's client and the engine process: msgspec over one ZeroMQ pair.

client --> engine   AddRequests, Abort, CheckIntegrity, Shutdown
engine --> client   Ready once, then Outputs after each step and each Abort, IntegrityReport
                    in answer to CheckIntegrity, and Failed when it can no longer serve
"""

from __future__ import annotations

import msgspec

from lamina.types import EngineRequest, SequenceOutput


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the front end must know of the model that the engine runs."""

    architecture: str
    dtype: str
    vocab_size: int
    max_model_len: int
    """Most tokens of a sequence, prompt and output together; resolved by the engine."""
    eos_token_ids: tuple[int, ...]
    max_num_seqs: int
    max_num_waiting: int
    attention: str
    """One line for people: where attention runs and how it is partitioned."""


class ExecutorStats(msgspec.Struct, frozen=True, kw_only=True):
    """Page use of one attention executor, from the engine's own arithmetic."""

    name: str
    pages_used: int
    pages_total: int
    alive: bool = True
    weight: float | None = None
    """The share of new work that it gets, as a ratio to the others'; None: the local executor."""


PHASE_BUCKETS_S = (
    1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Upper bounds, inclusive, of the buckets of `PhaseHistogram`."""


class PhaseHistogram(msgspec.Struct, frozen=True, array_like=True):
    """How many steps spent how long in one phase."""

    counts: tuple[int, ...]
    """Steps per bucket of `PHASE_BUCKETS_S`, and those above the last."""
    sum_s: float


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot; totals count from the engine's start."""

    num_running: int = 0
    num_waiting: int = 0
    executors: tuple[ExecutorStats, ...] = ()
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    seconds: dict[str, float] = msgspec.field(default_factory=dict)
    """Where the engine's time went since its start, by phase."""
    phases: dict[str, PhaseHistogram] = msgspec.field(default_factory=dict)
    """Where the time of steps went; keys are `breakdown.PARTS`."""


class AddRequests(msgspec.Struct, frozen=True, tag=True):
    requests: tuple[EngineRequest, ...]


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: tuple[str, ...]


class CheckIntegrity(msgspec.Struct, frozen=True, tag=True):
    """Ask every executor to verify its allocator against the engine's page budget."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    pass


class Ready(msgspec.Struct, frozen=True, tag=True):
    model: ModelInfo
    stats: EngineStats


class Outputs(msgspec.Struct, frozen=True, tag=True):
    outputs: tuple[SequenceOutput, ...]
    stats: EngineStats


class IntegrityReport(msgspec.Struct, frozen=True, tag=True):
    problems: tuple[str, ...]
    """Empty when every allocator is sound and agrees with the engine."""
    executors: tuple[ExecutorStats, ...]
    """As the executors themselves count."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot serve (any more). Sent instead of Ready, or after it."""

    kind: str
    """The error's class name."""
    message: str


ToEngine = AddRequests | Abort | CheckIntegrity | Shutdown
FromEngine = Ready | Outputs | IntegrityReport | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
