"""The benchmark of unequal attention workers: its arithmetic, and the command on a tiny model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import pytest
from typer.testing import CliRunner

from lamina.bench.partition import busy_core, measure, settled_after
from lamina.bench.subjects import WorkerShares
from lamina.cli.main import app
from lamina.errors import ConfigError


class FakeSubject:
    """Decodes as fast as it was told, and moves its weights turn by turn."""

    def __init__(self, name: str, seconds: Sequence[float], weights: Sequence[float]) -> None:
        self.name = name
        self.replaced: list[tuple[int, int]] = []
        self._seconds = iter(seconds)
        self._weights = iter(weights)
        self._num_steps = 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        return 0.0

    def replace(self, num_ended: int, prompts: Sequence[Sequence[int]]) -> float:
        self.replaced.append((num_ended, len(prompts)))
        return 0.0

    def decode(self, num_steps: int) -> list[float]:
        self._num_steps += num_steps
        return [next(self._seconds) / num_steps] * num_steps

    def weights(self) -> WorkerShares:
        first = next(self._weights)
        return WorkerShares(self._num_steps, [first, 1 - first])


def test_speeds_are_those_after_the_warm_up() -> None:
    followed = FakeSubject("observed", [9.0, 1.0, 2.0, 1.0], [0.5, 0.6, 0.7, 0.7, 0.7])
    equal = FakeSubject("equal", [9.0, 2.0, 2.0, 3.0], [0.5] * 5)
    subjects: Any = [followed, equal]
    first, second = measure(
        subjects, batch=4, context=6, num_replaced=2, turns=3, warm_up_turns=1,
        steps_per_turn=5, vocab_size=30,
    )  # fmt: skip
    assert (first.tokens_per_s, first.tokens_per_s_low) == (20, 10)
    assert (first.ratio, first.ratio_low, first.ratio_high) == (2, 1, 3)
    assert second.ratio == 1
    assert followed.replaced == equal.replaced == [(2, 2)] * 4
    assert [w.num_steps for w in first.weights] == [0, 5, 10, 15, 20]
    assert settled_after(first.weights) == 10
    assert settled_after(second.weights) == 0


def test_settling_is_relative() -> None:
    def weights(*firsts: float) -> list[WorkerShares]:
        return [WorkerShares(10 * i, [first, 1 - first]) for i, first in enumerate(firsts)]

    assert settled_after(weights(0.5, 0.9, 0.905, 0.9)) == 10
    # A small share that moves by a tenth of itself has not settled.
    assert settled_after(weights(0.5, 0.9, 0.92, 0.9)) == 30


def test_a_core_is_kept_busy() -> None:
    core = min(os.sched_getaffinity(0))
    with busy_core(core):
        pass
    with busy_core(None):
        pass


def test_more_replaced_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"replaced must be between 1 and batch \(2\), got 3"):
        CliRunner().invoke(app, ["bench", "partition", "--batch", "2", "--replaced", "3"],
                           catch_exceptions=False)  # fmt: skip


def test_the_command_sets_both_beside_each_other(tiny_shape: str) -> None:
    result = CliRunner().invoke(
        app,
        ["bench", "partition", "--shape", tiny_shape, "--batch", "4", "--context", "20", "--turns",
         "2", "--warm-up", "1", "--steps", "3", "--json", "-"],
        catch_exceptions=False,
    )  # fmt: skip
    figures = json.loads(result.stdout)
    assert [figure["subject"] for figure in figures] == ["weights as observed", "equal shares"]
    assert figures[-1]["ratio"] == 1
    for figure in figures:
        assert figure["tokens_per_s"] > 0
        assert len(figure["weights"]) == 4
        assert sum(figure["weights"][-1]["shares"]) == pytest.approx(1)
    assert figures[-1]["weights"][-1]["shares"] == [0.5, 0.5]
