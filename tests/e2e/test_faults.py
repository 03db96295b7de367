"""Processes that die, hang or are interrupted while answers are streamed.

A fault ends every open answer within two seconds, in an error that names the culprit; nothing of
the server is left behind.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import openai
import pytest

from support.servers import Process, Server, serving, wait_until

MODEL = "tiny"
NUM_STREAMS = 4
LIMIT_S = 2.0
"""From the fault to the last error, and to the last process's end."""
HEARTBEAT_TIMEOUT_S = 1.0


@pytest.fixture
def server(served_folder: Path) -> Iterator[Server]:
    """A server of its own for every test: none survives its test."""
    with serving(
        str(served_folder),
        "--served-model-name", MODEL,
        "--attention-workers", "2",
        "--heartbeat-timeout-s", str(HEARTBEAT_TIMEOUT_S),
        "--num-threads", "1",
        "--worker-num-threads", "1",
    ) as server:  # fmt: skip
        yield server


class End(NamedTuple):
    """How a stream ended."""

    time_s: float
    error: str | None


class Streams:
    """Answers of 500 tokens each that are being streamed to threads of their own."""

    def __init__(self, server: Server) -> None:
        """Start them; returns when tokens of every one have come."""
        self._counts = [0] * NUM_STREAMS
        self._ends: list[End | None] = [None] * NUM_STREAMS
        # Made before any starts: it takes as long as some hundred tokens.
        self._clients = [client_of(server) for _ in range(NUM_STREAMS)]
        self._threads = [
            threading.Thread(target=self._run, args=(index,)) for index in range(NUM_STREAMS)
        ]
        for thread in self._threads:
            thread.start()
        wait_until(lambda: min(self._counts) >= 5, 30.0)
        assert self._ends == [None] * NUM_STREAMS, "they must still run"

    def ends(self) -> list[End]:
        """Wait for the ends of all."""
        for thread in self._threads:
            thread.join(30.0)
        return [end for end in self._ends if end is not None]

    def _run(self, index: int) -> None:
        error = None
        try:
            with self._clients[index] as client:
                for _ in client.completions.create(
                    model=MODEL,
                    prompt=[7, 8, 9 + index],
                    max_tokens=500,
                    stream=True,
                    extra_body={"ignore_eos": True},
                ):
                    self._counts[index] += 1
        except Exception as caught:  # whatever the client makes of it, the test judges
            error = f"{type(caught).__name__}: {caught}"
        self._ends[index] = End(time.monotonic(), error)


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=30.0)


def assert_ends(streams: Streams, since_s: float, *words: str) -> None:
    """Every stream ended in an error with these words, in time."""
    ends = streams.ends()
    assert len(ends) == NUM_STREAMS
    for end in ends:
        assert end.error is not None
        for word in words:
            assert word in end.error
    assert max(end.time_s for end in ends) - since_s < LIMIT_S


def assert_refuses(server: Server, *words: str) -> None:
    """/health and new requests say why the server cannot serve; it still speaks."""
    with server.client() as http:
        health = http.get("/health")
        assert health.status_code == 503
        for word in words:
            assert word in health.json()["reason"]
        assert server.metric("lamina_engine_up") == {"": 0}
    with client_of(server) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=MODEL, prompt="bak")
        assert caught.value.status_code == 503
        for word in words:
            assert word in caught.value.message


def assert_vanish(processes: list[Process], timeout_s: float = LIMIT_S) -> None:
    wait_until(lambda: not any(process.runs for process in processes), timeout_s)


def assert_stops(server: Server, processes: list[Process], exit_code: int) -> None:
    """SIGTERM ends it soon, and everything of it."""
    start = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.wait() == exit_code
    assert_vanish(processes)
    assert time.monotonic() - start < LIMIT_S
    assert "Traceback" not in server.stderr


def test_killed_attention_worker(server: Server) -> None:
    processes, (_, victim) = server.tree(), server.attention_workers()
    streams = Streams(server)
    start = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    assert_ends(streams, start, "attention-worker-2")
    assert_refuses(server, "attention-worker-2")
    assert time.monotonic() - start < LIMIT_S + 1.0
    assert_stops(server, processes, exit_code=1)


def test_stopped_attention_worker(server: Server) -> None:
    processes, (victim, _) = server.tree(), server.attention_workers()
    streams = Streams(server)
    start = time.monotonic()
    os.kill(victim.pid, signal.SIGSTOP)
    assert_ends(streams, start, "attention-worker-1", "heartbeat")
    assert_refuses(server, "attention-worker-1")
    assert_stops(server, processes, exit_code=1)


def test_killed_model_rank(served_folder: Path) -> None:
    with serving(
        str(served_folder),
        "--served-model-name", MODEL,
        "--attention-workers", "2",
        "--model-replicas", "2",
        "--heartbeat-timeout-s", str(HEARTBEAT_TIMEOUT_S),
        "--num-threads", "1",
        "--worker-num-threads", "1",
    ) as server:  # fmt: skip
        processes = server.tree()
        (victim,) = [p for p in processes if p.name == "lamina-rank-1.0"]
        streams = Streams(server)
        start = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        assert_ends(streams, start, "model-rank-1.0")
        assert_refuses(server, "model-rank-1.0")
        assert_stops(server, processes, exit_code=1)


def test_killed_engine(server: Server) -> None:
    processes, engine = server.tree(), server.engine()
    streams = Streams(server)
    start = time.monotonic()
    os.kill(engine.pid, signal.SIGKILL)
    assert_ends(streams, start, "engine", "SIGKILL")
    assert_vanish(processes)
    assert_refuses(server, "engine", "SIGKILL")
    assert_stops(server, processes, exit_code=1)


def test_killed_server(server: Server) -> None:
    processes = server.tree()
    streams = Streams(server)
    server.signal(signal.SIGKILL)
    assert_vanish(processes)
    assert server.wait() == -signal.SIGKILL
    assert all(end.error for end in streams.ends())


def test_interrupted_from_the_terminal(server: Server) -> None:
    processes = server.tree()
    streams = Streams(server)
    server.interrupt()
    assert server.wait() == 0
    assert_vanish(processes)
    for end in streams.ends():
        assert end.error is None or "the server is stopping" in end.error
    assert server.stderr.count("\n") == 1, "nothing but the line that says where it serves"
