"""The control channel: joining, requests, heartbeats, and everybody's end."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq

from lamina.errors import ConfigError, DeadlineExceeded, PeerLost, ProtocolMismatch
from lamina.transport.control import ControlServer
from lamina.transport.control_client import ControlClient
from lamina.transport.join_token import JoinToken
from lamina.transport.wire import (
    Assigned,
    Goodbye,
    IntegrityQuery,
    IntegrityReply,
    Join,
    Refused,
    ShutdownWorker,
    WorkerError,
    pack_control,
    unpack_control,
)

INTERVAL_S = 0.05
TIMEOUT_S = 0.4


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def join_as(name: str, **changes: int) -> Join:
    return Join(
        name=name, pid=os.getpid(), host="here", device="cpu", memory_bytes=1, num_threads=1,
        **changes,
    )  # fmt: skip


class Losses:
    """Records who was lost, and lets a test wait for it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self._changed = threading.Condition()

    def __call__(self, peer: str, reason: str) -> None:
        with self._changed:
            self.seen.append((peer, reason))
            self._changed.notify_all()

    def wait(self, count: int = 1) -> list[tuple[str, str]]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.seen) >= count, 5), "nobody was lost"
            return list(self.seen)


@pytest.fixture
def losses() -> Losses:
    return Losses()


@pytest.fixture
def server(losses: Losses) -> Iterator[ControlServer]:
    control = ControlServer(
        heartbeat_interval_s=INTERVAL_S, heartbeat_timeout_s=TIMEOUT_S, on_lost=losses
    )
    yield control
    control.close()


@pytest.fixture
def client(server: ControlServer) -> Iterator[Callable[..., ControlClient]]:
    clients: list[ControlClient] = []

    def make(name: str = "worker", **arguments: object) -> ControlClient:
        clients.append(
            ControlClient(
                server.address, server.token, join_as(name), deadline=soon(), **arguments  # type: ignore[arg-type]
            )
        )  # fmt: skip
        return clients[-1]

    yield make
    for one in clients:
        one.close()


Make = Callable[..., ControlClient]


def test_workers_join_in_order_under_unique_names(server: ControlServer, client: Make) -> None:
    names = [client("a").name, client("b").name, client("a").name]
    joined = [server.wait_for_join(soon()) for _ in names]
    assert names == ["a", "b", "a-2"] == [peer.name for peer in joined]
    assert joined[1].join == join_as("b")
    with pytest.raises(DeadlineExceeded, match="no further worker"):
        server.wait_for_join(soon(0.05))


def test_requests_are_answered_by_number(server: ControlServer, client: Make) -> None:
    worker = client()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.request, "worker", IntegrityQuery(), soon())
        one = worker.receive(soon())
        second = pool.submit(server.request, "worker", ShutdownWorker(), soon())
        two = worker.receive(soon())
        assert isinstance(two.message, ShutdownWorker)
        worker.reply(two, Assigned(7, 1e10))
        reply = IntegrityReply(problems=("a",), pages_used=1, pages_total=2, sequences=(3,))
        worker.reply(one, reply)
        assert first.result() == reply
        assert second.result() == Assigned(7, 1e10)


def test_request_without_an_answer(server: ControlServer, client: Make) -> None:
    worker = client()
    with pytest.raises(DeadlineExceeded, match=r"^worker: did not answer IntegrityQuery"):
        server.request("worker", IntegrityQuery(), soon(0.1))
    worker.reply(worker.receive(soon()), Assigned(1, 1e10))  # too late, and harmless
    with pytest.raises(DeadlineExceeded):
        worker.receive(soon(0.1))
    assert server.lost("worker") is None


def test_sending(server: ControlServer, client: Make) -> None:
    worker = client()
    server.send("worker", ShutdownWorker())
    assert worker.receive(soon()) == (ShutdownWorker(), 0)
    with pytest.raises(PeerLost, match="nobody: has not joined"):
        server.send("nobody", ShutdownWorker())


def test_heartbeats_keep_both_sides_alive(
    server: ControlServer, client: Make, losses: Losses
) -> None:
    worker = client()
    time.sleep(3 * TIMEOUT_S)
    assert losses.seen == []
    assert worker.engine_lost is None
    server.send("worker", ShutdownWorker())
    assert worker.receive(soon()).message == ShutdownWorker()


_WORKER = """
import os, sys, time
from lamina.transport.control_client import ControlClient
from lamina.transport.join_token import JoinToken
from lamina.transport.wire import Join
join = Join(name="child", pid=os.getpid(), host="", device="cpu", memory_bytes=1, num_threads=1)
client = ControlClient(
    sys.argv[1], JoinToken.parse(sys.stdin.readline()), join, deadline=time.monotonic() + 30,
    on_engine_lost=lambda reason: (print(reason, flush=True), os._exit(3)),
)
time.sleep(60)
"""


@pytest.fixture
def child(server: ControlServer) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _WORKER, server.address],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(server.token.line + "\n")
    process.stdin.flush()
    try:
        assert server.wait_for_join(soon(60)).join.pid == process.pid
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGSTOP"])
def test_a_silent_worker_is_lost_once(
    server: ControlServer, losses: Losses, child: subprocess.Popen[str], signal_name: str
) -> None:
    import signal

    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(server.request, "child", IntegrityQuery(), soon(30))
        time.sleep(0.1)
        start = time.monotonic()
        os.kill(child.pid, getattr(signal, signal_name))
        with pytest.raises(PeerLost, match=r"^child: "):
            request.result()
        assert time.monotonic() - start < TIMEOUT_S + 1.0
    ((peer, reason),) = losses.wait()
    assert peer == "child"
    assert server.lost("child") == reason
    server.declare_lost("child", "exit code -9")
    time.sleep(2 * TIMEOUT_S)
    assert len(losses.seen) == 1
    with pytest.raises(PeerLost, match=reason):
        server.send("child", ShutdownWorker())


def test_worker_sees_a_silent_engine(child: subprocess.Popen[str], server: ControlServer) -> None:
    # The loop is held up for longer than the worker's patience; its own must not suffer from that.
    server._call(lambda: time.sleep(3 * TIMEOUT_S))
    assert child.stdout is not None
    assert "no heartbeat" in child.stdout.readline()
    assert child.wait(5) == 3


def test_both_sides_held_up_at_once_do_not_lose_each_other(
    server: ControlServer, client: Make, losses: Losses
) -> None:
    """As when the machine was suspended: nobody heard anything, and nobody is to blame."""
    worker = client()
    asleep = threading.Barrier(2)

    def sleep() -> None:
        asleep.wait(5)
        time.sleep(3 * TIMEOUT_S)

    server._call(sleep)
    worker._call(sleep)
    time.sleep(4 * TIMEOUT_S)
    assert losses.seen == []
    assert worker.engine_lost is None


def test_worker_that_leaves_or_fails_is_lost(
    server: ControlServer, client: Make, losses: Losses
) -> None:
    client("a").close()
    assert losses.wait(1)[0] == ("a", "left: closed its control channel")
    client("b").send(WorkerError("CapacityError", "no memory"))
    assert losses.wait(2)[1] == ("b", "CapacityError: no memory")


def test_a_lost_worker_is_told(server: ControlServer, client: Make, losses: Losses) -> None:
    reasons: list[str] = []
    worker = client(on_engine_lost=reasons.append)
    server.declare_lost("worker", "its process ended")
    with pytest.raises(PeerLost, match="declared lost: its process ended"):
        worker.receive(soon())
    assert losses.seen == [("worker", "its process ended")]
    assert worker.engine_lost is not None
    assert len(reasons) == 1


def test_closing_says_goodbye_and_ends_requests(client: Make, server: ControlServer) -> None:
    worker = client()
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(server.request, "worker", IntegrityQuery(), soon(30))
        worker.receive(soon())
        server.close()
        server.close()
        with pytest.raises(PeerLost, match="closed"):
            request.result()
    with pytest.raises(PeerLost, match="the engine closed"):
        worker.receive(soon())
    with pytest.raises(PeerLost, match="closed"):
        server.request("worker", IntegrityQuery(), soon())


def test_last_messages_are_received_before_the_goodbye(server: ControlServer, client: Make) -> None:
    worker = client()
    server.send("worker", ShutdownWorker())
    server.close()
    time.sleep(0.1)
    assert worker.receive(soon()).message == ShutdownWorker()
    with pytest.raises(PeerLost):
        worker.receive(soon())


def test_wrong_secret_is_refused(server: ControlServer) -> None:
    token = JoinToken.create(server.token.server_public_key)
    with pytest.raises(ProtocolMismatch, match="copy the token file"):
        ControlClient(server.address, token, join_as("w"), deadline=soon())


def test_token_of_another_engine_is_refused(server: ControlServer) -> None:
    other_key = zmq.curve_keypair()[0].decode()
    token = JoinToken(other_key, server.token.secret)
    start = time.monotonic()
    with pytest.raises(ProtocolMismatch, match="copy the token file"):
        ControlClient(server.address, token, join_as("w"), deadline=soon())
    assert time.monotonic() - start < 2


def test_another_version_is_refused(server: ControlServer) -> None:
    with pytest.raises(ProtocolMismatch, match="version 99"):
        ControlClient(
            server.address, server.token, join_as("w", protocol_version=99), deadline=soon()
        )


def test_nobody_there() -> None:
    token = JoinToken.create(zmq.curve_keypair()[0].decode())
    with pytest.raises(DeadlineExceeded, match="is it running"):
        ControlClient("127.0.0.1:9", token, join_as("w"), deadline=soon(0.3))


def test_worker_may_start_before_the_engine(losses: Losses) -> None:
    first = ControlServer(heartbeat_interval_s=0.1, heartbeat_timeout_s=1.0, on_lost=losses)
    port = int(first.address.rpartition(":")[2])
    first.close()
    with ThreadPoolExecutor(1) as pool:
        # The key is only known once the engine is there, so borrow a server's socket options.
        server = ControlServer(heartbeat_interval_s=0.1, heartbeat_timeout_s=1.0, on_lost=losses)
        server._call(lambda: server._socket.unbind(f"tcp://{server.address}"))
        time.sleep(0.2)
        joining = pool.submit(
            ControlClient, f"127.0.0.1:{port}", server.token, join_as("w"), deadline=soon(10)
        )
        time.sleep(0.3)
        server._call(lambda: server._socket.bind(f"tcp://127.0.0.1:{port}") and None)
        assert joining.result().name == "w"
        joining.result().close()
        server.close()


def test_strangers_and_garbage(server: ControlServer, client: Make, losses: Losses) -> None:
    worker = client()
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
    stranger.curve_serverkey = server.token.server_public_key.encode()
    stranger.connect(f"tcp://{server.address}")
    try:
        for data in (
            b"",
            b"\xff" * 100,
            pack_control(Goodbye("x")),
            pack_control(Assigned(1, 1e10), 5),
        ):
            stranger.send(data)
            assert stranger.poll(2000)
            assert isinstance(unpack_control(stranger.recv(), "server").message, Refused)
    finally:
        stranger.close(linger=0)
        context.term()
    assert losses.seen == []
    worker._call(lambda: worker._socket.send(b"garbage") and None)
    ((peer, reason),) = losses.wait()
    assert peer == "worker"
    assert "unreadable" in reason


def test_port_in_use(server: ControlServer, losses: Losses) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match="choose another address"):
        ControlServer(
            "127.0.0.1", port, heartbeat_interval_s=1, heartbeat_timeout_s=3, on_lost=losses
        )


def test_host_names_work(losses: Losses) -> None:
    control = ControlServer(
        "localhost", heartbeat_interval_s=0.1, heartbeat_timeout_s=1, on_lost=losses
    )
    worker = ControlClient(control.address, control.token, join_as("w"), deadline=soon())
    assert control.address.startswith("localhost:")
    worker.close()
    control.close()


def test_token_file(tmp_path: Path) -> None:
    token = JoinToken.create(zmq.curve_keypair()[0].decode())
    path = tmp_path / "token"
    path.touch(0o644)
    token.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().count("\n") == 1
    assert JoinToken.load(path) == token
    assert token.secret not in repr(token)


@pytest.mark.parametrize("text", ["", "lamina-join-1 short abc", "\x80", "x" * 1000])
def test_bad_token_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="copy the token"):
        JoinToken.load(path)
    with pytest.raises(ConfigError, match="missing"):
        JoinToken.load(tmp_path / "missing")
    with pytest.raises(ConfigError, match="choose another file"):
        JoinToken.create("k" * 40).save(tmp_path / "no" / "folder")
