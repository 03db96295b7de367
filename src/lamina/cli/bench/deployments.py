"""Which deployments a benchmark sets beside each other, and what they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

_DEFAULTS: dict[str, Any] = {
    "pipeline_depth": 1,
    "model_replicas": 1,
    "tensor_parallel_size": 1,
    "early_q": True,
    "defer": True,
}
_WORDS: dict[str, Callable[[Any], str]] = {
    "pipeline_depth": lambda depth: f"depth {depth}",
    "model_replicas": lambda count: f"{count} replicas",
    "tensor_parallel_size": lambda size: f"{size} ranks",
    "early_q": lambda on: "early q" if on else "no early q",
    "defer": lambda on: "deferred" if on else "nothing deferred",
}


def deployments(
    num_workers: Sequence[int], settings: Mapping[str, Sequence[Any]]
) -> dict[str, dict[str, Any]]:
    """Every combination, by name; what only attention workers have varies only where there are any.

    Args:
        num_workers: attention workers, 0 is monolithic.
        settings: the values of each field of `EngineConfig`. Of several values the simplest one
            (the shallowest pipeline, the switch that is off) comes last, as the baseline.
    """
    found: dict[str, dict[str, Any]] = {}
    ordered = {field: sorted(values, reverse=True) if field != "transport" else values
               for field, values in settings.items()}  # fmt: skip
    for count in num_workers:
        for values in product(*ordered.values()):
            chosen = dict(zip(ordered, values, strict=True))
            if not count:
                chosen |= _DEFAULTS | {"transport": "auto"}
            place = f"{count} remote over {chosen['transport']}" if count else "monolithic"
            said = [
                words(chosen[field])
                for field, words in _WORDS.items()
                if chosen[field] != _DEFAULTS[field] or (count and len(ordered[field]) > 1)
            ]
            found[", ".join(["lamina", place, *said])] = {"num_workers": count, **chosen}
    return found
