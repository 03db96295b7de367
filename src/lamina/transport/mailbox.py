"""The mailbox contract: the only way tensors cross a boundary.

A mailbox is a buffer of fixed capacity at the receiver plus a sequence number, written by the
sender: payload first, then the number. It keeps the last two messages (double buffering), so that
a sender never waits for the reader of the previous one. A `Link` is the set of mailboxes between
two peers over one connection.

Lifecycle: both ends open a link, prove themselves (transports that leave the process), then create
the same mailboxes by id and capacity; afterwards nothing is allocated. Messages of one link arrive in
the order in which they were posted, over all its mailboxes.

Sequence numbers of a mailbox strictly increase, gaps are fine. `wait(n)` discards messages with
smaller numbers (left over from a step that was given up).

Errors: PeerLost when the other side closed, died or was declared lost with `fail`;
DeadlineExceeded when a wait passes its deadline; ProtocolMismatch when a message is larger than the
mailbox, when a number that can no longer come is waited for (a greater one is there), or when
bytes make no sense. After PeerLost or ProtocolMismatch the link stays failed: every later call
raises the same error. DeadlineExceeded leaves the link usable.

Threads: one thread posts and waits; `fail` and `close` may be called from any thread and wake it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class Outbox(ABC):
    """The sending end of a mailbox."""

    capacity_bytes: int

    @abstractmethod
    def post(self, seq: int, *parts: torch.Tensor, deadline: float) -> None:
        """Send the bytes of `parts`, one after the other, as message number `seq`.

        Args:
            seq: greater than every number posted before.
            parts: contiguous CPU tensors of any dtype; free to reuse when the call returns.
            deadline: `time.monotonic()` after which the call gives up. Blocks only while the
                peer's buffers are full.
        """


class Inbox(ABC):
    """The receiving end of a mailbox."""

    capacity_bytes: int

    @abstractmethod
    def wait(self, seq: int, deadline: float) -> torch.Tensor:
        """Block until message number `seq` is here.

        Returns:
            Its payload, uint8 [num_bytes], a view of the mailbox's memory aligned to 64 bytes; valid
            until the message after the next one arrives. The caller reinterprets it with `.view(dtype)`.
        """


class Link(ABC):
    """All mailboxes between this process and one peer."""

    peer: str
    """The peer's name, for errors and metrics."""

    @abstractmethod
    def outbox(self, mailbox: int, capacity_bytes: int) -> Outbox:
        """Create the sending end of mailbox number `mailbox`."""

    @abstractmethod
    def inbox(self, mailbox: int, capacity_bytes: int) -> Inbox:
        """Create the receiving end of mailbox number `mailbox` and its memory."""

    @abstractmethod
    def fail(self, reason: str) -> None:
        """Declare the peer lost: the present wait and all later calls raise PeerLost(reason)."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection and free the mailboxes. Idempotent. The peer sees PeerLost."""
