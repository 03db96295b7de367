"""Waiting for the first of several mailboxes, over every transport."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lamina.errors import DeadlineExceeded, PeerLost
from lamina.transport.mailbox import Inbox, Link, Outbox
from lamina.transport.native import wait_any

SIZE = 4096
Pair = tuple[Link, Link]


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def message(number: int) -> torch.Tensor:
    return torch.full((SIZE,), number % 251, dtype=torch.uint8)


@pytest.fixture
def boxes(pair: Pair) -> tuple[list[Outbox], list[Inbox]]:
    """Mailboxes 1, 2 and 3, from a to b."""
    a, b = pair
    return [a.outbox(m, SIZE) for m in (1, 2, 3)], [b.inbox(m, SIZE) for m in (1, 2, 3)]


def test_the_one_that_is_there(pair: Pair, boxes: tuple[list[Outbox], list[Inbox]]) -> None:
    outboxes, inboxes = boxes
    awaited = [(inbox, 1) for inbox in inboxes]
    outboxes[2].post(1, message(7), deadline=soon())
    assert wait_any(awaited, soon()) == 2
    assert wait_any(awaited, soon()) == 2, "nothing was taken"
    assert inboxes[2].wait(1, soon(-1))[0] == 7
    with pytest.raises(DeadlineExceeded, match=r"^a: .*none of 2 messages"):
        wait_any(awaited[:2], soon(0.05))


def test_the_first_in_the_order_given(pair: Pair, boxes: tuple[list[Outbox], list[Inbox]]) -> None:
    outboxes, inboxes = boxes
    for outbox in outboxes:
        outbox.post(1, message(1), deadline=soon())
    inboxes[2].wait(1, soon())  # all have come
    assert wait_any([(inboxes[1], 1), (inboxes[0], 1)], soon()) == 0


def test_it_is_woken(
    pair: Pair, boxes: tuple[list[Outbox], list[Inbox]], pool: ThreadPoolExecutor
) -> None:
    outboxes, inboxes = boxes
    waiting = pool.submit(wait_any, [(inbox, 5) for inbox in inboxes], soon())
    time.sleep(0.1)
    assert not waiting.done()
    outboxes[1].post(5, message(1), deadline=soon())
    assert waiting.result(timeout=1) == 1


def test_smaller_numbers_are_discarded_and_no_view_ends(
    pair: Pair, boxes: tuple[list[Outbox], list[Inbox]], pool: ThreadPoolExecutor
) -> None:
    """As after a step that was given up: its messages still come, one is still viewed."""
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


def test_a_number_that_can_no_longer_come_is_due(
    pair: Pair, boxes: tuple[list[Outbox], list[Inbox]]
) -> None:
    outboxes, inboxes = boxes
    outboxes[1].post(5, message(5), deadline=soon())
    assert wait_any([(inboxes[0], 1), (inboxes[1], 4)], soon()) == 1


@pytest.mark.parametrize("how", ["fail", "close", "peer closes"])
def test_the_end_of_the_link_wakes_it(
    pair: Pair, boxes: tuple[list[Outbox], list[Inbox]], pool: ThreadPoolExecutor, how: str
) -> None:
    a, b = pair
    waiting = pool.submit(wait_any, [(inbox, 1) for inbox in boxes[1]], soon())
    time.sleep(0.05)
    {"fail": lambda: b.fail("no heartbeat"), "close": b.close, "peer closes": a.close}[how]()
    assert isinstance(waiting.exception(timeout=1), PeerLost)
