"""The decode benchmark: its arithmetic, and its subjects on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lamina.bench.decode import lamina_config, measure
from lamina.bench.subjects import LaminaSubject, Stretch, SubjectProcess
from lamina.cli.main import app
from lamina.errors import ConfigError, EngineDead


class FakeSubject:
    """Takes the seconds that it was told to."""

    def __init__(self, name: str, prefill_s: float, decode_s: list[float]) -> None:
        self.name = name
        self.prompts: Sequence[Sequence[int]] = ()
        self._prefill_s = prefill_s
        self._decode_s = iter([0.0, *decode_s])

    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        self.prompts = prompts
        return self._prefill_s

    def decode(self, num_steps: int) -> list[float]:
        return [next(self._decode_s) / num_steps] * num_steps

    def phases(self) -> dict[str, float]:
        return {}

    def stretches(self) -> list[Stretch]:
        return []


def test_speeds_and_ratios_are_medians_over_turns() -> None:
    fast, base = FakeSubject("fast", 2.0, [1.0, 2.0, 4.0]), FakeSubject("base", 4.0, [4.0] * 3)
    subjects: Any = [fast, base]
    measured = measure(subjects, batch=2, context=3, turns=3, steps_per_turn=10, vocab_size=50)
    assert measured.breakdowns == []  # neither has a timeline
    first, second = measured.figures
    speeds = (first.tokens_per_s, first.tokens_per_s_low, first.tokens_per_s_high)
    assert speeds == pytest.approx((10, 5, 20))
    assert (first.ratio, first.ratio_low, first.ratio_high) == pytest.approx((2, 1, 4))
    assert (first.tbt_ms, first.tbt_p99_ms) == pytest.approx((200, 400))
    assert first.prefill_tokens_per_s == 3
    assert (second.ratio, second.prefill_tokens_per_s) == pytest.approx((1, 1.5))
    assert fast.prompts == base.prompts
    assert [len(prompt) for prompt in fast.prompts] == [3, 3]


def test_the_command_measures_deployments_beside_transformers(
    tiny_shape: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(
        app,
        ["bench", "decode", "--shape", tiny_shape, "--batch", "2", "--context", "40", "--turns",
         "2", "--steps", "3", "--attention-workers", "0,1", "--threads", "1", "--transport",
         "shm,tcp", "--json", "-", "--plot", str(tmp_path / "decode.svg")],
        catch_exceptions=False,
    )  # fmt: skip
    figures = json.loads(result.stdout)
    assert [figure["subject"] for figure in figures] == [
        "lamina, monolithic",
        "lamina, 1 remote over shm",
        "lamina, 1 remote over tcp",
        "transformers",
    ]
    assert all(figure["tokens_per_s"] > 0 for figure in figures)
    assert figures[-1]["ratio"] == 1
    assert figures[0]["phases_ms"]["slices"] > 0
    assert (tmp_path / "decode.svg").read_text().startswith("<?xml")


def test_the_breakdown_of_two_depths(tiny_shape: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app,
        ["bench", "decode", "--shape", tiny_shape, "--batch", "6", "--context", "20", "--turns",
         "2", "--steps", "4", "--attention-workers", "1", "--threads", "1", "--pipeline-depths",
         "1,2", "--no-transformers", "--breakdown", "--json", "-",
         "--plot", str(tmp_path / "breakdown.svg")],
        catch_exceptions=False,
    )  # fmt: skip
    written = json.loads(result.stdout)
    names = ["lamina, 1 remote over shm, depth 2", "lamina, 1 remote over shm, depth 1"]
    assert [figure["subject"] for figure in written["figures"]] == names
    assert written["figures"][-1]["ratio"] == 1
    deep, flat = written["breakdowns"]
    assert [deep["subject"], flat["subject"]] == names
    assert (deep["rows_per_step"], flat["rows_per_step"]) == (3, 6)
    for breakdown in (deep, flat):
        assert sum(breakdown["parts_ms"].values()) == pytest.approx(breakdown["step_ms"])
        assert all(0 < share <= 1 for share in breakdown["busy"].values())
        assert min(breakdown["model_ms"], breakdown["attention_ms"]) > 0
    assert flat["parts_ms"]["queue"] < 0.05 * flat["step_ms"]
    assert (tmp_path / "breakdown.svg").read_text().startswith("<?xml")


def test_a_subject_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    config = lamina_config(tmp_path, num_workers=0, batch=1, length=8, num_threads=1)
    with pytest.raises(EngineDead, match="lamina ended"):
        SubjectProcess("lamina", LaminaSubject, (config,), {})


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape must be one of qwen3-0\.5b"):
        CliRunner().invoke(app, ["bench", "decode", "--shape", "huge"], catch_exceptions=False)
