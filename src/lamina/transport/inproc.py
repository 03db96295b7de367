"""The transport inside one process: a function call, or a hand-over between two threads.

With threads, `post` copies into the receiver's slots and waits on a condition variable while they
are full. With a *pump* (the monolithic deployment) both ends live in one thread: where one end
would wait for the other, it calls the pump, which runs the other end until it needs more input.
Then a message of one aligned part is handed over by reference, without a copy; several parts are
joined in the slot.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from lamina.errors import DeadlineExceeded, PeerLost, ProtocolMismatch, TransportError
from lamina.transport.failure import Failure
from lamina.transport.mailbox import Inbox, Link, Outbox
from lamina.transport.slots import ALIGNMENT_BYTES, MailboxSlots, as_bytes


def inproc_pair(
    name_a: str, name_b: str, pump_b: Callable[[], None] | None = None
) -> tuple[Link, Link]:
    """Two ends of a link in this process.

    Args:
        name_a, name_b: the ends' names; the first link's `peer` is `name_b`.
        pump_b: None: each end has its own thread. Otherwise the thread of the first end also runs
            the second: `pump_b` is called, again and again, when the first end waits for a message
            that is not there or posts into a full mailbox. It must do what is due at the second
            end, where a `wait` for a message that is not there raises DeadlineExceeded at once.

    Returns:
        The first and the second end.
    """
    changed = threading.Condition()
    by_reference = pump_b is not None
    a = InprocLink(name_b, changed, pump_b, by_reference=by_reference)
    b = InprocLink(name_a, changed, None, by_reference=by_reference)
    a.other, b.other = b, a
    return a, b


class InprocLink(Link):
    """One end of an in-process link; made by `inproc_pair`."""

    other: InprocLink

    def __init__(
        self,
        peer: str,
        changed: threading.Condition,
        pump: Callable[[], None] | None,
        *,
        by_reference: bool,
    ) -> None:
        self.peer = peer
        self.changed = changed
        self.by_reference = by_reference
        self.boxes: dict[int, MailboxSlots] = {}
        self._pump = pump
        self._failure = Failure()
        self._is_cut_off = False

    def outbox(self, mailbox: int, capacity_bytes: int) -> Outbox:
        return _InprocOutbox(self, mailbox, capacity_bytes)

    def inbox(self, mailbox: int, capacity_bytes: int) -> Inbox:
        assert mailbox not in self.boxes, f"mailbox {mailbox} exists already"
        slots = MailboxSlots(mailbox, capacity_bytes, self.peer)
        with self.changed:
            self.boxes[mailbox] = slots
            self.changed.notify_all()
        return _InprocInbox(self, slots)

    def fail(self, reason: str) -> None:
        self.broken(PeerLost(reason, peer=self.peer))

    def close(self) -> None:
        self.fail("this end of the link is closed")
        with self.changed:
            self.boxes.clear()

    def check(self) -> None:
        """Raise the error that this end failed with, if it did."""
        self._failure.check()

    def check_peer(self) -> None:
        """PeerLost if the other end closed or failed."""
        if self._is_cut_off:
            raise self.broken(PeerLost("closed the link", peer=self.peer))

    def broken(self, error: TransportError) -> TransportError:
        """Fail this end with `error` and cut off the other one; for `raise link.broken(error)`."""
        with self.changed:
            self._failure.set(error)
            self.other._is_cut_off = True
            self.changed.notify_all()
        return error

    def until(self, ready: Callable[[], bool], what: str, deadline: float) -> None:
        """Let the other end run until `ready()`, which is called with `changed` held.

        Raises:
            PeerLost: either end failed or closed. DeadlineExceeded: not ready in time.
        """
        if self._pump is None:
            self._until_notified(ready, what, deadline)
            return
        while True:
            self.check()
            with self.changed:
                if ready():
                    return
            self.check_peer()
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"{what} in time", peer=self.peer)
            self._pump()

    def _until_notified(self, ready: Callable[[], bool], what: str, deadline: float) -> None:
        while True:
            self.check()
            with self.changed:
                if ready():
                    return
                if not (self._is_cut_off or self._failure.is_set):
                    # The second end of a pumped pair runs inside the first: nothing can change.
                    remaining_s = 0.0 if self.by_reference else deadline - time.monotonic()
                    if remaining_s <= 0:
                        raise DeadlineExceeded(f"{what} in time", peer=self.peer)
                    self.changed.wait(remaining_s)
                    continue
            self.check()
            self.check_peer()


class _InprocOutbox(Outbox):
    def __init__(self, link: InprocLink, mailbox: int, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._link = link
        self._mailbox = mailbox

    def post(self, seq: int, *parts: torch.Tensor, deadline: float) -> None:
        link = self._link
        pieces = [as_bytes(part) for part in parts]
        num_bytes = sum(piece.shape[0] for piece in pieces)
        if num_bytes > self.capacity_bytes:
            link.check()
            raise link.broken(
                ProtocolMismatch(
                    f"message {seq} has {num_bytes} bytes, more than the {self.capacity_bytes} of "
                    f"mailbox {self._mailbox}",
                    peer=link.peer,
                )
            )
        boxes = link.other.boxes
        link.check()
        link.check_peer()

        def has_room() -> bool:
            return self._mailbox in boxes and boxes[self._mailbox].has_room

        try:
            link.until(has_room, f"did not take message {seq} of mailbox {self._mailbox}", deadline)
        except DeadlineExceeded as error:
            link.fail(f"given up: {error}")
            raise
        with link.changed:
            slots = boxes.get(self._mailbox)
        if slots is None:
            link.check_peer()
        assert slots is not None, "a mailbox only goes when its link is closed"
        # This end is the only one that fills the free slot, so the copy needs no lock.
        try:
            slots.check_arrival(seq, num_bytes)
        except ProtocolMismatch as error:
            link.other.broken(ProtocolMismatch(error.reason, peer=link.other.peer))
            raise link.broken(error) from None
        if link.by_reference and len(pieces) == 1 and _is_aligned(pieces[0]):
            payload = pieces[0]
        else:
            payload = slots.next_slot()[:num_bytes]
            start = 0
            for piece in pieces:
                payload[start : start + piece.shape[0]].copy_(piece)
                start += piece.shape[0]
        with link.changed:
            slots.arrived(seq, payload)
            link.changed.notify_all()


class _InprocInbox(Inbox):
    def __init__(self, link: InprocLink, slots: MailboxSlots) -> None:
        self.capacity_bytes = slots.capacity_bytes
        self._link = link
        self._slots = slots

    def wait(self, seq: int, deadline: float, *, num_bytes: int | None = None) -> torch.Tensor:
        link, slots = self._link, self._slots
        link.check()
        taken: list[torch.Tensor] = []

        def take() -> bool:
            try:
                payload = slots.take(seq, num_bytes)
            except ProtocolMismatch as error:
                raise link.broken(error) from None
            if payload is None:
                # Discarding may have made room for a sender.
                link.changed.notify_all()
                return False
            taken.append(payload)
            return True

        with link.changed:
            slots.end_view()
            link.changed.notify_all()
        link.until(take, f"did not post message {seq} of mailbox {slots.mailbox}", deadline)
        return taken[0]


def _is_aligned(piece: torch.Tensor) -> bool:
    return piece.data_ptr() % ALIGNMENT_BYTES == 0
