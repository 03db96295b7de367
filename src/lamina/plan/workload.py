"""Workloads by what a user writes: a file of requests, or the description of a made-up one."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from lamina.errors import ConfigError
from lamina.plan.arrivals import PREFIX_BLOCK_TOKENS, Arrival, Workload, WorkloadSummary
from lamina.plan.synthetic import Arrivals, Lengths, parse_lengths, synthetic
from lamina.plan.traces import read_azure, read_csv, read_mooncake, read_trace

__all__ = [
    "PREFIX_BLOCK_TOKENS", "Arrival", "Lengths", "Workload", "WorkloadSummary", "open_workload",
    "parse_lengths", "read_azure", "read_csv", "read_mooncake", "read_trace", "synthetic",
]  # fmt: skip

SYNTHETIC = "synthetic:"
_DEFAULTS = {
    "requests": "1000", "rate": "1", "prompt": "lognormal:512:1", "output": "lognormal:128:1",
    "arrivals": "poisson", "variation": "1", "seed": "0",
}  # fmt: skip


def open_workload(spec: str | Path) -> Workload:
    """The workload that `spec` names.

    Args:
        spec: a file (see `traces`), or `synthetic:` with any of requests, rate, prompt, output,
            arrivals, variation and seed:
            `synthetic:requests=1000,rate=4,prompt=lognormal:1024:1.2,output=exponential:200`.

    Raises:
        ConfigError: no such file, a malformed row (names its line), or a wrong setting.
    """
    text = str(spec)
    if text.startswith(SYNTHETIC):
        return _synthetic(text)
    path = Path(spec)
    if not path.is_file():
        raise ConfigError(
            f"workload {text} is no file; give a CSV or JSONL file of requests, or {SYNTHETIC}"
            f"rate=4,prompt=512,output=128"
        )
    return read_trace(path)


def _synthetic(text: str) -> Workload:
    settings = dict(_DEFAULTS)
    for part in filter(None, text.removeprefix(SYNTHETIC).split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"workload {text}: {part!r} must be a setting such as rate=4")
        if key not in _DEFAULTS:
            raise ConfigError(
                f"workload {text}: {key!r} is no setting; there are {', '.join(_DEFAULTS)}"
            )
        settings[key] = value
    arrivals = settings["arrivals"]
    if arrivals not in get_args(Arrivals):
        raise ConfigError(
            f"arrivals must be one of {', '.join(get_args(Arrivals))}, got {arrivals!r}"
        )
    return synthetic(
        num_requests=_whole(settings, "requests"),
        rate=_number(settings, "rate"),
        prompt=parse_lengths(settings["prompt"], "prompt"),
        output=parse_lengths(settings["output"], "output"),
        arrivals=arrivals,  # type: ignore[arg-type]
        variation=_number(settings, "variation"),
        seed=_whole(settings, "seed"),
        name=text,
    )


def _number(settings: dict[str, str], key: str) -> float:
    try:
        return float(settings[key])
    except ValueError:
        raise ConfigError(f"{key} must be a number, got {settings[key]!r}") from None


def _whole(settings: dict[str, str], key: str) -> int:
    if not settings[key].isascii() or not settings[key].isdigit():
        raise ConfigError(f"{key} must be a whole number of at least 0, got {settings[key]!r}")
    return int(settings[key])
