"""The receiver's memory of one mailbox: two slots, used in turn. Shared by the transports.

Not locked; the transport says which thread touches it when.
"""

from __future__ import annotations

import ctypes
from collections import deque

import torch

from lamina.errors import ProtocolMismatch

ALIGNMENT_BYTES = 64
_NUM_SLOTS = 2


def as_bytes(part: torch.Tensor) -> torch.Tensor:
    """A contiguous CPU tensor of any dtype as uint8 [num_bytes], without a copy."""
    assert part.is_contiguous(), "only contiguous tensors can be posted: call .contiguous() first"
    return part.detach().reshape(-1).view(torch.uint8)


def raw_memory(part: torch.Tensor) -> ctypes.Array[ctypes.c_char]:
    """The memory of a contiguous CPU tensor as a buffer; the caller keeps the tensor alive.

    The way through numpy knows no bfloat16 and takes six times as long.
    """
    assert part.is_contiguous(), "only contiguous tensors can be posted: call .contiguous() first"
    return (ctypes.c_char * part.nbytes).from_address(part.data_ptr())


class MailboxSlots:
    """Two slots of `capacity_bytes` and the messages that lie in them."""

    def __init__(self, mailbox: int, capacity_bytes: int, peer: str) -> None:
        self.mailbox = mailbox
        self.capacity_bytes = capacity_bytes
        self._peer = peer
        self._slots = [_aligned(capacity_bytes) for _ in range(_NUM_SLOTS)]
        self._memory = [memoryview(slot.numpy().data) for slot in self._slots]
        self._unread: deque[tuple[int, torch.Tensor]] = deque()
        self._num_arrived = 0
        self._last_seq = -1
        self._view_held = False

    @property
    def has_room(self) -> bool:
        """Whether one more message can be taken in without touching an unread or viewed one."""
        return len(self._unread) + self._view_held < _NUM_SLOTS

    def check_arrival(self, seq: int, num_bytes: int) -> None:
        """ProtocolMismatch unless the message may come now."""
        if num_bytes > self.capacity_bytes:
            raise ProtocolMismatch(
                f"message {seq} of mailbox {self.mailbox} has {num_bytes} bytes, more than the "
                f"mailbox's {self.capacity_bytes}; both sides must agree on the capacities",
                peer=self._peer,
            )
        if seq <= self._last_seq:
            raise ProtocolMismatch(
                f"mailbox {self.mailbox} got message {seq} after {self._last_seq}; numbers must "
                "increase",
                peer=self._peer,
            )

    def next_slot(self) -> torch.Tensor:
        """Where the next message goes, uint8 [capacity_bytes]. Needs `has_room`."""
        return self._slots[self._num_arrived % _NUM_SLOTS]

    def next_memory(self) -> memoryview:
        """`next_slot` as writable bytes."""
        return self._memory[self._num_arrived % _NUM_SLOTS]

    def arrived(self, seq: int, payload: torch.Tensor) -> None:
        """Record a complete message; `payload` is part of `next_slot`, or the sender's memory."""
        self._unread.append((seq, payload))
        self._num_arrived += 1
        self._last_seq = seq

    def end_view(self) -> None:
        """The view given out before may be overwritten from now on."""
        self._view_held = False

    def take(self, seq: int, num_bytes: int | None) -> torch.Tensor | None:
        """The payload of message `seq` if it is here, after discarding smaller numbers.

        Raises:
            ProtocolMismatch: it can no longer come, or has another length than `num_bytes`.
        """
        unread = self._unread
        while unread and unread[0][0] < seq:
            unread.popleft()
        if unread and unread[0][0] == seq:
            payload = unread.popleft()[1]
            if num_bytes is not None and payload.shape[0] != num_bytes:
                raise ProtocolMismatch(
                    f"message {seq} of mailbox {self.mailbox} has {payload.shape[0]} bytes, "
                    f"{num_bytes} were expected; do both sides run the same plan?",
                    peer=self._peer,
                )
            self._view_held = True
            return payload
        if seq <= self._last_seq:
            raise ProtocolMismatch(
                f"message {seq} of mailbox {self.mailbox} can no longer come, {self._last_seq} "
                "is already here; do both sides run the same plan?",
                peer=self._peer,
            )
        return None


def _aligned(num_bytes: int) -> torch.Tensor:
    memory = torch.empty(num_bytes + ALIGNMENT_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGNMENT_BYTES
    return memory[start : start + num_bytes]
