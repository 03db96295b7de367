"""How much of the attention each worker gets: as much as lets all of them finish together. Pure.

A worker serves an op on b bytes of KV in l + b / s seconds: l, its round trip, comes from the probe
at join; s, its speed, starts from the probe and follows the seconds that the worker reports with
every step. For ops of B bytes in all, the weights are the s (T - l) with the one T for which they
sum up to B.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping

from lamina.types import StepPlan

_SLOWEST_ALPHA = 0.02
"""Weight of a new observation once many were made: an average over some 50 steps."""
_WINDOW = 9
_OUTLIER = 1.5
"""An observation further than this from the last ones' median counts as this far."""
_CHANGE = 1.4
"""If the last ones' median is further than this from the average, the speed has changed."""
_LEAST = 0.02
"""Of the largest weight: the least that a worker gets, so that it is seen to recover."""


class WorkerWeights:
    """Weights of the remote executors, always positive and summing up to 1."""

    def __init__(
        self,
        executors: Iterable[int],
        *,
        num_layers: int,
        fixed: Mapping[int, float] | None = None,
    ) -> None:
        """
        Args:
            num_layers: attention ops of a step.
            fixed: weights that the user gave, as ratios; nothing changes them.
        """
        self._speeds = {e: _Speed() for e in executors}
        self._num_layers = num_layers
        self._fixed = dict(fixed) if fixed else None

    def probe(self, executor: int, bytes_per_s: float, round_trip_s: float) -> None:
        """What a short measurement at join said."""
        assert bytes_per_s > 0, "a probe reads something"
        assert round_trip_s >= 0, "a probe takes time"
        self._speeds[executor].start(bytes_per_s, round_trip_s)

    def note_round_trip(self, executor: int, seconds: float) -> None:
        """A round trip as the steps show it, instead of the probe's."""
        self._speeds[executor].round_trip_s = seconds

    def observe(self, executor: int, kv_bytes: float, seconds: float) -> None:
        """A step of the executor: the KV that it attended to in all layers, and how long it
        computed."""
        if kv_bytes > 0 and seconds > 0:
            self._speeds[executor].observe(kv_bytes, seconds)

    @property
    def weights(self) -> dict[int, float]:
        """Of each executor; equal ones while nothing is known."""
        if self._fixed is not None:
            total = sum(self._fixed.values())
            return {e: weight / total for e, weight in self._fixed.items()}
        known = [s.bytes_per_s for s in self._speeds.values() if s.bytes_per_s]
        usual = statistics.fmean(known) if known else 1.0
        speeds = {e: s.bytes_per_s or usual for e, s in self._speeds.items()}
        latencies = {e: s.round_trip_s for e, s in self._speeds.items()}
        work = sum(s.kv_bytes for s in self._speeds.values()) / self._num_layers
        weights = _finishing_together(work, speeds, latencies)
        least = _LEAST * max(weights.values(), default=1.0)
        weights = {e: max(weight, least) for e, weight in weights.items()}
        total = sum(weights.values())
        return {e: weight / total for e, weight in weights.items()}


def kv_unit_tokens(plan: StepPlan) -> dict[int, int]:
    """Cached tokens times head units that each executor attends to in one layer of a step."""
    work: dict[int, int] = {}
    for span in plan.spans:
        for share in span.attend_on:
            tokens = share.num_units * share.num_tokens(span.context_tokens)
            work[share.executor] = work.get(share.executor, 0) + tokens
    return work


class _Speed:
    """What is known of one executor."""

    def __init__(self) -> None:
        self.round_trip_s = 0.0
        self.bytes_per_s = 0.0  # 0: unknown
        self.kv_bytes = 0.0  # per step, on average
        self._seconds = 0.0  # per step, on average, without outliers
        self._num_observed = 0
        self._recent: deque[float] = deque(maxlen=_WINDOW)  # seconds per byte

    def start(self, bytes_per_s: float, round_trip_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.round_trip_s = round_trip_s

    def observe(self, kv_bytes: float, seconds: float) -> None:
        self._recent.append(seconds / kv_bytes)
        usual = statistics.median(self._recent)
        self.kv_bytes = _towards(kv_bytes, self.kv_bytes, self._num_observed)
        if self._num_observed >= _WINDOW and not 1 / _CHANGE < usual * self.bytes_per_s < _CHANGE:
            self._num_observed = 0
        if self._num_observed < _WINDOW:
            # The first ones, here or after a change: an average would keep an outlier for long.
            self._seconds = usual * self.kv_bytes
        else:
            pace = min(max(seconds / kv_bytes, usual / _OUTLIER), usual * _OUTLIER)
            self._seconds = _towards(pace * kv_bytes, self._seconds, self._num_observed)
        self._num_observed += 1
        self.bytes_per_s = self.kv_bytes / self._seconds


def _towards(observed: float, average: float, num_observed: int) -> float:
    alpha = max(1 / (num_observed + 1), _SLOWEST_ALPHA)
    return alpha * observed + (1 - alpha) * average


def _finishing_together(
    work: float, speeds: Mapping[int, float], latencies: Mapping[int, float]
) -> dict[int, float]:
    """Work for each worker such that all that get any finish at one time, T."""
    order = sorted(speeds, key=latencies.__getitem__)
    speed = sum_of_products = 0.0
    deadline = 0.0
    for index, executor in enumerate(order):
        speed += speeds[executor]
        sum_of_products += speeds[executor] * latencies[executor]
        deadline = (work + sum_of_products) / speed
        if index + 1 < len(order) and deadline <= latencies[order[index + 1]]:
            break
    if work <= 0:
        return dict(speeds)
    return {e: speeds[e] * max(0.0, deadline - latencies[e]) for e in speeds}
