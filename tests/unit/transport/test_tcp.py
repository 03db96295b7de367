"""What only a wire can do wrong, and how tcp links take it."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from itertools import pairwise
from random import Random

import pytest

from lamina import _native
from lamina.errors import DeadlineExceeded, PeerLost, ProtocolMismatch
from lamina.transport.native import NativeLink, wait_any
from lamina.transport.wire import PROTOCOL_VERSION

Raw = tuple[socket.socket, NativeLink]


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def pack_frame_header(mailbox: int, seq: int, num_bytes: int) -> bytes:
    return struct.pack("<4sHHQQ", b"LMNF", PROTOCOL_VERSION, mailbox, seq, num_bytes)


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, NativeLink]]:
    """A socket that writes bytes of its choice, and the link that reads them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    link = NativeLink(_native.TcpLink(theirs.detach(), "peer", PROTOCOL_VERSION, 1e-3))
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
def test_nonsense_on_the_wire(raw: Raw, data: bytes, reason: str) -> None:
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


def test_end_in_the_middle_of_a_message(raw: Raw) -> None:
    ours, link = raw
    inbox = link.inbox(1, 64)
    ours.sendall(pack_frame_header(1, 1, 10) + b"12345")
    ours.close()
    with pytest.raises(PeerLost):
        inbox.wait(1, soon())


@pytest.mark.parametrize("piece", [1, 7, 24, 25, 1000])
def test_messages_arrive_in_pieces_between_deadlines(raw: Raw, piece: int) -> None:
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
    raw: Raw,
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


def test_a_full_mailbox_pushes_back(raw: Raw) -> None:
    """While two messages are unread, a third stays outside, however often the link reads."""
    ours, link = raw
    inbox, answers = link.inbox(1, 4096), link.inbox(2, 64)
    for n in range(1, 6):
        ours.sendall(pack_frame_header(1, n, 4096) + bytes([n]) * 4096)
    assert wait_any([(inbox, 1)], soon()) == 0
    first = inbox.wait(1, soon())
    for _ in range(10):
        with contextlib.suppress(DeadlineExceeded):
            wait_any([(inbox, 1000)], soon(-1))
        assert first.tolist() == [1] * 4096
    with pytest.raises(ProtocolMismatch, match="message 2 of mailbox 1 can no longer come"):
        inbox.wait(2, soon())
    with pytest.raises(ProtocolMismatch):
        answers.wait(1, soon())


def test_a_message_that_nobody_makes_room_for(raw: Raw) -> None:
    ours, link = raw
    link.inbox(1, 64)
    answers = link.inbox(2, 64)
    for n in range(1, 4):
        ours.sendall(pack_frame_header(1, n, 64) + bytes([n]) * 64)
    ours.sendall(pack_frame_header(2, 1, 0))
    with pytest.raises(ProtocolMismatch, match="two messages before it are still unread"):
        answers.wait(1, soon())


def test_links_do_not_copy_on_the_way_in(raw: Raw) -> None:
    """Two slots, used in turn, for ever."""
    ours, link = raw
    inbox = link.inbox(1, 64)
    addresses = []
    for n in range(1, 9):
        ours.sendall(pack_frame_header(1, n, 8) + b"12345678")
        addresses.append(inbox.wait(n, soon()).data_ptr())
    assert len(set(addresses)) == 2
    assert addresses[::2] == addresses[:1] * 4


@pytest.mark.parametrize("seed", range(4))
def test_wrong_expectations_of_what_comes_next_lose_nothing(raw: Raw, seed: int) -> None:
    """Large and small frames of two mailboxes in any order, in pieces of any length."""
    ours, link = raw
    random = Random(seed)
    boxes = {m: link.inbox(m, 65536) for m in (1, 2)}
    for round_number in range(1, 60):
        lengths = {m: random.choice([0, 10, 4096, 5000, 30_000, 65_536]) for m in (1, 2)}
        order = random.sample([1, 2], 2)
        stream = b"".join(
            pack_frame_header(m, round_number, lengths[m])
            + bytes([(round_number + m) % 251]) * lengths[m]
            for m in order
        )
        cuts = sorted(random.choices(range(len(stream) + 1), k=random.choice([0, 1, 3])))
        for begin, end in pairwise([0, *cuts, len(stream)]):
            ours.sendall(stream[begin:end])
            with contextlib.suppress(DeadlineExceeded):
                wait_any([(boxes[random.choice([1, 2])], round_number)], soon(-1))
        for m in random.sample([1, 2], 2):
            view = boxes[m].wait(round_number, soon(), num_bytes=lengths[m])
            assert bytes(view.numpy()) == bytes([(round_number + m) % 251]) * lengths[m]
