"""Every injected fault ends in the error that the mailbox contract names for it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from lamina.errors import DeadlineExceeded, PeerLost, ProtocolMismatch
from lamina.transport.faulty import Fault, FaultyLink
from lamina.transport.handshake import Listener
from lamina.transport.inproc import inproc_pair
from lamina.transport.mailbox import Inbox, Outbox


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


class Setup:
    """A faulty sender with mailboxes 1 and 2, and their receiver."""

    def __init__(self) -> None:
        a, self.receiver = inproc_pair("a", "b")
        self.link = FaultyLink(a)
        self.outboxes: dict[int, Outbox] = {m: self.link.outbox(m, 64) for m in (1, 2)}
        self.inboxes: dict[int, Inbox] = {m: self.receiver.inbox(m, 64) for m in (1, 2)}

    def post(self, seq: int, mailbox: int = 1) -> None:
        payload = torch.full((8,), seq, dtype=torch.uint8)
        self.outboxes[mailbox].post(seq, payload[:3], payload[3:], deadline=soon())

    def wait(self, seq: int, mailbox: int = 1, within_s: float = 5.0) -> list[int]:
        view = self.inboxes[mailbox].wait(seq, soon(within_s), num_bytes=8)
        return [int(value) for value in view]


@pytest.fixture
def setup() -> Setup:
    return Setup()


def test_without_faults_everything_passes(setup: Setup) -> None:
    for seq in range(1, 5):
        setup.post(seq)
        assert setup.wait(seq) == [seq] * 8


def test_dropped_message(setup: Setup) -> None:
    setup.link.inject(Fault(kind="drop", after=1, count=1))
    setup.post(1)
    setup.post(2)
    assert setup.wait(1) == [1] * 8
    with pytest.raises(DeadlineExceeded):
        setup.wait(2, within_s=0.05)
    setup.post(3)
    with pytest.raises(ProtocolMismatch, match="message 2 of mailbox 1 can no longer come"):
        setup.wait(2)


def test_truncated_message(setup: Setup) -> None:
    setup.link.inject(Fault(kind="truncate"))
    setup.post(1)
    with pytest.raises(ProtocolMismatch, match="4 bytes, 8 were expected"):
        setup.wait(1)


def test_delayed_message(setup: Setup) -> None:
    setup.link.inject(Fault(kind="delay", delay_s=0.2))
    start = time.monotonic()
    setup.post(1)
    assert setup.wait(1) == [1] * 8
    assert time.monotonic() - start >= 0.2
    setup.link.clear()
    start = time.monotonic()
    setup.post(2)
    assert setup.wait(2) == [2] * 8
    assert time.monotonic() - start < 0.2


def test_reordered_messages_of_one_mailbox(setup: Setup) -> None:
    setup.link.inject(Fault(kind="reorder", count=1))
    setup.post(1)
    with pytest.raises(ProtocolMismatch, match="numbers must increase"):
        setup.post(2)
    with pytest.raises(ProtocolMismatch):
        setup.wait(1)


def test_reordered_messages_of_two_mailboxes(setup: Setup) -> None:
    setup.link.inject(Fault(kind="reorder", mailbox=1))
    setup.post(1, mailbox=1)
    with pytest.raises(DeadlineExceeded):
        setup.wait(1, mailbox=1, within_s=0.05)
    setup.post(1, mailbox=2)
    assert setup.wait(1, mailbox=1) == [1] * 8
    assert setup.wait(1, mailbox=2) == [1] * 8


def test_closed_after_some_messages(setup: Setup) -> None:
    setup.link.inject(Fault(kind="close", after=2))
    setup.post(1)
    setup.post(2)
    with pytest.raises(PeerLost):
        setup.post(3)
    assert setup.wait(1) == [1] * 8
    assert setup.wait(2) == [2] * 8
    with pytest.raises(PeerLost):
        setup.wait(3)


def test_faults_of_one_mailbox_leave_the_others_alone(setup: Setup) -> None:
    setup.link.inject(Fault(kind="drop", mailbox=1))
    setup.post(1, mailbox=1)
    setup.post(1, mailbox=2)
    assert setup.wait(1, mailbox=2) == [1] * 8
    with pytest.raises(DeadlineExceeded):
        setup.wait(1, mailbox=1, within_s=0.05)


def test_empty_messages_survive_faults(setup: Setup) -> None:
    setup.link.inject(Fault(kind="truncate"))
    setup.outboxes[1].post(1, deadline=soon())
    assert setup.inboxes[1].wait(1, soon(), num_bytes=0).shape == (0,)


_KILLED = """
import sys, time, torch
from lamina.transport.faulty import Fault, FaultyLink
from lamina.transport.handshake import connect
link = FaultyLink(
    connect(sys.argv[1], b"s" * 32, "print", "child", time.monotonic() + 30),
    Fault(kind="kill", after=1),
)
outbox = link.outbox(1, 64)
for seq in (1, 2):
    outbox.post(seq, torch.zeros(8), deadline=time.monotonic() + 30)
"""


def test_killed_by_its_own_fault() -> None:
    listener = Listener()
    child = subprocess.Popen([sys.executable, "-c", _KILLED, listener.address])
    try:
        link = listener.accept({b"s" * 32: ("child", "print")}, soon(60))
        inbox = link.inbox(1, 64)
        assert inbox.wait(1, soon(30), num_bytes=32).shape == (32,)
        with pytest.raises(PeerLost):
            inbox.wait(2, soon(30))
        assert child.wait(10) == -9
        link.close()
    finally:
        child.kill()
        child.wait()
        listener.close()
