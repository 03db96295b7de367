"""A machine is measured with a tiny model, and the profile is used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lamina.cli.main import app
from lamina.engine.llm import LLM
from lamina.errors import ConfigError
from lamina.plan.profile import read_profile
from lamina.types import SamplingParams
from support.families import save_tiny_model


def test_calibrate_then_simulate(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    file = tmp_path / "profile.json"
    core = min(os.sched_getaffinity(0))
    arguments = [str(tmp_path), "--quick", "--passes", "1", "--cores", str(core)]
    result = CliRunner().invoke(
        app, ["calibrate", *arguments, "--out", str(file)], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "slices, cpu-1" in result.stdout
    profile = read_profile(file)
    assert profile.config["model_type"] == "llama"
    curve = profile.slices_on("cpu-1", 1)
    assert curve is not None
    assert all(seconds > 0 for seconds in curve.values)
    assert profile.beside("cpu-1", 1, "cpu-1", 1) is not None
    assert {hop.transport for hop in profile.hops} == {"shm", "tcp"}
    result = CliRunner().invoke(
        app,
        ["simulate", str(tmp_path), "mono:cpu-1", "dop:cpu-1/cpu-1,depth=2", "--profile",
         str(file), "--workload", "synthetic:requests=20,rate=5,prompt=30,output=8",
         "--json", "-"],
        catch_exceptions=False,
    )  # fmt: skip
    results = json.loads(result.stdout)
    assert [r["deployment"] for r in results] == ["mono:1xcpu-1", "dop:1xcpu-1/1xcpu-1,depth=2"]
    assert all(r["tokens_per_s"] > 0 for r in results)
    threads = {"num_threads": 1, "worker_num_threads": 1}
    with LLM(tmp_path, profile=str(file), max_model_len=64, **threads) as llm:
        (completion,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(completion.answers[0].token_ids) == 4
    with pytest.raises(ConfigError, match="cpu-2"):
        LLM(tmp_path, profile=str(file), max_model_len=64, num_threads=2)


def test_cores_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="may not be used"):
        CliRunner().invoke(app, ["calibrate", "--cores", "4095"], catch_exceptions=False)
