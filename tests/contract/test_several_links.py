"""Waiting for the first of several messages that come over several links, of any transports."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from contract.conftest import TRANSPORTS
from lamina.errors import DeadlineExceeded, PeerLost, ProtocolMismatch
from lamina.transport.handshake import Listener
from lamina.transport.mailbox import Inbox, Link, Outbox
from lamina.transport.native import wait_any

SIZE = 4096
Pair = tuple[Link, Link]
KINDS = (
    ("shm", "shm", "shm"),
    ("tcp", "tcp", "tcp"),
    ("inproc", "inproc"),
    ("shm", "tcp"),
    ("tcp", "inproc", "shm"),
    ("faulty-shm", "faulty-shm"),
    ("faulty-tcp", "shm"),
)


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def message(number: int) -> torch.Tensor:
    return torch.full((SIZE,), number % 251, dtype=torch.uint8)


@pytest.fixture(params=KINDS, ids="+".join)
def pairs(request: pytest.FixtureRequest) -> Iterator[list[Pair]]:
    pairs = [TRANSPORTS[kind]() for kind in request.param]
    yield pairs
    for a, b in pairs:
        a.close()
        b.close()


Boxes = tuple[list[Outbox], list[Inbox]]


@pytest.fixture
def boxes(pairs: list[Pair]) -> Boxes:
    """Mailbox 1 of every link, from a to b."""
    return [a.outbox(1, SIZE) for a, _ in pairs], [b.inbox(1, SIZE) for _, b in pairs]


def test_the_one_that_is_there(boxes: Boxes) -> None:
    outboxes, inboxes = boxes
    awaited = [(inbox, 1) for inbox in inboxes]
    with pytest.raises(DeadlineExceeded, match=rf"none of {len(inboxes)} messages"):
        wait_any(awaited, soon(0.05))
    outboxes[1].post(1, message(7), deadline=soon())
    assert wait_any(awaited, soon()) == 1
    assert wait_any(awaited, soon()) == 1, "nothing was taken"
    assert inboxes[1].wait(1, soon(-1))[0] == 7


@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.05])
def test_whichever_link_it_comes_over_wakes_it(
    boxes: Boxes, pool: ThreadPoolExecutor, delay_s: float
) -> None:
    """Also one that has gone to sleep."""
    outboxes, inboxes = boxes
    for number in range(1, 2 * len(inboxes) + 1):
        index = number % len(inboxes)
        waiting = pool.submit(wait_any, [(inbox, number) for inbox in inboxes], soon())
        time.sleep(delay_s)
        begin = time.monotonic()
        outboxes[index].post(number, message(number), deadline=soon())
        assert waiting.result(timeout=5) == index
        assert time.monotonic() - begin < 0.5
        assert inboxes[index].wait(number, soon(-1)).tolist() == [number] * SIZE


def test_the_first_in_the_order_given(boxes: Boxes) -> None:
    outboxes, inboxes = boxes
    for outbox, inbox in zip(outboxes, inboxes, strict=True):
        outbox.post(1, message(1), deadline=soon())
        assert wait_any([(inbox, 1)], soon()) == 0  # it has come
    assert wait_any([(inboxes[1], 1), (inboxes[0], 1)], soon()) == 0
    assert wait_any([(inboxes[0], 1), (inboxes[1], 1)], soon()) == 0


def test_smaller_numbers_are_discarded_and_no_view_ends(
    boxes: Boxes, pool: ThreadPoolExecutor
) -> None:
    outboxes, inboxes = boxes
    outboxes[0].post(1, message(1), deadline=soon())
    view = inboxes[0].wait(1, soon())

    def send() -> None:
        for number in (2, 3, 4, 9):
            outboxes[0].post(number, message(number), deadline=soon())

    sending = pool.submit(send)
    assert wait_any([(inboxes[1], 9), (inboxes[0], 9)], soon()) == 1
    sending.result()
    assert view.tolist() == [1] * SIZE
    assert inboxes[0].wait(9, soon(-1)).tolist() == [9] * SIZE


def test_a_number_that_can_no_longer_come_is_due(boxes: Boxes) -> None:
    outboxes, inboxes = boxes
    outboxes[1].post(5, message(5), deadline=soon())
    assert wait_any([(inboxes[0], 1), (inboxes[1], 4)], soon()) == 1
    with pytest.raises(ProtocolMismatch, match="can no longer come"):
        inboxes[1].wait(4, soon())


def test_messages_wait_in_front_of_what_another_link_brings(pairs: list[Pair]) -> None:
    """Three messages of a mailbox that nobody waits for yet: no reason to give the link up."""
    (a, b), (other_a, other_b) = pairs[:2]
    outbox, inbox = a.outbox(1, SIZE), b.inbox(1, SIZE)
    behind, waited_for = a.outbox(2, SIZE), b.inbox(2, SIZE)
    first, plans = other_a.outbox(1, SIZE), other_b.inbox(1, SIZE)
    sender = threading.Thread(
        target=lambda: [
            *(outbox.post(n, message(n), deadline=soon()) for n in (1, 2, 3)),
            behind.post(1, message(1), deadline=soon()),
        ]
    )
    sender.start()
    with pytest.raises(DeadlineExceeded):
        wait_any([(waited_for, 1), (plans, 1)], soon(0.1))
    first.post(1, message(1), deadline=soon())
    assert wait_any([(waited_for, 1), (plans, 1)], soon()) == 1
    for number in (1, 2, 3):
        assert inbox.wait(number, soon())[0] == number
    plans.wait(1, soon())
    assert wait_any([(waited_for, 1), (plans, 2)], soon()) == 0
    sender.join()


@pytest.mark.parametrize("how", ["fail", "close", "peer closes"])
@pytest.mark.parametrize("index", [0, -1])
def test_the_end_of_any_link_wakes_it_and_names_the_peer(
    pairs: list[Pair], boxes: Boxes, pool: ThreadPoolExecutor, how: str, index: int
) -> None:
    a, b = pairs[index]
    waiting = pool.submit(wait_any, [(inbox, 1) for inbox in boxes[1]], soon())
    time.sleep(0.05)
    begin = time.monotonic()
    {"fail": lambda: b.fail("no heartbeat"), "close": b.close, "peer closes": a.close}[how]()
    assert isinstance(waiting.exception(timeout=2), PeerLost)
    assert time.monotonic() - begin < 0.5
    with pytest.raises(PeerLost, match=r"^a: "):
        boxes[1][index].wait(1, soon())
    with pytest.raises(PeerLost):
        wait_any([(inbox, 1) for inbox in boxes[1]], soon())


def test_messages_that_came_before_a_peer_went_are_not_lost(
    pairs: list[Pair], boxes: Boxes
) -> None:
    outboxes, inboxes = boxes
    outboxes[1].post(1, message(1), deadline=soon())
    pairs[1][0].close()
    time.sleep(0.02)
    assert wait_any([(inbox, 1) for inbox in inboxes], soon()) == 1
    assert inboxes[1].wait(1, soon())[0] == 1
    with pytest.raises(PeerLost):
        wait_any([(inbox, 2) for inbox in inboxes], soon())


_CHILD = """
import sys, time
from lamina.transport.handshake import connect
link = connect(sys.argv[1], bytes(32), "print", "child", time.monotonic() + 30)
link.outbox(1, 64).post(1, deadline=time.monotonic() + 30)
time.sleep(60)
"""


@pytest.mark.parametrize("address", ["127.0.0.1:0", "unix:@"])
@pytest.mark.parametrize("other", ["shm", "tcp"])
def test_a_killed_process_is_noticed_at_once(
    pool: ThreadPoolExecutor, address: str, other: str
) -> None:
    listener = Listener(address)
    child = subprocess.Popen([sys.executable, "-c", _CHILD, listener.address])
    a, b = TRANSPORTS[other]()
    try:
        link = listener.accept({bytes(32): ("child", "print")}, soon(60))
        inboxes = [b.inbox(1, 64), link.inbox(1, 64)]
        assert wait_any([(inbox, 1) for inbox in inboxes], soon(30)) == 1
        inboxes[1].wait(1, soon())
        waiting = pool.submit(wait_any, [(inbox, 2) for inbox in inboxes], soon(30))
        time.sleep(0.1)
        begin = time.monotonic()
        child.kill()
        assert "child: " in str(waiting.exception(timeout=10))
        assert time.monotonic() - begin < 0.2
        link.close()
    finally:
        child.kill()
        child.wait()
        listener.close()
        a.close()
        b.close()
