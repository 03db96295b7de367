"""Attention offloading to prefill instances: which requests, decided from counters. Pure.

Adrenaline (arXiv 2503.20552), load-aware offloading scheduling. In prefill-decode disaggregation
the decode attention and the KV of some requests can live in an executor that shares a prefill
instance's device. Offloaded work is bounded by a multiple of the local work, so that a layer's
remote attention hides behind the local attention of the same layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum

import msgspec

from lamina.errors import ConfigError


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """What decode attention can use of one instance."""

    memory_bytes: float
    """For KV."""
    bandwidth_bytes_per_s: float

    def __post_init__(self) -> None:
        for field in ("memory_bytes", "bandwidth_bytes_per_s"):
            if not getattr(self, field) >= 0:
                raise ConfigError(f"{field} must be at least 0, got {getattr(self, field)}")


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The requests whose decode attention runs in one place."""

    num_sequences: int = 0
    num_tokens: int = 0
    """Total of their lengths."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """Most offloaded work per unit of local work."""

    memory: float
    """OB_mem: as much as the executors have of the decode instance's memory and bandwidth."""
    compute: float
    """OB_comp: as much as the decode instance's other operators take before they are the limit."""

    @property
    def ratio(self) -> float:
        """OB."""
        return min(self.memory, self.compute)


class Reason(StrEnum):
    """What decided about a request."""

    WITHIN_BOUND = "within the bound"
    OWN_LOAD = "C1: with it at its longest, the offloaded load is above the bound"
    TOKENS = "C2: the offloaded total length is above the bound"
    SEQUENCES = "C2: the offloaded batch is above the bound"


class Decision(msgspec.Struct, frozen=True, array_like=True):
    """Whether a request's decode attention is offloaded, and why."""

    offload: bool
    reason: Reason


def memory_bound(executors: Iterable[Resources], decode: Resources) -> float:
    """OB_mem of the prefill instances' executors that serve one decode instance."""
    if decode.memory_bytes <= 0 or decode.bandwidth_bytes_per_s <= 0:
        raise ConfigError(
            "the decode instance has no memory or bandwidth for attention; give it a larger device "
            "or a smaller model"
        )
    shares = list(executors)
    return min(
        sum(e.memory_bytes for e in shares) / decode.memory_bytes,
        sum(e.bandwidth_bytes_per_s for e in shares) / decode.bandwidth_bytes_per_s,
    )


def compute_bound(max_batch: float, objective_batch: float) -> float:
    """OB_comp.

    Args:
        max_batch: batch at which the operators other than attention become compute-bound (B_max).
        objective_batch: batch that the decode instance serves within its objective for the time
            between tokens, without offloading (B_TPOT).
    """
    if objective_batch <= 0:
        return math.inf
    return max(0.0, (max_batch - objective_batch) / objective_batch)


def decide(bounds: Bounds, local: Load, offloaded: Load, max_tokens: int) -> Decision:
    """Where the decode attention of a new request goes.

    Args:
        local: requests of the decode instance whose attention is local, at their present lengths.
        offloaded: those whose attention is offloaded.
        max_tokens: the longest that the new request may become.
    """
    ratio = bounds.ratio
    if offloaded.num_tokens + max_tokens > ratio * local.num_tokens:
        return Decision(False, Reason.OWN_LOAD)
    if offloaded.num_tokens > ratio * local.num_tokens:
        return Decision(False, Reason.TOKENS)
    if offloaded.num_sequences > ratio * local.num_sequences:
        return Decision(False, Reason.SEQUENCES)
    return Decision(True, Reason.WITHIN_BOUND)
