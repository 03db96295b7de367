"""What a worker does when it fails: tell the engine whose fault it is, and stay until told to stop.

Its links stay open meanwhile, so that nobody else takes their end for the cause.
"""

from __future__ import annotations

import contextlib
import time

from lamina.errors import DeadlineExceeded, PeerLost
from lamina.transport.control_client import ControlClient
from lamina.transport.rank_wire import LostPeer
from lamina.transport.wire import ShutdownWorker, WorkerError

ENGINE = "engine"
"""What workers call the engine."""
_STOP_GRACE_S = 0.25
"""All workers are told to stop at the same time, but one is the first to close its links."""


def was_told_to_stop(control: ControlClient) -> bool:
    """Whether the engine says stop, waiting a moment for it."""
    deadline = time.monotonic() + _STOP_GRACE_S
    with contextlib.suppress(DeadlineExceeded, PeerLost):
        while True:
            if isinstance(control.receive(deadline).message, ShutdownWorker):
                return True
    return False


def tell_and_wait(control: ControlClient, error: Exception) -> None:
    """Tell the engine what failed; returns when it says stop or is gone.

    If the engine ended a link, it knows why: somebody else is lost, or it is about to stop.
    """
    if control.engine_lost is not None:
        return
    if isinstance(error, PeerLost | DeadlineExceeded) and error.peer != ENGINE:
        control.send(LostPeer(error.peer, error.reason))
    elif not isinstance(error, PeerLost):
        control.send(WorkerError(type(error).__name__, str(error)))
    while control.engine_lost is None and not was_told_to_stop(control):
        pass
