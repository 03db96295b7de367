"""One end of a tcp link: frames of `wire.py` over a connected socket. Opened by `tcp.py`.

No thread of its own: `wait` reads frames from the socket straight into the slots of whatever
mailbox they belong to, until the wanted one is complete. `post` writes header and tensors with one
scatter call; while the socket takes no more it reads incoming frames into free slots, so that two
peers that post large messages to each other at the same time both get through.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import threading
import time
from typing import Any

import torch

from lamina.errors import DeadlineExceeded, PeerLost, ProtocolMismatch, TransportError
from lamina.transport.failure import Failure
from lamina.transport.mailbox import Inbox, Link, Outbox
from lamina.transport.slots import MailboxSlots, raw_memory
from lamina.transport.wire import FRAME_BYTES, FrameHeader, pack_frame_header, unpack_frame_header


class TcpLink(Link):
    """A link over one connected and authenticated socket; made by `TcpListener` and `connect`."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        """Takes over `connection`."""
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = peer
        self._socket = connection
        self._failure = Failure()
        # Held while the socket is in use, so that `close` frees its descriptor only afterwards.
        self._in_use = threading.RLock()
        self._readable = _poller(connection, select.POLLIN)
        self._writable = _poller(connection, select.POLLOUT)
        self._either = _poller(connection, select.POLLIN | select.POLLOUT)
        self._boxes: dict[int, MailboxSlots] = {}
        self._head = memoryview(bytearray(FRAME_BYTES))
        self._num_got = 0
        """Bytes of the current frame's header, or of its payload once `_frame` is set."""
        self._frame: FrameHeader | None = None
        """Header of the frame that is being received."""
        self._target: memoryview | None = None
        """Where its payload goes; None until its mailbox has room."""

    def outbox(self, mailbox: int, capacity_bytes: int) -> Outbox:
        return _TcpOutbox(self, mailbox, capacity_bytes)

    def inbox(self, mailbox: int, capacity_bytes: int) -> Inbox:
        assert mailbox not in self._boxes, f"mailbox {mailbox} exists already"
        slots = self._boxes[mailbox] = MailboxSlots(mailbox, capacity_bytes, self.peer)
        return _TcpInbox(self, slots)

    def fail(self, reason: str) -> None:
        self.broken(PeerLost(reason, peer=self.peer))

    def close(self) -> None:
        self.fail("this end of the link is closed")
        with self._in_use:
            self._socket.close()
            self._boxes.clear()

    def post(self, buffers: list[Any], deadline: float) -> None:
        """Send a frame, header and payload; `Outbox.post` without the checks."""
        with self._in_use:
            self._failure.check()
            num_left = sum(map(len, buffers)) - self._send(buffers)
            if num_left:
                try:
                    self._post_rest(buffers, num_left, deadline)
                except ProtocolMismatch as error:
                    raise self.broken(error) from None

    def wait(
        self, slots: MailboxSlots, seq: int, deadline: float, num_bytes: int | None
    ) -> torch.Tensor:
        """`Inbox.wait` of the mailbox that `slots` belongs to."""
        with self._in_use:
            self._failure.check()
            slots.end_view()
            try:
                while (payload := slots.take(seq, num_bytes)) is None:
                    if self._frame is not None and self._target is None:
                        if not self._find_room():
                            raise self._stuck(self._frame, slots.mailbox)
                    elif not self._readable.poll(poll_ms(deadline)):
                        if time.monotonic() < deadline:
                            continue
                        raise DeadlineExceeded(
                            f"did not post message {seq} of mailbox {slots.mailbox} in time",
                            peer=self.peer,
                        )
                    self._failure.check()
                    self._receive()
            except ProtocolMismatch as error:
                raise self.broken(error) from None
            return payload

    def _post_rest(self, buffers: list[Any], num_left: int, deadline: float) -> None:
        """Send the last `num_left` bytes of `buffers` to a socket that is full."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        while num_left:
            self._wait_until_writable(deadline)
            skip = sum(map(len, views)) - num_left
            unsent = []
            for view in views:
                unsent.append(view[skip:])
                skip = max(0, skip - len(view))
            num_left -= self._send([view for view in unsent if len(view)])

    def _wait_until_writable(self, deadline: float) -> None:
        """Read incoming frames, as long as there is room for them, until the socket takes bytes."""
        while True:
            poller = self._either if self._can_receive() else self._writable
            events = poller.poll(poll_ms(deadline))
            self._failure.check()
            if not events and time.monotonic() >= deadline:
                message = "did not take a message in time"
                self.broken(PeerLost(message, peer=self.peer))
                raise DeadlineExceeded(message, peer=self.peer)
            flags = events[0][1] if events else 0
            if flags & ~select.POLLIN:
                return  # room to send, or an error that sending will report
            if flags:
                self._receive()

    def _can_receive(self) -> bool:
        """Whether what the connection holds next has a place."""
        return self._frame is None or self._target is not None or self._find_room()

    def _receive(self) -> None:
        """Read until a frame is complete, or there are no bytes or no room for them."""
        if self._frame is None:
            if not self._read_into(self._head):
                return
            self._frame = unpack_frame_header(self._head, self.peer)
            self._num_got = 0
        if self._target is None and not self._find_room():
            return
        frame, target = self._frame, self._target
        assert target is not None, "_find_room sets it"
        if not self._read_into(target):
            return
        slots = self._boxes[frame.mailbox]
        slots.arrived(frame.seq, slots.next_slot()[: frame.num_bytes])
        self._frame = self._target = None
        self._num_got = 0

    def _find_room(self) -> bool:
        """Set the place of the frame's payload, if its mailbox exists and has a free slot."""
        assert self._frame is not None, "only for a frame whose header is here"
        mailbox, seq, num_bytes = self._frame
        slots = self._boxes.get(mailbox)
        if slots is None or not slots.has_room:
            return False
        slots.check_arrival(seq, num_bytes)
        self._target = slots.next_memory()[:num_bytes]
        return True

    def _read_into(self, target: memoryview) -> bool:
        """Read towards `len(target)` bytes; True when all are there, False when none are left."""
        while self._num_got < len(target):
            try:
                count = self._socket.recv_into(target[self._num_got :])
            except BlockingIOError:
                return False
            except OSError as error:
                self._failure.check()
                raise self.broken(_lost(error, self.peer)) from None
            if count == 0:
                self._failure.check()
                raise self.broken(PeerLost("closed the connection", peer=self.peer))
            self._num_got += count
        return True

    def _send(self, buffers: list[Any]) -> int:
        try:
            return self._socket.sendmsg(buffers)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._failure.check()
            raise self.broken(_lost(error, self.peer)) from None

    def _stuck(self, frame: FrameHeader, mailbox: int) -> ProtocolMismatch:
        if frame.mailbox not in self._boxes:
            return ProtocolMismatch(
                f"posted to mailbox {frame.mailbox}, which this side does not have", peer=self.peer
            )
        return ProtocolMismatch(
            f"message {frame.seq} of mailbox {frame.mailbox} is in front of what mailbox {mailbox} "
            "waits for, and two messages before it are still unread",
            peer=self.peer,
        )

    def broken(self, error: TransportError) -> TransportError:
        """Fail the link with `error`; for `raise link.broken(error)`.

        Ends the connection, which wakes this side's thread and the peer.
        """
        if self._failure.set(error):
            with contextlib.suppress(OSError):  # the peer may have been faster
                self._socket.shutdown(socket.SHUT_RDWR)
        return error


class _TcpOutbox(Outbox):
    def __init__(self, link: TcpLink, mailbox: int, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._link = link
        self._mailbox = mailbox

    def post(self, seq: int, *parts: torch.Tensor, deadline: float) -> None:
        pieces = [raw_memory(part) for part in parts]
        num_bytes = sum(map(len, pieces))
        if num_bytes > self.capacity_bytes:
            raise self._link.broken(
                ProtocolMismatch(
                    f"message {seq} has {num_bytes} bytes, more than the {self.capacity_bytes} of "
                    f"mailbox {self._mailbox}",
                    peer=self._link.peer,
                )
            )
        self._link.post([pack_frame_header(self._mailbox, seq, num_bytes), *pieces], deadline)


class _TcpInbox(Inbox):
    def __init__(self, link: TcpLink, slots: MailboxSlots) -> None:
        self.capacity_bytes = slots.capacity_bytes
        self._link = link
        self._slots = slots

    def wait(self, seq: int, deadline: float, *, num_bytes: int | None = None) -> torch.Tensor:
        return self._link.wait(self._slots, seq, deadline, num_bytes)


def _poller(connection: socket.socket, events: int) -> select.poll:
    poller = select.poll()
    poller.register(connection.fileno(), events)
    return poller


def poll_ms(deadline: float) -> int:
    """Milliseconds until `deadline`, rounded up, for `poll`; 0 when it has passed."""
    return max(0, math.ceil((deadline - time.monotonic()) * 1000))


def _lost(error: OSError, peer: str) -> PeerLost:
    return PeerLost(f"the connection broke: {error.strerror or error}", peer=peer)
