"""The test double among the transports: wraps a link and does what networks and crashes do.

Faults concern what this end posts, and can be injected and cleared while the link runs:

    delay      the message is posted `delay_s` later
               the peer's wait takes longer, or ends in DeadlineExceeded
    drop       the message is not posted
               the peer's wait ends in DeadlineExceeded, in ProtocolMismatch once a later one comes
    reorder    the message changes places with the next one that this end posts
               ProtocolMismatch if both are of one mailbox, harmless otherwise
    truncate   only the first half is posted
               ProtocolMismatch in a wait with `num_bytes`
    close      the connection is closed instead
               PeerLost on both ends
    kill       this process kills itself with SIGKILL
               PeerLost at the peer
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Literal

import torch

from lamina.transport.mailbox import Inbox, Link, Outbox
from lamina.transport.slots import as_bytes

FaultKind = Literal["delay", "drop", "reorder", "truncate", "close", "kill"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to which of the messages that are posted from now on."""

    kind: FaultKind
    mailbox: int | None = None
    """Only messages of this mailbox; None: of all."""
    after: int = 0
    """Messages to let through first."""
    count: int | None = None
    """Messages to affect then; None: all."""
    delay_s: float = 0.0


class FaultyLink(Link):
    """A link with faults on its sending side; without any it behaves like the link it wraps."""

    def __init__(self, link: Link, *faults: Fault) -> None:
        self.peer = link.peer
        self._link = link
        self._lock = threading.Lock()
        self._faults: list[_Counted] = []
        self._held: tuple[Outbox, int, torch.Tensor] | None = None
        for fault in faults:
            self.inject(fault)

    def inject(self, fault: Fault) -> None:
        """Let `fault` happen from now on. Of several that apply to a message the first counts."""
        with self._lock:
            self._faults.append(_Counted(fault))

    def clear(self) -> None:
        """End all faults. A message that `reorder` holds back goes out after the next one."""
        with self._lock:
            self._faults.clear()

    def outbox(self, mailbox: int, capacity_bytes: int) -> Outbox:
        return _FaultyOutbox(self, self._link.outbox(mailbox, capacity_bytes), mailbox)

    def inbox(self, mailbox: int, capacity_bytes: int) -> Inbox:
        return self._link.inbox(mailbox, capacity_bytes)

    def fail(self, reason: str) -> None:
        self._link.fail(reason)

    def close(self) -> None:
        self._link.close()

    def post(
        self,
        outbox: Outbox,
        mailbox: int,
        seq: int,
        parts: tuple[torch.Tensor, ...],
        deadline: float,
    ) -> None:
        """`Outbox.post`, with whatever fault is due."""
        fault = self._due(mailbox)
        match fault.kind if fault is not None else None:
            case "drop":
                return
            case "reorder" if self._held is None:
                self._held = (outbox, seq, _joined(parts))
                return
            case "truncate":
                whole = _joined(parts)
                parts = (whole[: whole.shape[0] // 2],)
            case "close":
                self._link.close()
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "delay":
                assert fault is not None, "it has a kind"
                time.sleep(fault.delay_s)
        outbox.post(seq, *parts, deadline=deadline)
        if self._held is not None:
            held_outbox, held_seq, payload = self._held
            self._held = None
            held_outbox.post(held_seq, payload, deadline=deadline)

    def _due(self, mailbox: int) -> Fault | None:
        with self._lock:
            matching = [c for c in self._faults if c.fault.mailbox in (None, mailbox)]
            due = [counted.fault for counted in matching if counted.count_message()]
            return due[0] if due else None


class _Counted:
    """A fault and how many messages of its mailbox were posted since it was injected."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self._num_seen = 0

    def count_message(self) -> bool:
        """Whether the fault affects the message that is posted now."""
        position = self._num_seen - self.fault.after
        self._num_seen += 1
        return position >= 0 and (self.fault.count is None or position < self.fault.count)


class _FaultyOutbox(Outbox):
    def __init__(self, link: FaultyLink, outbox: Outbox, mailbox: int) -> None:
        self.capacity_bytes = outbox.capacity_bytes
        self._link = link
        self._outbox = outbox
        self._mailbox = mailbox

    def post(self, seq: int, *parts: torch.Tensor, deadline: float) -> None:
        self._link.post(self._outbox, self._mailbox, seq, parts, deadline)


def _joined(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A copy of all bytes, uint8 [num_bytes]."""
    return torch.cat([torch.empty(0, dtype=torch.uint8), *(as_bytes(part) for part in parts)])
