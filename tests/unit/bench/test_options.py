"""Engine options from a benchmark's command line."""

from __future__ import annotations

import pytest

from lamina.bench.options import parse_options, with_options
from lamina.config import AttentionWorkerConfig, EngineConfig
from lamina.errors import ConfigError


def test_values_are_json_or_strings() -> None:
    pairs = ["block_size=128", "early_q=false", "attention_partition=heads", "model=a=b"]
    assert parse_options(pairs, "--option") == {
        "block_size": 128,
        "early_q": False,
        "attention_partition": "heads",
        "model": "a=b",
    }


def test_a_pair_needs_a_value() -> None:
    with pytest.raises(ConfigError, match=r"--option must be key=value, got 'block_size'"):
        parse_options(["block_size"], "--option")


def test_options_replace_fields_and_keep_the_others() -> None:
    config = EngineConfig(model="m", attention_workers=(AttentionWorkerConfig(memory_bytes=7),))
    assert with_options(config, {"block_size": 128}) == EngineConfig(
        model="m", block_size=128, attention_workers=(AttentionWorkerConfig(memory_bytes=7),)
    )


@pytest.mark.parametrize("options", [{"blocksize": 128}, {"block_size": "big"}, {"block_size": 0}])
def test_unknown_and_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="block"):
        with_options(EngineConfig(model="m"), options)
