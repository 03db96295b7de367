"""What every transport promises when peers are late, gone or declared lost."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from lamina.errors import DeadlineExceeded, PeerLost, TransportError
from lamina.transport.handshake import Listener
from lamina.transport.mailbox import Inbox, Link, Outbox

SECRET = bytes(range(32))
SIZE = 4096
"""Capacity of the mailbox `box`."""
Pair = tuple[Link, Link]


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def message(number: int, num_bytes: int = 64) -> torch.Tensor:
    return torch.full((num_bytes,), number % 251, dtype=torch.uint8)


def post_many(
    outbox: Outbox, payload: torch.Tensor, deadline: Callable[[], float], *, pause_s: float = 0.0
) -> None:
    """Post until it fails, as nobody reads."""
    for number in range(1, 100):
        outbox.post(number, payload, deadline=deadline())
        time.sleep(pause_s)


def test_deadline_of_a_wait_leaves_the_link_usable(box: tuple[Outbox, Inbox]) -> None:
    outbox, inbox = box
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"a: .*message 1 of mailbox 1"):
        inbox.wait(1, soon(0.1))
    assert 0.1 <= time.monotonic() - start < 1.0
    outbox.post(1, message(1), deadline=soon())
    assert inbox.wait(1, soon())[0] == 1


def test_deadline_in_the_past_looks_once(box: tuple[Outbox, Inbox]) -> None:
    outbox, inbox = box
    with pytest.raises(DeadlineExceeded):
        inbox.wait(1, soon(-1))
    outbox.post(1, message(1), deadline=soon())
    inbox.wait(1, soon())
    outbox.post(2, message(2), deadline=soon())
    time.sleep(0.05)
    assert inbox.wait(2, soon(-1))[0] == 2


def test_deadline_of_a_post_fails_the_link(pair: Pair) -> None:
    size = 16 << 20
    a, b = pair
    outbox, inbox = a.outbox(1, size), b.inbox(1, size)
    big = message(1, size)
    with pytest.raises(DeadlineExceeded, match="did not take"):
        post_many(outbox, big, lambda: soon(0.1))
    with pytest.raises(PeerLost):
        outbox.post(100, message(1), deadline=soon())
    with pytest.raises(PeerLost):
        [inbox.wait(number, soon()) for number in range(1, 10)]


def test_close_is_seen_by_the_peer_and_idempotent(pair: Pair, box: tuple[Outbox, Inbox]) -> None:
    a, b = pair
    back = b.outbox(2, SIZE)
    a.close()
    a.close()
    start = time.monotonic()
    for _ in range(2):
        with pytest.raises(PeerLost, match=r"^a: "):
            box[1].wait(1, soon())
    with pytest.raises(PeerLost):
        back.post(1, message(1), deadline=soon())
    assert time.monotonic() - start < 1.0
    with pytest.raises(PeerLost, match="this end"):
        box[0].post(1, message(1), deadline=soon())


def test_messages_that_came_before_the_peer_went_are_not_lost(
    pair: Pair, box: tuple[Outbox, Inbox]
) -> None:
    box[0].post(1, message(1), deadline=soon())
    box[0].post(2, message(2), deadline=soon())
    pair[0].close()
    assert box[1].wait(1, soon())[0] == 1
    assert box[1].wait(2, soon())[0] == 2
    with pytest.raises(PeerLost):
        box[1].wait(3, soon())


def blocked(pool: ThreadPoolExecutor, call: Callable[[], object]) -> Future[float]:
    """Run `call` in a thread until it raises a transport error; when that was."""

    def run() -> float:
        with pytest.raises(TransportError):
            call()
        return time.monotonic()

    future = pool.submit(run)
    time.sleep(0.1)
    assert not future.done()
    return future


@pytest.mark.parametrize("how", ["fail", "close", "peer closes"])
def test_a_blocked_wait_is_woken(
    pair: Pair, box: tuple[Outbox, Inbox], pool: ThreadPoolExecutor, how: str
) -> None:
    a, b = pair
    future = blocked(pool, lambda: box[1].wait(1, soon()))
    start = time.monotonic()
    {"fail": lambda: b.fail("no heartbeat"), "close": b.close, "peer closes": a.close}[how]()
    assert future.result(timeout=5) - start < 0.5
    with pytest.raises(PeerLost, match="no heartbeat" if how == "fail" else None):
        box[1].wait(1, soon())
    with pytest.raises(PeerLost):  # a sender may notice late
        post_many(box[0], message(1), soon, pause_s=0.01)


@pytest.mark.parametrize("how", ["fail", "close", "peer closes"])
def test_a_blocked_post_is_woken(pair: Pair, pool: ThreadPoolExecutor, how: str) -> None:
    a, b = pair
    size = 8 << 20
    outbox = a.outbox(1, size)
    b.inbox(1, size)

    future = blocked(pool, lambda: post_many(outbox, message(1, size), soon))
    start = time.monotonic()
    {"fail": lambda: a.fail("gone"), "close": a.close, "peer closes": b.close}[how]()
    assert future.result(timeout=5) - start < 0.5


def test_fail_wins_over_messages_that_are_there(pair: Pair, box: tuple[Outbox, Inbox]) -> None:
    box[0].post(1, message(1), deadline=soon())
    pair[1].fail("declared dead")
    with pytest.raises(PeerLost, match="a: declared dead"):
        box[1].wait(1, soon())
    pair[1].fail("another reason")
    with pytest.raises(PeerLost, match="a: declared dead"):
        box[1].wait(1, soon())


def test_third_unread_message_in_front_does_not_hang(
    pair: Pair, box: tuple[Outbox, Inbox], pool: ThreadPoolExecutor
) -> None:
    """The sender ran ahead in one mailbox; what the receiver waits for could never be reached."""
    a, b = pair
    second = a.outbox(2, SIZE)
    waited_for = b.inbox(2, SIZE)

    def send() -> None:
        for number in (1, 2, 3):
            box[0].post(number, message(1), deadline=soon(0.3))
        second.post(1, message(1), deadline=soon(0.3))

    sending = pool.submit(send)
    with pytest.raises(TransportError):
        waited_for.wait(1, soon(0.6))
    assert isinstance(sending.exception(), DeadlineExceeded | None)


def test_link_can_be_closed_while_its_thread_waits(
    pair: Pair, box: tuple[Outbox, Inbox], pool: ThreadPoolExecutor
) -> None:
    waiting = blocked(pool, lambda: box[1].wait(1, soon()))
    closers = [threading.Thread(target=pair[1].close) for _ in range(4)]
    for thread in closers:
        thread.start()
    for thread in closers:
        thread.join(5)
        assert not thread.is_alive()
    waiting.result(timeout=1)


_CHILD = """
import sys, time, torch
from lamina.transport.handshake import connect
link = connect(sys.argv[1], bytes(range(32)), "print", "child", time.monotonic() + 30)
inbox, outbox = link.inbox(1, 64), link.outbox(2, 64)
outbox.post(1, inbox.wait(1, time.monotonic() + 30), deadline=time.monotonic() + 30)
time.sleep(60)
"""


@pytest.mark.parametrize("address", ["127.0.0.1:0", "unix:@"])
def test_killed_process_is_noticed_at_once(pool: ThreadPoolExecutor, address: str) -> None:
    listener = Listener(address)
    child = subprocess.Popen([sys.executable, "-c", _CHILD, listener.address])
    try:
        link = listener.accept({SECRET: ("child", "print")}, soon(60))
        outbox, inbox = link.outbox(1, 64), link.inbox(2, 64)
        outbox.post(1, message(9), deadline=soon())
        assert inbox.wait(1, soon(30), num_bytes=64).tolist() == [9] * 64

        future = blocked(pool, lambda: inbox.wait(2, soon(30)))
        start = time.monotonic()
        child.kill()
        assert future.result(timeout=10) - start < 0.2
        with pytest.raises(PeerLost, match=r"^child: "):
            inbox.wait(2, soon(30))
        link.close()
    finally:
        child.kill()
        child.wait()
        listener.close()
