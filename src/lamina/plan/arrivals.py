"""The nouns of workloads: requests over time."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise

import msgspec

from lamina.errors import ConfigError

PREFIX_BLOCK_TOKENS = 512
"""Tokens of a prompt that one of Mooncake's prefix hashes stands for."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request."""

    time_s: float
    """Since the workload began."""
    prompt_tokens: int
    output_tokens: int
    """Tokens to generate; at least 1."""
    prefix_hashes: tuple[int, ...] = ()
    """One per block of `PREFIX_BLOCK_TOKENS` of the prompt, the last of which may be short: equal
    hashes are equal tokens with equal tokens before them. Empty: nothing is known."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Requests in the order of their arrival; the first one need not arrive at 0."""

    name: str
    arrivals: tuple[Arrival, ...]

    def __post_init__(self) -> None:
        if not self.arrivals:
            raise ConfigError(f"workload {self.name} has no requests")
        assert all(a.time_s <= b.time_s for a, b in pairwise(self.arrivals)), "out of order"

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last."""
        return self.arrivals[-1].time_s - self.arrivals[0].time_s

    @property
    def rate(self) -> float:
        """Requests per second; 0 if all arrive at once."""
        return len(self.arrivals) / self.duration_s if self.duration_s else 0.0

    def faster(self, factor: float) -> Workload:
        """The same requests with `factor` times the rate."""
        if not (factor > 0 and math.isfinite(factor)):
            raise ConfigError(f"the factor on the rate must be positive, got {factor}")
        return self._with(_moved(a, a.time_s / factor) for a in self.arrivals)

    def from_first(self) -> Workload:
        """The same with times counted from the first arrival."""
        start_s = self.arrivals[0].time_s
        return self._with(_moved(a, a.time_s - start_s) for a in self.arrivals)

    def at_rate(self, requests_per_s: float) -> Workload:
        """The same requests at that mean rate."""
        if not self.rate:
            raise ConfigError(f"all requests of {self.name} arrive at once: there is no rate")
        if not (requests_per_s > 0 and math.isfinite(requests_per_s)):
            raise ConfigError(f"the rate must be positive, got {requests_per_s}")
        return self.faster(requests_per_s / self.rate)

    def between(self, start_s: float, stop_s: float = math.inf) -> Workload:
        """The requests that arrive in [start_s, stop_s), their times counted from `start_s`."""
        first = bisect_left(self.arrivals, start_s, key=lambda a: a.time_s)
        last = bisect_left(self.arrivals, stop_s, key=lambda a: a.time_s)
        if first >= last:
            raise ConfigError(
                f"workload {self.name} has no requests from {start_s:g} s to {stop_s:g} s; "
                f"it lasts from {self.arrivals[0].time_s:g} s to {self.arrivals[-1].time_s:g} s"
            )
        return self._with(_moved(a, a.time_s - start_s) for a in self.arrivals[first:last])

    def first(self, num_requests: int) -> Workload:
        """The first requests, at most all."""
        if num_requests < 1:
            raise ConfigError(f"the number of requests must be at least 1, got {num_requests}")
        return self._with(self.arrivals[:num_requests])

    def summary(self) -> WorkloadSummary:
        count = len(self.arrivals)
        gaps = [b.time_s - a.time_s for a, b in pairwise(self.arrivals)]
        mean_gap = sum(gaps) / len(gaps) if gaps else 0.0
        variance = sum((gap - mean_gap) ** 2 for gap in gaps) / len(gaps) if gaps else 0.0
        output = sum(a.output_tokens for a in self.arrivals)
        return WorkloadSummary(
            num_requests=count,
            duration_s=self.duration_s,
            rate=self.rate,
            gap_variation=math.sqrt(variance) / mean_gap if mean_gap else 0.0,
            mean_prompt_tokens=sum(a.prompt_tokens for a in self.arrivals) / count,
            mean_output_tokens=output / count,
            max_prompt_tokens=max(a.prompt_tokens for a in self.arrivals),
            max_total_tokens=max(a.prompt_tokens + a.output_tokens for a in self.arrivals),
            mean_decode_context=sum(
                (a.prompt_tokens + a.output_tokens / 2) * a.output_tokens for a in self.arrivals
            )
            / output,
        )

    def _with(self, arrivals: Iterable[Arrival]) -> Workload:
        return Workload(name=self.name, arrivals=tuple(arrivals))


class WorkloadSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a workload is like."""

    num_requests: int
    duration_s: float
    rate: float
    """Requests per second."""
    gap_variation: float
    """Standard deviation of the times between arrivals over their mean; 1 for a Poisson process."""
    mean_prompt_tokens: float
    mean_output_tokens: float
    max_prompt_tokens: int
    max_total_tokens: int
    """Longest prompt with its output."""
    mean_decode_context: float
    """Mean context length over all decode steps: prompt + output / 2, weighted by output."""


def _moved(arrival: Arrival, time_s: float) -> Arrival:
    return Arrival(
        time_s=time_s,
        prompt_tokens=arrival.prompt_tokens,
        output_tokens=arrival.output_tokens,
        prefix_hashes=arrival.prefix_hashes,
    )
