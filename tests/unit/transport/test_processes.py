"""Native links between processes: nothing is lost, and processes that share a core take turns."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from lamina import _native
from lamina.bench.hop import HopFigure, measure
from lamina.cli.main import app
from lamina.errors import ConfigError
from lamina.transport.handshake import Listener

ADDRESSES = ["unix:@", "127.0.0.1:0"]

_CHILD = """
import os, sys, time
from lamina import _native
from lamina.transport.handshake import connect
address, core, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.sched_setaffinity(0, {core})
link = connect(address, b"s" * 32, "print", "child", time.monotonic() + 60)
inbox, outbox = link.inbox(1, 4096), link.outbox(2, 4096)
_native.pong(inbox.native, outbox.native, 1, count, 4096, True, 30.0)
sys.stdin.read()
"""


@contextlib.contextmanager
def answering(address: str, count: int) -> Iterator[str]:
    """A process on one core that answers `count` messages; its listener's address goes in."""
    core = str(min(os.sched_getaffinity(0)))
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, address, core, str(count)], stdin=subprocess.PIPE
    )
    try:
        yield address
    finally:
        child.kill()
        child.wait()
        assert child.stdin is not None
        child.stdin.close()


@pytest.mark.parametrize("address", ADDRESSES)
def test_three_processes_on_one_core_make_progress(address: str) -> None:
    """Everybody waits by looking at memory or sockets; who has nothing to do must give way."""
    num_messages = 2000
    before = os.sched_getaffinity(0)
    listeners = [Listener(address) for _ in range(2)]
    try:
        os.sched_setaffinity(0, {min(before)})
        with (
            answering(listeners[0].address, num_messages),
            answering(listeners[1].address, num_messages),
        ):
            links = [
                listener.accept({b"s" * 32: ("child", "print")}, time.monotonic() + 60)
                for listener in listeners
            ]
            boxes = [(link.outbox(1, 4096), link.inbox(2, 4096)) for link in links]
            start = time.monotonic()
            for first in range(1, num_messages + 1, 10):  # the one waits while the other works
                for outbox, inbox in boxes:
                    _native.ping(outbox.native, inbox.native, first, 10, 4096, True, 10.0)
            assert time.monotonic() - start < 20
            for link in links:
                link.close()
    finally:
        os.sched_setaffinity(0, before)
        for listener in listeners:
            listener.close()


@pytest.mark.parametrize("subject", ["shm", "tcp"])
def test_nothing_is_lost_or_reordered(subject: str) -> None:
    """Number and every byte are verified on both sides."""
    (figure,) = measure([subject], [64], round_trips=100_000, turns=1, cores=None, check=True)
    assert figure.num_round_trips == 100_000


def test_hop_benchmark_prints_and_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "hop.json"
    options = ["--messages", "40", "--turns", "2", "--size", "0,100", "--cores", "none"]
    result = CliRunner().invoke(app, ["bench", "hop", *options, "--json", str(file)])
    assert result.exit_code == 0, result.output
    figures = msgspec.json.decode(file.read_bytes(), type=list[HopFigure])
    assert [(f.num_bytes, f.subject) for f in figures] == [
        (size, subject)
        for size in (0, 100)
        for subject in ("shm", "tcp", "inproc", "bare", "bare-blocking")
    ]
    for f in figures:
        assert f.num_round_trips == 20
        assert 0 < f.low_us <= f.high_us
        assert f.ratio is not None
    assert "ratio to bare" in result.output


@pytest.mark.parametrize(
    "options", [["--transport", "rdma"], ["--size", "x"], ["--size=-1"], ["--cores", "9999,0"]]
)
def test_bad_options(options: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", "hop", *options])
    assert isinstance(result.exception, ConfigError)
