"""The in-process link with a pump: both ends in one thread, as in the monolithic deployment."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch

from lamina.errors import DeadlineExceeded, PeerLost, ProtocolMismatch
from lamina.transport.inproc import inproc_pair
from lamina.transport.mailbox import Link
from lamina.transport.native import wait_any


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


class Doubler:
    """The second end: answers every message of mailbox 1 with its double in mailbox 2."""

    def __init__(self) -> None:
        self.front, self.link = inproc_pair("front", "doubler", self.pump)
        self.inbox = self.link.inbox(1, 64)
        self.outbox = self.link.outbox(2, 64)
        self.questions = self.front.outbox(1, 64)
        self.answers = self.front.inbox(2, 64)
        self.num_pumped = 0
        self.answering = True

    def pump(self) -> None:
        self.num_pumped += 1
        number = self.num_pumped
        payload = self.inbox.wait(number, soon()).view(torch.float32)
        if self.answering:
            self.outbox.post(number, payload * 2, deadline=soon())


@pytest.fixture
def doubler() -> Doubler:
    return Doubler()


def test_wait_runs_the_other_end(doubler: Doubler) -> None:
    for number in range(1, 6):
        doubler.questions.post(number, torch.full((4,), float(number)), deadline=soon())
        assert doubler.num_pumped == number - 1
        answer = doubler.answers.wait(number, soon(), num_bytes=16).view(torch.float32)
        assert answer.tolist() == [2.0 * number] * 4


def test_post_into_a_full_mailbox_runs_the_other_end(doubler: Doubler) -> None:
    doubler.answering = False
    for number in range(1, 6):
        doubler.questions.post(number, torch.zeros(4), deadline=soon())
    assert doubler.num_pumped == 4  # the last message but one is still viewed


def test_parts_are_joined_in_the_slots(doubler: Doubler) -> None:
    part = torch.arange(4.0)
    doubler.questions.post(1, part, part + 4, deadline=soon())
    assert doubler.inbox.wait(1, soon()).view(torch.float32).tolist() == list(range(8))
    doubler.questions.post(2, part[1:], deadline=soon())
    view = doubler.inbox.wait(2, soon())
    assert view.data_ptr() % 64 == 0
    assert view.view(torch.float32).tolist() == [1, 2, 3]


def test_waiting_for_any_runs_the_other_end(doubler: Doubler) -> None:
    doubler.questions.post(1, torch.ones(4), deadline=soon())
    assert wait_any([(doubler.answers, 1)], soon()) == 0
    assert doubler.answers.wait(1, soon(-1)).view(torch.float32).tolist() == [2.0] * 4
    with pytest.raises(DeadlineExceeded):
        wait_any([(doubler.inbox, 2)], soon(60))


def test_any_error_of_the_pump_comes_through() -> None:
    def pump() -> None:
        raise ZeroDivisionError("of the other end")

    front, _ = inproc_pair("a", "b", pump)
    with pytest.raises(ZeroDivisionError, match="of the other end"):
        front.inbox(1, 64).wait(1, soon())


def test_a_pump_that_refers_to_its_link_is_collected() -> None:
    doubler = Doubler()
    alive = weakref.ref(doubler)
    del doubler
    gc.collect()
    assert alive() is None


def test_second_end_never_blocks(doubler: Doubler) -> None:
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="front: "):
        doubler.inbox.wait(1, soon(60))
    with pytest.raises(DeadlineExceeded):
        doubler.answers.wait(1, soon(60))
    assert time.monotonic() - start < 1
    assert doubler.num_pumped == 1


def test_deadline_while_the_other_end_is_busy_with_something_else() -> None:
    front, _ = inproc_pair("a", "b", lambda: time.sleep(0.01))
    with pytest.raises(DeadlineExceeded, match=r"^b: "):
        front.inbox(1, 64).wait(1, soon(0.1))


def test_errors_of_the_other_end_come_through(doubler: Doubler) -> None:
    doubler.questions.post(7, torch.zeros(4), deadline=soon())
    with pytest.raises(ProtocolMismatch, match="message 1 of mailbox 1 can no longer come"):
        doubler.answers.wait(7, soon())
    with pytest.raises(PeerLost):
        doubler.answers.wait(7, soon())


@pytest.mark.parametrize("closes", ["front", "link"])
def test_closing_either_end(doubler: Doubler, closes: str) -> None:
    end: Link = getattr(doubler, closes)
    end.close()
    with pytest.raises(PeerLost):
        doubler.answers.wait(1, soon())
    with pytest.raises(PeerLost):
        doubler.questions.post(1, torch.zeros(1), deadline=soon())
    with pytest.raises(PeerLost):
        doubler.inbox.wait(1, soon())
