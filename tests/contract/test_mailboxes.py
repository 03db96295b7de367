"""What every transport promises (`lamina.transport.mailbox`) to those who keep to it."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lamina.errors import CapacityError, PeerLost, ProtocolMismatch
from lamina.transport.mailbox import Inbox, Link, Outbox

SIZE = 4096
"""Capacity of the mailbox `box`."""
Pair = tuple[Link, Link]


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def message(number: int, num_bytes: int = 64) -> torch.Tensor:
    return torch.full((num_bytes,), number % 251, dtype=torch.uint8)


def test_peers_know_each_others_names(pair: Pair) -> None:
    assert (pair[0].peer, pair[1].peer) == ("b", "a")


def test_mailboxes_that_cannot_be_made(pair: Pair, box: tuple[Outbox, Inbox]) -> None:
    a, b = pair
    with pytest.raises(ValueError, match="exists already"):
        b.inbox(1, SIZE)
    with pytest.raises(ValueError, match="exists already"):
        a.outbox(1, SIZE)
    with pytest.raises(ValueError, match="from 1"):
        a.inbox(0, SIZE)
    with pytest.raises(CapacityError, match=r"bytes for a mailbox"):
        a.inbox(3, 1 << 50)


def test_payload_of_several_parts_arrives_byte_by_byte(box: tuple[Outbox, Inbox]) -> None:
    outbox, inbox = box
    k = torch.randn(3, 4, 5).bfloat16()
    v = torch.arange(7, dtype=torch.int64)
    scalar = torch.tensor(2.5)
    outbox.post(7, k, v, scalar, torch.empty(0, 8), deadline=soon())

    payload = inbox.wait(7, soon(), num_bytes=k.nbytes + v.nbytes + 4)

    assert payload.dtype == torch.uint8
    assert torch.equal(payload[: k.nbytes].view(torch.bfloat16).view(3, 4, 5), k)
    assert torch.equal(payload[k.nbytes : k.nbytes + v.nbytes].clone().view(torch.int64), v)
    assert payload[-4:].clone().view(torch.float32).item() == 2.5


def test_views_are_aligned(box: tuple[Outbox, Inbox]) -> None:
    outbox, inbox = box
    for number, start in enumerate((0, 1, 8, 63), start=1):
        outbox.post(number, message(number, 128)[start:], deadline=soon())
        view = inbox.wait(number, soon())
        assert view.data_ptr() % 64 == 0
        assert view.tolist() == [number] * (128 - start)


def test_empty_and_full_messages(box: tuple[Outbox, Inbox]) -> None:
    outbox, inbox = box
    outbox.post(1, deadline=soon())
    outbox.post(2, message(2, SIZE), deadline=soon())
    assert inbox.wait(1, soon(), num_bytes=0).shape == (0,)
    assert inbox.wait(2, soon(), num_bytes=SIZE).tolist() == [2] * SIZE


def test_sender_may_be_two_messages_ahead(box: tuple[Outbox, Inbox]) -> None:
    outbox, inbox = box
    outbox.post(1, message(1), deadline=soon(1))
    outbox.post(2, message(2), deadline=soon(1))
    assert inbox.wait(1, soon())[0] == 1
    assert inbox.wait(2, soon())[0] == 2


def test_a_view_survives_whatever_the_sender_posts(
    pair: Pair, box: tuple[Outbox, Inbox], pool: ThreadPoolExecutor
) -> None:
    outbox, inbox = box
    other = pair[0].inbox(2, SIZE), pair[1].outbox(2, SIZE)
    num_messages = 20

    def send() -> None:
        for number in range(1, num_messages + 1):
            outbox.post(number, message(number, SIZE), deadline=soon())

    sending = pool.submit(send)
    for number in range(1, num_messages + 1):
        view = inbox.wait(number, soon())
        # Posting lets a transport read what has come meanwhile.
        other[1].post(number, message(0), deadline=soon())
        other[0].wait(number, soon())
        time.sleep(0.002)
        assert view.tolist() == [number] * SIZE
    sending.result()


def test_mailboxes_of_a_link_do_not_mix(pair: Pair) -> None:
    a, b = pair
    outboxes = {m: a.outbox(m, SIZE) for m in (1, 2, 3)}
    inboxes = {m: b.inbox(m, SIZE) for m in (1, 2, 3)}
    for mailbox, outbox in outboxes.items():
        outbox.post(5, message(mailbox, 10 * mailbox), deadline=soon())
    for mailbox in (3, 1, 2):
        assert inboxes[mailbox].wait(5, soon()).tolist() == [mailbox] * 10 * mailbox


def test_wait_discards_smaller_numbers_and_accepts_gaps(
    box: tuple[Outbox, Inbox], pool: ThreadPoolExecutor
) -> None:
    outbox, inbox = box
    numbers = (3, 10, 11, 40, 1000)

    def send() -> None:
        for number in numbers:
            outbox.post(number, message(number), deadline=soon())

    sending = pool.submit(send)
    assert inbox.wait(40, soon())[0] == 40
    assert inbox.wait(1000, soon())[0] == 1000 % 251
    sending.result()


def test_number_that_can_no_longer_come(pair: Pair, box: tuple[Outbox, Inbox]) -> None:
    outbox, inbox = box
    outbox.post(5, message(5), deadline=soon())
    with pytest.raises(ProtocolMismatch, match=r"message 4 .* can no longer come"):
        inbox.wait(4, soon())
    with pytest.raises(ProtocolMismatch, match="can no longer come"):
        inbox.wait(6, soon())


def test_a_message_is_taken_once(box: tuple[Outbox, Inbox]) -> None:
    outbox, inbox = box
    outbox.post(5, message(5), deadline=soon())
    inbox.wait(5, soon())
    with pytest.raises(ProtocolMismatch):
        inbox.wait(5, soon())


def test_numbers_must_increase(box: tuple[Outbox, Inbox], pool: ThreadPoolExecutor) -> None:
    outbox, inbox = box
    outbox.post(5, message(5), deadline=soon())
    inbox.wait(5, soon())
    waiting = pool.submit(inbox.wait, 6, soon())
    with contextlib.suppress(ProtocolMismatch):  # a transport without a wire sees it at once
        outbox.post(5, message(5), deadline=soon())
    with pytest.raises(ProtocolMismatch, match="increase"):
        waiting.result()


def test_wrong_length_is_a_mismatch_on_both_ends(pair: Pair, box: tuple[Outbox, Inbox]) -> None:
    outbox, inbox = box
    answers = pair[0].inbox(2, SIZE)
    outbox.post(1, message(1, 100), deadline=soon())
    with pytest.raises(ProtocolMismatch, match="100 bytes, 101 were expected"):
        inbox.wait(1, soon(), num_bytes=101)
    with pytest.raises(PeerLost):
        answers.wait(1, soon())


def test_message_larger_than_the_outbox(pair: Pair, box: tuple[Outbox, Inbox]) -> None:
    with pytest.raises(ProtocolMismatch, match=f"{SIZE + 1} bytes"):
        box[0].post(1, message(1, SIZE), message(1, 1), deadline=soon())
    with pytest.raises(ProtocolMismatch, match=f"{SIZE + 1} bytes"):
        box[0].post(2, message(1), deadline=soon())


def test_message_larger_than_the_inbox(pair: Pair) -> None:
    outbox, inbox = pair[0].outbox(1, 2 * SIZE), pair[1].inbox(1, SIZE)
    with contextlib.suppress(ProtocolMismatch):  # a transport without a wire sees it at once
        outbox.post(1, message(1, SIZE + 1), deadline=soon())
    with pytest.raises(ProtocolMismatch, match="agree on the capacities"):
        inbox.wait(1, soon())


def test_both_sides_may_post_large_messages_at_once(pair: Pair, pool: ThreadPoolExecutor) -> None:
    size = 24 << 20
    a, b = pair
    ends = [(a.outbox(1, size), a.inbox(2, size)), (b.outbox(2, size), b.inbox(1, size))]

    def exchange(outbox: Outbox, inbox: Inbox, value: int) -> int:
        for number in (1, 2):
            outbox.post(number, message(value, size), deadline=soon(20))
        return sum(int(inbox.wait(n, soon(20), num_bytes=size).sum()) for n in (1, 2))

    first = pool.submit(exchange, *ends[0], 1)
    second = pool.submit(exchange, *ends[1], 3)
    assert (first.result(), second.result()) == (6 * size, 2 * size)


def test_many_small_messages(box: tuple[Outbox, Inbox], pool: ThreadPoolExecutor) -> None:
    outbox, inbox = box
    num_messages = 20_000
    payload = torch.arange(16, dtype=torch.int64)

    def send() -> None:
        for number in range(1, num_messages + 1):
            outbox.post(number, payload + number, deadline=soon())

    sending = pool.submit(send)
    for number in range(1, num_messages + 1):
        view = inbox.wait(number, soon(), num_bytes=128)
        assert int(view.view(torch.int64)[15]) == number + 15
    sending.result()


def test_two_way_traffic_over_several_mailboxes(pair: Pair, pool: ThreadPoolExecutor) -> None:
    """As in a step: q and kv of two micro-batches go out before the first answer is read."""
    a, b = pair
    q_out, kv_out, out_in = a.outbox(2, SIZE), a.outbox(3, SIZE), a.inbox(4, SIZE)
    q_in, kv_in, out_out = b.inbox(2, SIZE), b.inbox(3, SIZE), b.outbox(4, SIZE)
    num_messages = 500

    def serve() -> None:
        for number in range(1, num_messages + 1):
            q = q_in.wait(number, soon(), num_bytes=100)
            kv = kv_in.wait(number, soon(), num_bytes=300)
            out_out.post(number, kv[:100] + q, deadline=soon())

    serving = pool.submit(serve)
    for number in range(1, num_messages + 1, 2):
        for n in (number, number + 1):
            q_out.post(n, message(n % 50, 100), deadline=soon())
            kv_out.post(n, message(n % 70, 100), message(0, 200), deadline=soon())
        for n in (number, number + 1):
            view = out_in.wait(n, soon(), num_bytes=100)
            assert view.tolist() == [n % 50 + n % 70] * 100
    serving.result()


def test_room_for_two_messages(box: tuple[Outbox, Inbox]) -> None:
    """Over tcp the sender cannot know; there is room as long as the system takes more."""
    outbox, inbox = box
    for number in (1, 2):
        assert outbox.has_room()
        outbox.post(number, message(number), deadline=soon())
    if not outbox.has_room():
        inbox.wait(1, soon())
        assert not outbox.has_room(), "message 1 is viewed"
        inbox.wait(2, soon())
    assert outbox.has_room()


def test_no_room_without_the_other_end(pair: Pair) -> None:
    """What must not wait for the receiver does not even wait for it to make the mailbox."""
    outbox = pair[0].outbox(9, SIZE)
    begin = time.monotonic()
    outbox.has_room()
    assert time.monotonic() - begin < 0.1
    pair[0].close()
    with pytest.raises(PeerLost):
        outbox.post(1, message(1), deadline=soon())
