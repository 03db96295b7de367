from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lamina.cli.main import app
from lamina.errors import CapacityError, ConfigError, LaminaError

WORKLOAD = "synthetic:requests=30,rate=10,prompt=200,output=20"


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["simulate", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_tables() -> None:
    out = invoke("Llama-2-7B", "mono:1xH100", "dop:1xH100/1xH20", "--workload", WORKLOAD)
    assert "mono:1xH100" in out
    assert "dop:1xH100/1xH20,depth=2" in out
    assert "Use of devices" in out


def test_json(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    invoke("Llama-2-7B", "mono:1xH100", "--workload", WORKLOAD, "--json", str(file))
    (result,) = json.loads(file.read_text())
    assert result["num_output_tokens"] == 600
    assert result["pools"][0]["device"] == "H100"


def test_workloads_are_cut_and_sped_up(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    arguments = ("Llama-2-7B", "mono:1xH100", "--workload", WORKLOAD, "--json", str(file))
    invoke(*arguments, "--requests", "7", "--rate", "100")
    (result,) = json.loads(file.read_text())
    assert result["num_requests"] == 7
    assert result["duration_s"] < 1


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((), ConfigError, "a model and at least one deployment"),
        (("Llama-2-7B",), ConfigError, "a model and at least one deployment"),
        (("Llama-2-8B", "mono:1xH100"), ConfigError, "Llama-2-7B"),
        (("Llama-2-7B", "mono:1xH10"), ConfigError, "H100"),
        (("LLaMA-65B", "mono:1xH100"), CapacityError, "use more devices"),
        (("Llama-2-7B", "mono:1xH100", "--workload", "none.csv"), ConfigError, "none.csv"),
        (("Llama-2-7B", "mono:1xH100", "--dtype", "half"), ConfigError, "dtype"),
        (("--paper", "lamina", "--traces", "nowhere"), ConfigError, "missing"),
    ],
)
def test_errors(arguments: tuple[str, ...], error: type[LaminaError], match: str) -> None:
    with pytest.raises(error, match=match):
        invoke(*arguments)
