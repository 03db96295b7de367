"""`lamina plan` as a command."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

from lamina.cli.main import app
from lamina.errors import ConfigError, LaminaError
from lamina.plan.report import Report

WORKLOAD = "synthetic:requests=200,rate=1,prompt=lognormal:600:0.5,output=lognormal:200:0.5"


def run(*options: str, model: str = "Llama-2-7B") -> Result:
    given = dict(zip(options[::2], options[1::2], strict=True))
    given.setdefault("--inventory", "2 x RTX 4090, 1 x RTX 3090, 10 GbE")
    given.setdefault("--workload", WORKLOAD)
    given.setdefault("--confirm-s", "0")
    arguments = [part for option in given.items() for part in option]
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["plan", model, *arguments])


def error(result: Result) -> LaminaError:
    assert isinstance(result.exception, LaminaError), result.output
    return result.exception


def test_a_table_and_a_verdict() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert "tok/s" in result.stdout
    assert "mono:1xRTX 4090" in result.stdout
    assert "limited by" in result.stdout
    assert "isaggregate attention" in result.stdout


def test_the_best_are_simulated_by_default() -> None:
    result = run("--confirm-s", "60", "--json", "-")
    report = msgspec.json.decode(result.stdout, type=Report)
    assert report.rows[0].simulated is not None


def test_json_alone_on_standard_output() -> None:
    result = run("--json", "-", "--top", "3")
    report = msgspec.json.decode(result.stdout, type=Report)
    assert report.model == "Llama-2-7B"
    assert 3 <= len(report.rows) <= 5


def test_files(tmp_path: Path) -> None:
    files = {
        "--json": tmp_path / "plan.json",
        "--html": tmp_path / "plan.html",
        "--plot-cost": tmp_path / "cost.png",
        "--plot-bandwidth": tmp_path / "bandwidth.svg",
        "--plot-breakdown": tmp_path / "breakdown.PNG",
    }
    result = run(*(text for option, file in files.items() for text in (option, str(file))))
    assert result.exit_code == 0, result.output
    beginnings = {option: file.read_bytes()[:8].strip() for option, file in files.items()}
    assert beginnings["--json"].startswith(b"{")
    assert beginnings["--html"].startswith(b"<!doct")
    assert beginnings["--plot-cost"] == beginnings["--plot-breakdown"] == b"\x89PNG\r\n\x1a".strip()
    assert beginnings["--plot-bandwidth"].startswith(b"<?xml")


def test_an_unknown_ending_of_a_picture(tmp_path: Path) -> None:
    assert "cannot write" in str(error(run("--plot-cost", str(tmp_path / "cost.doc"))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--inventory", "2 x RTX 4091"), "did you mean RTX 4090"),
        (("--workload", "nothing.csv"), "is no file"),
        (("--tbt-s", "0.001"), "no deployment meets TBT 1 ms; the best is TBT"),
        (("--budget", "-1"), "the budget must be positive"),
        (("--hardware", "nothing.toml"), "cannot be read"),
        (("--profile", "nothing.json"), "cannot be read"),
        (("--max-num-seqs", "4096"), "must be at least max_num_seqs"),
    ],
)
def test_what_is_wrong_is_said(options: tuple[str, ...], message: str) -> None:
    wrong = error(run(*options))
    assert isinstance(wrong, ConfigError)
    assert message in str(wrong)


def test_an_unknown_model() -> None:
    assert "did you mean" in str(error(run(model="LLaMA3-71B")))


def test_a_model_from_its_config(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 32000,
    }  # fmt: skip
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    result = run(model=str(tmp_path))
    assert result.exit_code == 0, result.output
