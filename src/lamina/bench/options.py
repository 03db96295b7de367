"""Engine options from a benchmark's command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from lamina.config import EngineConfig
from lamina.errors import ConfigError


def parse_options(pairs: Sequence[str], flag: str) -> dict[str, Any]:
    """`key=value` pairs; a value that is JSON is taken as such, anything else as a string."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise ConfigError(f"{flag} must be key=value, got {pair!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def with_options(config: EngineConfig, options: Mapping[str, Any]) -> EngineConfig:
    """A copy of `config` with these fields; ConfigError for an unknown field or a wrong value."""
    fields = {**msgspec.to_builtins(config), **options}
    try:
        return msgspec.convert(fields, EngineConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"engine options {dict(options)}: {error}") from None
