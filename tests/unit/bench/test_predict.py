"""Predictions beside measurements: the arithmetic, with made-up measurements."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from lamina.bench import predict as predict_module
from lamina.bench.parts import Tokens
from lamina.bench.placements import placements
from lamina.bench.predict import CASES, Case, Deployments, Errors, Figure, compare, errors, predict
from lamina.bench.shapes import SHAPES
from lamina.cli.main import app
from lamina.errors import ConfigError
from lamina.plan.model import model_cost
from lamina.plan.profile import Profile
from support.families import save_tiny_model

from .test_calibrated import MODEL, measured, profile

PLACEMENTS = placements((0, 1))


def wide(found: Profile) -> Profile:
    """With memory for the whole model."""
    devices = (msgspec.structs.replace(d, memory_bytes=10**9) for d in found.devices)
    return msgspec.structs.replace(found, devices=tuple(devices))


def test_a_monolithic_step_is_the_sum_of_its_parts() -> None:
    case = Case(placement="monolithic", depth=1, batch=4, context=40)
    rate, tbt_s = predict(
        case, PLACEMENTS["monolithic"], MODEL, wide(profile()), context=40, num_tokens=3
    )
    slices, engine = 4 / 2, 0.1 + 4 * 0.01
    # Half of rows x context; the second of the three steps has 42 tokens.
    assert tbt_s == pytest.approx(slices + engine + 4 * 42 / 2, rel=0.02)
    assert rate == pytest.approx(4 / tbt_s, rel=0.05)


def test_two_micro_batches_disturb_each_other() -> None:
    case = Case(placement="apart", depth=1, batch=2, context=16)
    found = wide(profile())
    _, one = predict(case, PLACEMENTS["apart"], MODEL, found, context=16, num_tokens=3)
    twice = msgspec.structs.replace(case, depth=2)
    _, two = predict(twice, PLACEMENTS["apart"], MODEL, found, context=16, num_tokens=3)
    # Each of the two has half of the rows, but its attention is slowed down by the other's slices.
    assert one < two < 2 * one


def test_figures_and_errors() -> None:
    case = Case(placement="monolithic", depth=1, batch=4, context=40)
    found = wide(profile())
    turns = [
        Tokens(seconds=100.0, count=4, gaps_s=[90.0] * 4, context=50.0),
        Tokens(seconds=80.0, count=4, gaps_s=[80.0] * 4, context=51.0),
        Tokens(seconds=50.0, count=4, gaps_s=[50.0] * 4, context=53.0),
    ]
    figure = compare(case, PLACEMENTS["monolithic"], MODEL, found, turns)
    assert figure.measured_tokens_per_s == 0.05
    assert (figure.measured_low, figure.measured_high) == (0.04, 0.08)
    assert figure.measured_tbt_ms == 80_000
    assert figure.context == 51, "prompts and what was decoded since"
    rate, tbt_s = predict(case, PLACEMENTS["monolithic"], MODEL, found, context=50, num_tokens=3)
    assert figure.throughput_error == pytest.approx(rate / 0.05 - 1)
    assert figure.tbt_error == pytest.approx(tbt_s / 80 - 1)


def figure(throughput: float, tbt: float) -> Figure:
    return Figure(
        deployment="mono:cpu-2", placement="monolithic", batch=1, context=1,
        measured_tokens_per_s=100, predicted_tokens_per_s=100 * (1 + throughput),
        measured_tbt_ms=10, predicted_tbt_ms=10 * (1 + tbt), measured_low=1, measured_high=2,
    )  # fmt: skip


def test_errors_are_absolute() -> None:
    found = errors([figure(-0.2, 0.1), figure(0.1, -0.05), figure(0.0, 0.0)])
    assert found.median_throughput == pytest.approx(0.1)
    assert found.worst_throughput == pytest.approx(0.2)
    assert found.median_tbt == pytest.approx(0.05)
    assert found.worst_tbt == pytest.approx(0.1)
    assert found.within_limits


@pytest.mark.parametrize("field", Errors.__struct_fields__)
def test_each_limit_counts(field: str) -> None:
    good = errors([figure(0.05, -0.05)])
    assert good.within_limits
    assert not msgspec.structs.replace(good, **{field: 0.31}).within_limits


def test_the_cases_are_at_none_of_the_calibrated_sizes() -> None:
    from lamina.bench.calibrate import FULL

    assert len(CASES) >= 8
    assert {case.placement for case in CASES} == set(PLACEMENTS)
    assert {case.depth for case in CASES} == {1, 2}
    assert not {case.batch for case in CASES} & {*FULL.rows, *FULL.batches}
    assert not {case.context for case in CASES} & set(FULL.contexts)


class _Calibration:
    """Has measured everything before it began."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.placements = PLACEMENTS

    def __enter__(self) -> _Calibration:
        return self

    def __exit__(self, *_: object) -> None: ...

    def measure(self) -> None: ...

    measure_engine = measure_prompts = measure

    def profile(self, source: str) -> Profile:
        return wide(profile(measured()))


class _Deployments:
    """Measures what was predicted, and something else of the first case."""

    def __init__(self, folder: Path, cases: Any, found: Any, **_: Any) -> None:
        self._cases = list(cases)
        self._left = 1

    def measure_next(self) -> bool:
        self._left -= 1
        return self._left >= 0

    def figures(self, model: Any, found: Profile) -> list[Figure]:
        assert model == model_cost(dict(SHAPES["qwen3-0.5b"]), name="qwen3-0.5b")
        return [figure(0.5, 0.0), *(figure(0.0, 0.0) for _ in self._cases[1:])]

    def close(self) -> None: ...


def test_the_command_checks_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.bench.calibrate.Calibration", _Calibration)
    monkeypatch.setattr(predict_module, "Deployments", _Deployments)
    file = tmp_path / "predict.json"
    arguments = ["bench", "predict", "--json", str(file)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "beyond the limits" in result.stdout
    written = json.loads(file.read_text())
    assert len(written["figures"]) == len(CASES)
    assert written["errors"]["worst_throughput"] == pytest.approx(0.5)
    assert written["profile"]["model"] == "small"
    result = CliRunner().invoke(app, [*arguments, "--check"], catch_exceptions=False)
    assert result.exit_code == 1


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="'huge'"):
        CliRunner().invoke(app, ["bench", "predict", "--calibrate", "huge"], catch_exceptions=False)


def test_engines_take_turns(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    here = placements((min(os.sched_getaffinity(0)),))
    cases = (
        Case(placement="monolithic", depth=1, batch=2, context=20),
        Case(placement="monolithic", depth=1, batch=3, context=9),
        Case(placement="shared", depth=2, batch=3, context=20),
        Case(placement="pair", depth=1, batch=2, context=20),  # takes two cores
    )
    deployments = Deployments(tmp_path, cases, here, vocab_size=100, turns=2, tokens=3)
    try:
        assert deployments.measure_next()
        assert set(deployments.measured) == {cases[0], cases[2]}
        assert deployments.measure_next()
        assert not deployments.measure_next()
    finally:
        deployments.close()
    assert set(deployments.measured) == set(cases[:3])
    for case, turns in deployments.measured.items():
        assert len(turns) == 2
        for turn in turns:
            # The last of the sequences has three tokens more, others may have another one.
            assert 3 * case.batch <= turn.count <= 4 * case.batch
            assert len(turn.gaps_s) == turn.count
            assert case.context < turn.context < 2 * case.context + 60
        assert turns[1].context > turns[0].context
    with pytest.raises(ConfigError, match="no deployment"):
        Deployments(tmp_path, cases[3:], here, vocab_size=100, turns=2, tokens=3)
