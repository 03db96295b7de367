"""Keeps what happens in a simulation: times of requests, and how busy devices are."""

from __future__ import annotations

from array import array
from collections import Counter

from lamina.plan.results import Percentiles, Saturated, percentiles


class RequestTimes:
    """Of all requests of a workload, by their index; NaN where it has not happened."""

    def __init__(self, arrivals_s: list[float]) -> None:
        nan = [float("nan")] * len(arrivals_s)
        self.arrival_s = array("d", arrivals_s)
        self.start_s = array("d", nan)
        self.first_token_s = array("d", nan)
        self.num_tokens = 0
        self.num_tokens_while_arriving = 0
        self.last_token_s = arrivals_s[0]
        self._last_arrival_s = arrivals_s[-1]
        self._gaps: Counter[float] = Counter()

    def started(self, index: int, now_s: float) -> None:
        """Rows of the request are in a step for the first time (later calls change nothing)."""
        if self.start_s[index] != self.start_s[index]:
            self.start_s[index] = now_s

    def first_token(self, index: int, now_s: float) -> None:
        self.first_token_s[index] = now_s

    def gap(self, seconds: float, count: int) -> None:
        """`count` tokens came that long after the last ones of their requests."""
        self._gaps[seconds] += count

    def tokens(self, count: int, now_s: float) -> None:
        self.num_tokens += count
        if now_s <= self._last_arrival_s:
            self.num_tokens_while_arriving += count
        self.last_token_s = now_s

    def ttft_s(self) -> Percentiles | None:
        return self._since_arrival(self.first_token_s)

    def queue_s(self) -> Percentiles | None:
        return self._since_arrival(self.start_s)

    def tbt_s(self) -> Percentiles | None:
        return percentiles(self._gaps.keys(), self._gaps.values())

    def _since_arrival(self, times: array[float]) -> Percentiles | None:
        return percentiles(
            time - arrival
            for time, arrival in zip(times, self.arrival_s, strict=True)
            if time == time
        )


class Busy:
    """Work of one pool of devices, and its memory over time."""

    def __init__(self) -> None:
        self.flops = 0.0
        self.num_bytes = 0.0
        self.network_bytes = 0.0
        self.memory_byte_s = 0.0


class Occupancy:
    """Batch over time, and what was reached while requests waited."""

    def __init__(self, num_requests: int) -> None:
        self._from_finished = num_requests / 10
        self._now_s: float | None = None
        self._sequence_s = 0.0
        self._elapsed_s = 0.0
        self._saturated_s = 0.0
        self._saturated_sequence_s = 0.0
        self._saturated_tokens = 0

    def passed(
        self, now_s: float, *, running: int, waiting: int, finished: int, tokens: int
    ) -> None:
        """`running` sequences ran and `waiting` waited since the last call until now, when `tokens`
        tokens came."""
        elapsed_s = 0.0 if self._now_s is None else now_s - self._now_s
        self._now_s = now_s
        self._elapsed_s += elapsed_s
        self._sequence_s += running * elapsed_s
        if waiting and finished >= self._from_finished:
            self._saturated_s += elapsed_s
            self._saturated_sequence_s += running * elapsed_s
            self._saturated_tokens += tokens

    @property
    def mean_batch(self) -> float:
        return self._sequence_s / self._elapsed_s if self._elapsed_s else 0.0

    def saturated(self) -> Saturated | None:
        if not self._saturated_s:
            return None
        return Saturated(
            seconds=self._saturated_s,
            tokens_per_s=self._saturated_tokens / self._saturated_s,
            mean_batch=self._saturated_sequence_s / self._saturated_s,
        )
