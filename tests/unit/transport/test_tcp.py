"""Opening tcp links, and what only a wire can do wrong."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lamina.transport.tcp_link import TcpLink

from lamina.errors import ConfigError, DeadlineExceeded, PeerLost, ProtocolMismatch
from lamina.transport.handshake import Listener, connect
from lamina.transport.wire import (
    Hello,
    pack_frame_header,
    pack_hello,
    parse_address,
    unpack_welcome,
)

SECRET, OTHER = b"s" * 32, b"o" * 32
EXPECTED = {SECRET: ("worker", "print"), OTHER: ("other", "print")}


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture
def listener() -> Iterator[Listener]:
    one = Listener()
    yield one
    one.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def raw_connection(listener: Listener, data: bytes = b"") -> socket.socket:
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


def test_nobody_listens() -> None:
    listener = Listener()
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
        Listener("127.0.0.1", parse_address(listener.address)[1])
    with pytest.raises(ConfigError, match="unknown host"):
        connect("no.such.host.invalid:1", SECRET, "print", "w", soon())


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, TcpLink]]:
    """A socket that writes bytes of its choice, and the link that reads them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    link = TcpLink(theirs, "peer")
    yield ours, link
    ours.close()
    link.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"x" * 64, "starts with b'xxxx'"),
        (struct.pack("<4sHHQQ", b"LMNF", 9, 1, 1, 0), "version 9"),
        (pack_frame_header(1, 1, 65), "65 bytes, more than"),
        (pack_frame_header(1, 1, 2**63), "more than the mailbox's 64"),
        (pack_frame_header(9, 1, 0), "mailbox 9, which this side does not have"),
        (pack_frame_header(1, 5, 0) + pack_frame_header(1, 5, 0), "numbers must increase"),
    ],
)
def test_nonsense_on_the_wire(raw: tuple[socket.socket, TcpLink], data: bytes, reason: str) -> None:
    ours, link = raw
    inbox = link.inbox(1, 64)
    ours.sendall(data)
    with pytest.raises(ProtocolMismatch, match=reason):
        inbox.wait(1000, soon())
    with pytest.raises(ProtocolMismatch, match=reason):
        inbox.wait(1000, soon())
    ours.settimeout(5)
    with contextlib.suppress(ConnectionResetError):  # bytes of ours may be left unread
        assert ours.recv(1) == b""


def test_end_in_the_middle_of_a_message(raw: tuple[socket.socket, TcpLink]) -> None:
    ours, link = raw
    inbox = link.inbox(1, 64)
    ours.sendall(pack_frame_header(1, 1, 10) + b"12345")
    ours.close()
    with pytest.raises(PeerLost):
        inbox.wait(1, soon())


@pytest.mark.parametrize("piece", [1, 7, 24, 25, 1000])
def test_messages_arrive_in_pieces_between_deadlines(
    raw: tuple[socket.socket, TcpLink], piece: int, pool: ThreadPoolExecutor
) -> None:
    """A wait that gave up in the middle of a frame has lost nothing."""
    ours, link = raw
    boxes = {m: link.inbox(m, 64) for m in (1, 2)}
    stream = b"".join(
        pack_frame_header(m, n, 10 * m) + bytes([n * m]) * 10 * m for n in (1, 2) for m in (1, 2)
    )
    got: list[list[int]] = []

    def wait(wanted: list[tuple[int, int]]) -> None:
        while wanted:
            n, m = wanted[0]
            try:
                view = boxes[m].wait(n, soon(-1), num_bytes=10 * m)
            except DeadlineExceeded:
                return
            got.append(view.tolist())
            wanted.pop(0)

    wanted = [(n, m) for n in (1, 2) for m in (1, 2)]
    for start in range(0, len(stream), piece):
        ours.sendall(stream[start : start + piece])
        wait(wanted)
    deadline = soon()
    while wanted and time.monotonic() < deadline:
        wait(wanted)
    assert got == [[n * m] * 10 * m for n in (1, 2) for m in (1, 2)]


def test_other_mailboxes_messages_do_not_disturb_a_wait_that_knows_its_length(
    raw: tuple[socket.socket, TcpLink],
) -> None:
    """Short and long messages of another mailbox in front of the wanted one, all there at once."""
    ours, link = raw
    first, second = link.inbox(1, 4096), link.inbox(2, 4096)
    for n, sizes in enumerate([(0, 5), (5, 0), (3000, 100), (100, 3000), (64, 64)], start=1):
        ours.sendall(
            pack_frame_header(2, n, sizes[1]) + b"b" * sizes[1]
            + pack_frame_header(1, n, sizes[0]) + b"a" * sizes[0]
        )  # fmt: skip
        time.sleep(0.01)
        assert bytes(first.wait(n, soon(), num_bytes=sizes[0]).tolist()) == b"a" * sizes[0]
        assert bytes(second.wait(n, soon(), num_bytes=sizes[1]).tolist()) == b"b" * sizes[1]


def test_a_full_mailbox_pushes_back(raw: tuple[socket.socket, TcpLink]) -> None:
    """While two messages are unread, a third stays in the socket, however often the link reads."""
    ours, link = raw
    inbox, outbox = link.inbox(1, 64), link.outbox(2, 8 << 20)
    for n in range(1, 6):
        ours.sendall(pack_frame_header(1, n, 64) + bytes([n]) * 64)
    ours.setblocking(False)
    with pytest.raises(DeadlineExceeded):  # reads what comes while it cannot write
        outbox.post(1, torch.zeros(8 << 20, dtype=torch.uint8), deadline=soon(0.1))
    assert [int(payload[0]) for _, payload in link._boxes[1]._unread] == [1, 2]
    with pytest.raises(PeerLost):
        inbox.wait(1, soon())


def test_links_do_not_copy_on_the_way_in(raw: tuple[socket.socket, TcpLink]) -> None:
    """Two slots, used in turn, for ever."""
    ours, link = raw
    inbox = link.inbox(1, 64)
    addresses = []
    for n in range(1, 9):
        ours.sendall(pack_frame_header(1, n, 8) + b"12345678")
        addresses.append(inbox.wait(n, soon()).data_ptr())
    assert len(set(addresses)) == 2
    assert addresses[::2] == addresses[:1] * 4
