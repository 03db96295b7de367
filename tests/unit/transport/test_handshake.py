"""Opening links over TCP and over a Unix socket."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lamina.errors import ConfigError, DeadlineExceeded, PeerLost, ProtocolMismatch
from lamina.transport.handshake import Listener, connect
from lamina.transport.wire import (
    Hello,
    pack_hello,
    parse_address,
    unpack_welcome,
)

SECRET, OTHER = b"s" * 32, b"o" * 32
EXPECTED = {SECRET: ("worker", "print"), OTHER: ("other", "print")}


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture(params=["127.0.0.1:0", "unix:@"])
def listener(request: pytest.FixtureRequest) -> Iterator[Listener]:
    one = Listener(request.param)
    yield one
    one.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def raw_connection(listener: Listener, data: bytes = b"") -> socket.socket:
    if listener.address.startswith("unix:@"):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect("\0" + listener.address.removeprefix("unix:@"))
    else:
        connection = socket.create_connection(parse_address(listener.address))
    connection.sendall(data)
    return connection


def test_peers_are_told_apart_by_their_secrets(
    listener: Listener, pool: ThreadPoolExecutor
) -> None:
    first = pool.submit(connect, listener.address, OTHER, "print", "x", soon())
    accepted = listener.accept(EXPECTED, soon())
    assert (accepted.peer, first.result().peer) == ("other", "engine")
    second = pool.submit(connect, listener.address, SECRET, "print", "x", soon())
    accepted_second = listener.accept(EXPECTED, soon())
    assert accepted_second.peer == "worker"
    for link in (accepted, accepted_second, first.result(), second.result()):
        link.close()


def test_a_secret_is_good_for_one_link(listener: Listener, pool: ThreadPoolExecutor) -> None:
    first = pool.submit(connect, listener.address, SECRET, "print", "x", soon())
    listener.accept(EXPECTED, soon()).close()
    first.result().close()
    again = pool.submit(connect, listener.address, SECRET, "print", "thief", soon())
    with pytest.raises(ProtocolMismatch, match="thief presented a secret"):
        listener.accept(EXPECTED, soon(0.3))
    assert isinstance(again.exception(), ProtocolMismatch)


def test_strangers_are_refused_and_the_right_one_still_gets_in(
    listener: Listener, pool: ThreadPoolExecutor
) -> None:
    silent = raw_connection(listener)
    gone = raw_connection(listener, pack_hello(Hello(SECRET, "print", "gone"))[:9])
    gone.close()
    web = raw_connection(listener, b"GET / HTTP/1.1\r\n\r\n")
    old = raw_connection(listener, b"LMNH\x63\0")
    wrong = pool.submit(connect, listener.address, b"x" * 32, "print", "wrong", soon())
    slow = raw_connection(listener)
    hello = pack_hello(Hello(SECRET, "print", "slow"))
    slow.sendall(hello[:20])
    accepting = pool.submit(listener.accept, EXPECTED, soon())
    with pytest.raises(ProtocolMismatch, match=r"refused wrong: .*join over the control channel"):
        wrong.result()
    slow.sendall(hello[20:])
    link = accepting.result()
    assert link.peer == "worker"
    for connection, reason in ((web, "not a Lamina peer"), (old, "protocol version 99")):
        connection.settimeout(5)
        received = bytearray()
        while data := connection.recv(4096):
            received += data
        welcome = unpack_welcome(received, "p")
        assert welcome is not None
        assert not welcome.accepted
        assert reason in welcome.text
    link.close()
    for connection in (silent, web, old, slow):
        connection.close()


def test_another_model_is_a_mismatch_on_both_sides(
    listener: Listener, pool: ThreadPoolExecutor
) -> None:
    client = pool.submit(connect, listener.address, SECRET, "other print", "w", soon())
    with pytest.raises(ProtocolMismatch, match="worker: has fingerprint other print, print is"):
        listener.accept(EXPECTED, soon())
    with pytest.raises(ProtocolMismatch, match="same model"):
        client.result()


def test_nobody_connects(listener: Listener) -> None:
    with pytest.raises(DeadlineExceeded, match="worker, other: did not connect"):
        listener.accept(EXPECTED, soon(0.05))


def test_nobody_listens(listener: Listener) -> None:
    listener.close()
    listener.close()
    with pytest.raises(PeerLost, match="is it running"):
        connect(listener.address, SECRET, "print", "w", soon())


def test_nobody_answers(listener: Listener) -> None:
    with pytest.raises(DeadlineExceeded, match="did not answer the hello"):
        connect(listener.address, SECRET, "print", "w", soon(0.1))


@pytest.mark.parametrize(
    ("answer", "error"), [(b"HTTP/1.1 400\r\n", ProtocolMismatch), (b"", PeerLost)]
)
def test_something_else_listens(
    pool: ThreadPoolExecutor, answer: bytes, error: type[Exception]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = pool.submit(connect, f"127.0.0.1:{port}", SECRET, "print", "w", soon())
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(answer)
    assert isinstance(client.exception(), error)


def test_bad_addresses(listener: Listener) -> None:
    with pytest.raises(ConfigError, match="choose another address"):
        Listener(listener.address)
    with pytest.raises(ConfigError, match="unknown host"):
        connect("no.such.host.invalid:1", SECRET, "print", "w", soon())
    with pytest.raises(ConfigError, match="host:port"):
        Listener("unix:/run/somewhere")
