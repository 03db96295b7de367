"""The test double among the transports: wraps a link and does what networks and crashes do.

Faults concern what this end posts, and can be injected and cleared while the link runs, from any
thread:

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

The faults happen in native code (`native/transport/faulty.cpp`), so they reach native users of the
link as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lamina import _native
from lamina.transport.native import NativeLink

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


class FaultyLink(NativeLink):
    """A link with faults on its sending side; without any it behaves like the link it wraps."""

    def __init__(self, link: NativeLink, *faults: Fault) -> None:
        self._faulty = _native.FaultyLink(link.native)
        super().__init__(self._faulty)
        for fault in faults:
            self.inject(fault)

    def inject(self, fault: Fault) -> None:
        """Let `fault` happen from now on. Of several that apply to a message the first counts."""
        self._faulty.inject(fault.kind, fault.mailbox, fault.after, fault.count, fault.delay_s)

    def clear(self) -> None:
        """End all faults. A message that `reorder` holds back goes out after the next one."""
        self._faulty.clear()
