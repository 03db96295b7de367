"""A machine is measured with a tiny model, and the profile is used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from lamina.cli.main import app
from lamina.config import EngineConfig
from lamina.engine.start import start_engine
from lamina.errors import ConfigError
from lamina.plan.profile import read_profile
from lamina.types import EngineRequest, SamplingParams
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
    config = EngineConfig(
        model=str(tmp_path), max_model_len=64, num_threads=1, worker_num_threads=1,
        profile=str(file), heartbeat_timeout_s=20.0,
    )  # fmt: skip
    assert len(decoded(config)) == 12
    with pytest.raises(ConfigError, match="cpu-2"):
        decoded(msgspec.structs.replace(config, num_threads=2))


def decoded(config: EngineConfig) -> list[int]:
    """Tokens of a request."""
    started = start_engine(config)
    try:
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        started.engine.add(
            EngineRequest(request_id="a", prompt_token_ids=(1, 2, 3), sampling=sampling, seed=0)
        )
        tokens: list[int] = []
        while started.engine.has_work:
            for output in started.engine.step():
                tokens += output.token_ids
        return tokens
    finally:
        started.close()


def test_cores_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="may not be used"):
        CliRunner().invoke(app, ["calibrate", "--cores", "4095"], catch_exceptions=False)
