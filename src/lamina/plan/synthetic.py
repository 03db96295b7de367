"""Made-up workloads: an arrival process and two distributions of lengths."""

from __future__ import annotations

import math
import re
from typing import Literal

import msgspec
import numpy

from lamina.errors import ConfigError
from lamina.plan.arrivals import Arrival, Workload

Arrivals = Literal["poisson", "gamma", "even"]

_KINDS = {"constant": 0, "uniform": 1, "exponential": 0, "lognormal": 1}
"""Distributions of lengths -> how many numbers follow the mean."""


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """A distribution of token counts, all at least 1.

    constant: always the mean. uniform: mean +- `spread`. exponential. lognormal: `spread` is the
    standard deviation over the mean.
    """

    kind: Literal["constant", "uniform", "exponential", "lognormal"]
    mean: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and self.mean >= 1):
            raise ConfigError(f"the mean length must be at least 1 token, got {self.mean}")
        if not (math.isfinite(self.spread) and self.spread >= 0):
            raise ConfigError(f"the spread of lengths must be at least 0, got {self.spread}")
        if self.kind == "uniform" and self.mean - self.spread < 1:
            raise ConfigError(
                f"uniform lengths must be at least 1 token: mean {self.mean:g} less spread "
                f"{self.spread:g} is not"
            )

    def draw(self, generator: numpy.random.Generator, count: int) -> list[int]:
        """`count` lengths. Exponential and lognormal ones are scaled so that their mean is `mean`:
        otherwise a few very long ones make one workload much heavier than the next."""
        mean, spread = self.mean, self.spread
        match self.kind:
            case "constant":
                values = numpy.full(count, mean)
            case "uniform":
                values = generator.uniform(mean - spread, mean + spread, count)
            case "exponential":
                values = generator.exponential(mean, count)
            case "lognormal":
                sigma = math.sqrt(math.log1p(spread**2))
                values = generator.lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
        if self.kind in ("exponential", "lognormal"):
            values *= mean / values.mean()
        lengths: list[int] = numpy.maximum(1, numpy.rint(values)).astype(int).tolist()
        return lengths


def parse_lengths(text: str, field: str) -> Lengths:
    """`512` -> constant; `uniform:512:100`, `exponential:512`, `lognormal:512:1.2`.

    Raises:
        ConfigError: the text is none of these; names `field`.
    """
    kind, *numbers = text.split(":")
    if re.fullmatch(r"[0-9.]+", kind) and not numbers:
        kind, numbers = "constant", [kind]
    try:
        if kind not in _KINDS or len(numbers) != 1 + _KINDS[kind]:
            raise ValueError
        values = [float(number) for number in numbers]
    except ValueError:
        raise ConfigError(
            f"{field} must be lengths such as 512, uniform:512:100, exponential:512 or "
            f"lognormal:512:1.2 (mean, then spread), got {text!r}"
        ) from None
    return Lengths(kind=kind, mean=values[0], spread=values[1] if len(values) > 1 else 0.0)  # type: ignore[arg-type]


def synthetic(
    *,
    num_requests: int,
    rate: float,
    prompt: Lengths,
    output: Lengths,
    arrivals: Arrivals = "poisson",
    variation: float = 1.0,
    seed: int = 0,
    name: str = "synthetic",
) -> Workload:
    """A workload drawn at random, the same for the same arguments.

    Args:
        rate: requests per second.
        arrivals: of the times between arrivals: poisson, gamma with coefficient of variation
            `variation` (above 1: bursts), or even.

    Raises:
        ConfigError: an argument makes no sense; names it.
    """
    if num_requests < 1:
        raise ConfigError(f"requests must be at least 1, got {num_requests}")
    if not (math.isfinite(rate) and rate > 0):
        raise ConfigError(f"rate must be positive, got {rate}")
    if not (math.isfinite(variation) and variation > 0):
        raise ConfigError(f"variation must be positive, got {variation}")
    generator = numpy.random.default_rng(seed)
    match arrivals:
        case "poisson":
            gaps = generator.exponential(1 / rate, num_requests)
        case "gamma":
            shape = variation**-2
            gaps = generator.gamma(shape, 1 / (rate * shape), num_requests)
        case "even":
            gaps = numpy.full(num_requests, 1 / rate)
    times = (gaps.cumsum() - gaps[0]).tolist()
    prompts, outputs = prompt.draw(generator, num_requests), output.draw(generator, num_requests)
    return Workload(
        name=name,
        arrivals=tuple(
            Arrival(time_s=time, prompt_tokens=p, output_tokens=o)
            for time, p, o in zip(times, prompts, outputs, strict=True)
        ),
    )
