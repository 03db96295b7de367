"""What a simulation (or a measurement) of a deployment says, as plain numbers."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def percentiles(
    values: Iterable[float], weights: Iterable[int] | None = None
) -> Percentiles | None:
    """Of values that occur `weights` times each (once by default); None if there are none.

    A percentile is the smallest value that at least so many lie at or below.
    """
    sorted_values = numpy.asarray(list(values), dtype=float)
    counts = numpy.asarray(
        list(weights) if weights is not None else numpy.ones(len(sorted_values)), dtype=float
    )
    if not counts.sum():
        return None
    order = numpy.argsort(sorted_values, kind="stable")
    sorted_values, counts = sorted_values[order], counts[order]
    total = counts.cumsum()

    def at(share: float) -> float:
        index = int(numpy.searchsorted(total, share * total[-1], side="left"))
        return float(sorted_values[min(index, len(sorted_values) - 1)])

    return Percentiles(
        mean=float((sorted_values * counts).sum() / total[-1]),
        p50=at(0.5),
        p90=at(0.9),
        p99=at(0.99),
        max=at(1.0),
    )


class PoolUse(msgspec.Struct, frozen=True, kw_only=True):
    """How busy the devices of one pool were, as shares of their peaks over the whole time."""

    role: str
    device: str
    count: int
    compute: float
    bandwidth: float
    memory: float
    """Weights and KV that hold tokens or are reserved for them."""
    network: float
    """Of both directions together."""


class Saturated(msgspec.Struct, frozen=True, kw_only=True):
    """While requests waited for a place: from when a tenth of all had ended to when none waited."""

    seconds: float
    tokens_per_s: float
    mean_batch: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One simulated run of a workload."""

    deployment: str
    model: str
    workload: str
    num_requests: int
    num_output_tokens: int
    duration_s: float
    """From the first arrival to the last token."""
    num_steps: int
    num_preemptions: int
    tokens_per_s: float
    """Over the whole duration, the slow end included."""
    tokens_per_s_while_arriving: float | None
    """From the first arrival to the last; None if all arrive at once."""
    requests_per_s: float
    mean_batch: float
    """Running sequences, over time, of all micro-batches together."""
    saturated: Saturated | None
    ttft_s: Percentiles | None
    tbt_s: Percentiles | None
    """Over all tokens but each request's first."""
    queue_s: Percentiles | None
    """From arrival to the first step with rows of the request."""
    offloaded_share: float
    """Of requests whose decode attention ran beside a prefill instance."""
    pools: tuple[PoolUse, ...]
    price_per_hour: float | None
    price_per_million_tokens: float | None
    """US dollars per million generated tokens."""
    energy_j_per_token: float | None
    """Per generated token, with every device at its limit all the time: an upper bound."""
