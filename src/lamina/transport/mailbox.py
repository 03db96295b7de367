"""The mailbox contract: the only way tensors cross a boundary.

A mailbox is a buffer of fixed capacity at the receiver plus a sequence number, written by the
sender: payload first, then the number. It keeps two messages (double buffering): the one whose view
the receiver holds and the next one, so that a sender never waits for the reader of the previous
message. A `Link` is the set of mailboxes between two peers over one connection.

Lifecycle: both ends open a link, prove themselves (transports that leave the process), then create
the same mailboxes by id and capacity; afterwards nothing is allocated. Messages of one link arrive
in the order in which they were posted, over all its mailboxes; a receiver waits for them in an
order that leaves at most one unread message in any mailbox other than the one it waits for (more
than that could never be received, and is a ProtocolMismatch or a DeadlineExceeded instead of a
hang).

Slots: the two slots of a mailbox are used in turn; while one is viewed, the other may be used
again. A slot is written again only when its message was discarded or its view has ended; a view
ends with the next `wait` on the same mailbox. While both slots are taken the receiver takes nothing
more from the connection, and the sender's `post` blocks once the connection's own buffers are full.

Sequence numbers of a mailbox strictly increase, gaps are fine. `wait(n)` discards messages with
smaller numbers (left over from a step that was given up).

Several links: a thread may wait for messages of several links at once (`native.wait_any`). The
order above holds within each link alone.

Errors: PeerLost when the other side closed, died or was declared lost with `fail`;
DeadlineExceeded when a wait passes its deadline; ProtocolMismatch when a message is larger than the
mailbox or of another length than asked for, when a number does not increase, when a number that can
no longer come is waited for (a greater one is there), or when bytes make no sense. After PeerLost
or ProtocolMismatch the link stays failed, on both sides: every later call raises the same error.
Messages that arrived before the peer was lost can still be taken, except after `fail` and `close`.
DeadlineExceeded from `wait` leaves the link usable; from `post` it fails the link (PeerLost),
because a part of the message may be on its way.

Threads: one thread posts and waits; `fail` and `close` may be called from any thread and wake it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class Outbox(ABC):
    """The sending end of a mailbox."""

    capacity_bytes: int

    @abstractmethod
    def has_room(self) -> bool:
        """Whether `post` would not wait for the receiver. Never blocks.

        Over tcp this end knows nothing of the receiver's slots: whether the system would take a
        small message.
        """

    @abstractmethod
    def post(self, seq: int, *parts: torch.Tensor, deadline: float) -> None:
        """Send the bytes of `parts`, one after the other, as message number `seq`.

        Args:
            seq: greater than every number posted before.
            parts: contiguous CPU tensors of any dtype; theirs again after the call.
            deadline: `time.monotonic()` after which the call gives up. Blocks only while the
                peer's buffers are full.
        """


class Inbox(ABC):
    """The receiving end of a mailbox."""

    capacity_bytes: int

    @abstractmethod
    def wait(self, seq: int, deadline: float, *, num_bytes: int | None = None) -> torch.Tensor:
        """Block until message number `seq` is here. Ends the validity of the view returned before.

        Args:
            num_bytes: the length that the payload must have; None: any. Another length is a
                ProtocolMismatch.
            deadline: `time.monotonic()` after which the call gives up; one in the past looks once.

        Returns:
            Its payload, uint8 [num_bytes], a view aligned to 64 bytes of memory that the mailbox
            owns; valid until the next `wait` on this mailbox. The caller reinterprets it with
            `.view(dtype)` and does not write to it.
        """


class Link(ABC):
    """All mailboxes between this process and one peer."""

    peer: str
    """The peer's name, for errors and metrics."""

    @abstractmethod
    def outbox(self, mailbox: int, capacity_bytes: int) -> Outbox:
        """Create the sending end of mailbox number `mailbox` (1 to 65535)."""

    @abstractmethod
    def inbox(self, mailbox: int, capacity_bytes: int) -> Inbox:
        """Create the receiving end of mailbox number `mailbox` and its memory.

        Raises:
            CapacityError: the system has not that much.
        """

    @abstractmethod
    def fail(self, reason: str) -> None:
        """Declare the peer lost: the present wait and all later calls raise PeerLost(reason)."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection. Idempotent. The peer sees PeerLost.

        The mailboxes' memory goes when nothing refers to link, mailboxes and views any more.
        """
