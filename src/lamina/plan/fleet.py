"""Several deployments side by side: which ones make the most of an inventory.

Requests go to them in proportion to what each can do, so that throughputs add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy

from lamina.errors import ConfigError
from lamina.plan.candidates import Usage
from lamina.plan.deployment import Disaggregated, PrefillDecode, price_per_hour
from lamina.plan.estimate import Estimate

MOST_STATES = 100_000


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Deployments and how many of each."""

    parts: tuple[tuple[int, Estimate], ...]

    @property
    def tokens_per_s(self) -> float:
        return sum(count * e.tokens_per_s for count, e in self.parts)

    @property
    def requests_per_s(self) -> float:
        return sum(count * e.requests_per_s for count, e in self.parts)

    @property
    def batch(self) -> float:
        """Running sequences of all deployments."""
        return sum(count * e.batch for count, e in self.parts)

    @property
    def ttft_s(self) -> float:
        """Of the slowest deployment."""
        return max(e.ttft_s for _, e in self.parts)

    @property
    def tbt_s(self) -> float:
        """Of the slowest deployment."""
        return max(e.tbt_s for _, e in self.parts)

    @property
    def price_per_hour(self) -> float | None:
        """US dollars; None if a price is not known."""
        total = 0.0
        for count, e in self.parts:
            price = price_per_hour(e.deployment)
            if price is None:
                return None
            total += count * price
        return total

    @property
    def price_per_million_tokens(self) -> float | None:
        price = self.price_per_hour
        return None if price is None else price / 3600 / self.tokens_per_s * 1e6

    @property
    def main(self) -> Estimate:
        """The deployment that most depends on: the disaggregated one with the most throughput, or
        simply that."""
        return max((e for _, e in self.parts), key=lambda e: (is_disaggregated(e), e.tokens_per_s))

    def __str__(self) -> str:
        return " + ".join(
            f"{count} x [{e.deployment}]" if count > 1 else str(e.deployment)
            for count, e in self.parts
        )


def is_disaggregated(estimate: Estimate) -> bool:
    """Whether decode attention runs away from the rest of the model."""
    deployment = estimate.deployment
    return isinstance(deployment, Disaggregated) or (
        isinstance(deployment, PrefillDecode) and deployment.offload is not None
    )


def plan_of(estimates: Sequence[Estimate]) -> Plan:
    """The deployments of these estimates, equal ones counted."""
    by_text = {str(e.deployment): e for e in estimates}
    counts = Counter(str(e.deployment) for e in estimates)
    parts = [(count, by_text[text]) for text, count in counts.items()]
    return Plan(parts=tuple(sorted(parts, key=lambda p: -p[0] * p[1].tokens_per_s)))


class Fleets:
    """For every part of an inventory the deployments with the most throughput together."""

    def __init__(self, counts: Usage, choices: Sequence[tuple[Usage, Estimate]]) -> None:
        """
        Args:
            counts: devices of each pool.
            choices: deployments and what each uses; the best of each use suffices.

        Raises:
            ConfigError: the inventory is too large.
        """
        shape = tuple(count + 1 for count in counts)
        if numpy.prod(shape, dtype=float) > MOST_STATES:
            raise ConfigError(
                f"the inventory is too large to search ({' x '.join(map(str, shape))} ways to use "
                "a part of it); plan for a quarter of it, and use the plan four times"
            )
        self._counts = counts
        self._choices = list(choices)
        self.best = numpy.zeros(shape)
        """Tokens per second, by devices at hand."""
        self._choice = numpy.full(shape, -1, dtype=numpy.int32)
        for index, (usage, estimate) in enumerate(self._choices):
            self._use(index, usage, estimate.tokens_per_s)

    def _use(self, index: int, usage: Usage, tokens_per_s: float) -> None:
        to = tuple(slice(used, None) for used in usage)
        of = tuple(
            slice(0, count + 1 - used) for count, used in zip(self._counts, usage, strict=True)
        )
        copies = min(c // u for c, u in zip(self._counts, usage, strict=True) if u)
        for _ in range(copies):
            value = self.best[of] + tokens_per_s
            better = value > self.best[to] * (1 + 1e-9)
            if not better.any():
                return
            self.best[to] = numpy.where(better, value, self.best[to])
            self._choice[to] = numpy.where(better, index, self._choice[to])

    def at(self, counts: Usage) -> list[Estimate]:
        """The deployments for these devices; empty if there are none."""
        chosen = []
        left = counts
        while (index := int(self._choice[left])) >= 0:
            usage, estimate = self._choices[index]
            chosen.append(estimate)
            left = tuple(a - b for a, b in zip(left, usage, strict=True))
        return chosen

    def within(self, prices: Sequence[float | None], budget: float, counts: Usage) -> Usage:
        """The part of `counts` with the most throughput that costs no more than `budget` per
        hour."""
        part = tuple(slice(0, count + 1) for count in counts)
        affordable = self.prices(prices)[part] <= budget * (1 + 1e-9)
        return _index(int(numpy.where(affordable, self.best[part], -1.0).argmax()), counts)

    def prices(
        self, prices: Sequence[float | None]
    ) -> numpy.ndarray[Any, numpy.dtype[numpy.float64]]:
        """Of all devices at hand; infinite where one's is not known."""
        total = numpy.zeros(self.best.shape)
        for number, price in zip(numpy.indices(self.best.shape), prices, strict=True):
            total += numpy.where(number > 0, numpy.inf, 0.0) if price is None else number * price
        return total

    def front(self, prices: Sequence[float | None]) -> list[Usage]:
        """Devices for which no cheaper ones give as much, by rising price."""
        cost, value = self.prices(prices).ravel(), self.best.ravel()
        front: list[Usage] = []
        most = 0.0
        for flat in numpy.lexsort((-value, cost)):
            if numpy.isfinite(cost[flat]) and value[flat] > most * (1 + 1e-6):
                most = float(value[flat])
                front.append(_index(int(flat), self._counts))
        return front


def _index(flat: int, counts: Usage) -> Usage:
    index = numpy.unravel_index(flat, tuple(count + 1 for count in counts))
    return tuple(int(i) for i in index)
