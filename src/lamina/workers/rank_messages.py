"""What the engine and a rank send each other in every step, beside control messages."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import msgspec
import torch

from lamina.errors import ProtocolMismatch
from lamina.types import StepPlan
from lamina.workers.model import StepInputs
from lamina.workers.plans import Times
from lamina.workers.steptimes import NUM_TIMES

_TIMES_PER_LAYER = 4
"""Of an executor's report: see `plans.Report`."""
_FLOAT64_BYTES = 8


class _Step(msgspec.Struct, frozen=True, array_like=True):
    plan: StepPlan
    input_ids: bytes
    position_ids: bytes
    logit_rows: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Step).decode


def pack_step(plan: StepPlan, inputs: StepInputs) -> torch.Tensor:
    """A STEP message, uint8."""
    arrays = (x.numpy().tobytes() for x in inputs)
    return torch.frombuffer(bytearray(_encode(_Step(plan, *arrays))), dtype=torch.uint8)


def unpack_step(payload: torch.Tensor, peer: str) -> tuple[StepPlan, StepInputs]:
    """The inverse; copies. ProtocolMismatch: it is not a step."""
    try:
        step = _decode(payload.numpy().data)
    except (msgspec.DecodeError, AssertionError) as error:
        raise ProtocolMismatch(f"unreadable step: {error}", peer=peer) from error
    return step.plan, StepInputs(
        _int64(step.input_ids), _int64(step.position_ids), _int64(step.logit_rows)
    )


def _int64(data: bytes) -> torch.Tensor:
    if not data:
        return torch.empty(0, dtype=torch.int64)
    return torch.frombuffer(bytearray(data), dtype=torch.int64)


class RankResult(NamedTuple):
    """What a rank says when its last slice of a step is through."""

    times: array[float]
    """`SliceTimes` of the slices that it ran, zeros for the others."""
    report: Times
    """Its local executor's; zeros where that had nothing to do."""
    logits: torch.Tensor | None
    """Of the rank that ran the step's last slice (the first of its replica)."""


def result_bytes(num_layers: int, max_logits_bytes: int) -> int:
    """Capacity of a RESULT mailbox."""
    return _head_bytes(num_layers) + max_logits_bytes


def result_parts(result: RankResult) -> list[torch.Tensor]:
    """A RESULT message, to be posted."""
    times = torch.frombuffer(result.times, dtype=torch.float64)
    logits = [] if result.logits is None else [result.logits.contiguous()]
    return [times, torch.from_numpy(result.report), *logits]


def unpack_result(
    payload: torch.Tensor, num_layers: int, logits_shape: tuple[int, int], dtype: torch.dtype
) -> RankResult:
    """The inverse. The logits are a view of the payload; the rest is copied.

    Args:
        logits_shape: if there are any.
    """
    num_times = NUM_TIMES * (num_layers + 1)
    head = payload[: _head_bytes(num_layers)].view(torch.float64)
    rest = payload[_head_bytes(num_layers) :]
    return RankResult(
        array("d", head[:num_times].tolist()),
        head[num_times:].view(num_layers, _TIMES_PER_LAYER).numpy().copy(),
        rest.view(dtype).view(logits_shape) if len(rest) else None,
    )


def _head_bytes(num_layers: int) -> int:
    return _FLOAT64_BYTES * (NUM_TIMES * (num_layers + 1) + _TIMES_PER_LAYER * num_layers)
