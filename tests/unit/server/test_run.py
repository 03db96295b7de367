"""`serve` from start to stop: ports, signals, exit codes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time

import httpx
import pytest

from lamina.config import EngineConfig
from lamina.errors import CheckpointError, ConfigError
from lamina.server.run import listen, serve
from lamina.server.settings import ServerConfig

CONFIG = EngineConfig(model="/models/fake-7b")


@pytest.fixture
def run(tools, capsys):
    """Runs `serve` with a fake engine beside `scenario(http, engine)`; returns its exit code."""

    def run_(scenario, **settings):
        async def main():
            engine = tools.FakeEngine()

            async def start(config):
                assert config is CONFIG
                return engine

            server = ServerConfig(port=0, **settings)
            serving = asyncio.create_task(serve(CONFIG, server, start_engine=start))
            while not (line := capsys.readouterr().err):
                await asyncio.sleep(0.005)
                assert not serving.done()
            prefix, url = line.strip().split(" at ")
            assert prefix == "lamina: serving " + settings.get("served_model_name", "fake-7b")
            async with httpx.AsyncClient(base_url=url, timeout=5) as http:
                await scenario(http, engine)
            code = await asyncio.wait_for(serving, 10)
            assert engine.shutdowns == 1
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
            return code

        return asyncio.run(main())

    return run_


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serves_until_a_signal(run, number):
    async def scenario(http, engine):
        assert (await http.get("/v1/models")).json()["data"][0]["id"] == "tiny"
        assert (await http.post("/v1/completions", json={"prompt": "x"})).is_success
        os.kill(os.getpid(), number)

    assert run(scenario, served_model_name="tiny") == 0


def test_settings_reach_the_app(run):
    async def scenario(http, engine):
        assert (await http.get("/v1/models")).status_code == 401
        http.headers["authorization"] = "Bearer k"
        big = await http.post("/v1/completions", json={"prompt": "x" * 100})
        assert big.status_code == 413
        assert "vllm:" in (await http.get("/metrics")).text
        os.kill(os.getpid(), signal.SIGTERM)

    assert run(scenario, api_key="k", max_body_bytes=50, vllm_metrics=True) == 0


def test_a_failed_engine_keeps_answering_and_ends_with_1(run):
    async def scenario(http, engine):
        engine.unhealthy = "attention-1 was lost"
        assert (await http.get("/health")).status_code == 503
        assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 503
        os.kill(os.getpid(), signal.SIGTERM)

    assert run(scenario) == 1


def test_an_engine_that_ends_badly_gives_1(run):
    async def scenario(http, engine):
        engine.exit_code = -9
        os.kill(os.getpid(), signal.SIGTERM)

    assert run(scenario) == 1


def test_a_short_answer_is_finished_before_the_end(run):
    async def scenario(http, engine):
        engine.delay_s = 0.02
        ask = asyncio.create_task(http.post("/v1/completions", json={"prompt": "x"}))
        while not engine.started:
            await asyncio.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await ask).json()["choices"][0]["text"] == "0: hé wörld"

    assert run(scenario) == 0


@pytest.mark.parametrize("hurry", [False, True])
def test_open_streams_end_with_an_error_after_the_grace(run, hurry):
    async def scenario(http, engine):
        engine.hang_after = 1
        body = {"prompt": "x", "stream": True}
        begin_s = time.monotonic()
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            os.kill(os.getpid(), signal.SIGINT)
            if hurry:
                await asyncio.sleep(0.05)
                os.kill(os.getpid(), signal.SIGINT)
            lines = [line async for line in answer.aiter_lines() if line]
        assert "the server is stopping" in lines[-1]
        assert engine.aborted == [engine.started[0].id]
        assert time.monotonic() - begin_s < 3

    assert run(scenario, shutdown_grace_s=30 if hurry else 0.3) == 0


def test_a_signal_while_the_engine_starts_cancels_the_start():
    cancelled = []

    async def start(config):
        asyncio.get_running_loop().call_later(0.02, os.kill, os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    assert asyncio.run(serve(CONFIG, ServerConfig(port=0), start_engine=start)) == 0
    assert cancelled


def test_an_engine_that_cannot_start_frees_the_port():
    with listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]

    async def start(config):
        raise CheckpointError("no such folder")

    with pytest.raises(CheckpointError):
        asyncio.run(serve(CONFIG, ServerConfig(port=port), start_engine=start))
    listen("127.0.0.1", port).close()


def test_a_port_in_use_is_refused_before_the_engine_starts():
    async def start(config):
        raise AssertionError("the engine must not start")

    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} .*in use"):
            asyncio.run(serve(CONFIG, ServerConfig(port=port), start_engine=start))


def test_an_unknown_host_is_refused():
    with pytest.raises(ConfigError, match=r"host 'no\.such\.host\.invalid'"):
        listen("no.such.host.invalid", 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("host", ""),
        ("api_key", " "),
        ("served_model_name", ""),
        ("max_body_bytes", 0),
        ("shutdown_grace_s", -1.0),
    ],
)
def test_settings_are_checked(field, value):
    with pytest.raises(ConfigError, match=field):
        ServerConfig(**{field: value})
