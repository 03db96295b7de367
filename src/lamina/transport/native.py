"""Links whose data plane is native (C++ in `native/transport/`), as `mailbox.py` wants them.

The interpreter is not needed while a call waits; signals are handled between two looks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lamina import _native
from lamina.errors import CapacityError
from lamina.transport.mailbox import Inbox, Link, Outbox


class NativeLink(Link):
    """A link of any native transport."""

    def __init__(self, native: _native.Link) -> None:
        self.native = native
        """The C++ link, for other native code."""
        self.peer = native.peer

    def outbox(self, mailbox: int, capacity_bytes: int) -> NativeOutbox:
        try:
            return NativeOutbox(self, self.native.outbox(mailbox, capacity_bytes))
        except RuntimeError as error:
            raise CapacityError(str(error)) from error

    def inbox(self, mailbox: int, capacity_bytes: int) -> NativeInbox:
        try:
            return NativeInbox(self, self.native.inbox(mailbox, capacity_bytes))
        except RuntimeError as error:
            raise CapacityError(str(error)) from error

    def fail(self, reason: str) -> None:
        self.native.fail(reason)

    def close(self) -> None:
        self.native.close()


class NativeOutbox(Outbox):
    """Copies what is posted straight into the slot (shm, inproc) or the send buffer (tcp)."""

    def __init__(self, link: NativeLink, native: _native.Outbox) -> None:
        self._link = link  # `native` is a part of it
        self.native = native
        self.capacity_bytes = native.capacity_bytes

    def has_room(self) -> bool:
        return self.native.has_room()

    def post(self, seq: int, *parts: torch.Tensor, deadline: float) -> None:
        pieces = []
        for part in parts:
            assert part.is_contiguous(), "only contiguous tensors can be posted: .contiguous()"
            pieces += [part.data_ptr(), part.nbytes]
        self.native.post(seq, deadline, *pieces)


class NativeInbox(Inbox):
    """Gives out views of the slots, made once."""

    def __init__(self, link: NativeLink, native: _native.Inbox) -> None:
        self._link = link  # `native` is a part of it
        self.native = native
        self.capacity_bytes = native.capacity_bytes
        self._slots = [native.slot(index) for index in (0, 1)]
        self._views = list(self._slots)
        """The last view given out of each slot: messages mostly have the same length."""

    def wait(self, seq: int, deadline: float, *, num_bytes: int | None = None) -> torch.Tensor:
        index, size = self.native.wait(seq, deadline, num_bytes)
        view = self._views[index]
        if view.shape[0] != size:
            view = self._views[index] = self._slots[index][:size]
        return view


def wait_any(awaited: Sequence[tuple[Inbox, int]], deadline: float) -> int:
    """Block until `wait` for one of these messages would return or fail at once.

    Takes nothing and ends no view; messages with smaller numbers may be discarded. Meanwhile up to
    two messages may lie unread in any mailbox.

    Args:
        awaited: inboxes, of one or several links, with the number of the message wanted of each. An
            end of a link whose other end it pumps can only be waited for alone.
        deadline: `time.monotonic()` after which the call gives up.

    Returns:
        The index of the first such, in the order given.

    Raises:
        PeerLost: of any of the links, before such a message came. Otherwise as `Inbox.wait`.
    """
    boxes = []
    for inbox, seq in awaited:
        assert isinstance(inbox, NativeInbox), "an inbox of a native link"
        boxes.append((inbox.native, seq))
    return _native.wait_any(boxes, deadline)
