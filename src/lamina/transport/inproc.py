"""The transport inside one process: a hand-over between two threads, or a function call.

Messages are copied into the receiver's slots, as between processes. With a *pump* (the monolithic
deployment) both ends live in one thread: where one end would wait for the other, it calls the pump,
which runs the other end until it needs more input.
"""

from __future__ import annotations

from collections.abc import Callable

from lamina import _native
from lamina.transport.native import NativeLink


def inproc_pair(
    name_a: str, name_b: str, pump_b: Callable[[], None] | None = None
) -> tuple[NativeLink, NativeLink]:
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
    first, second = _native.inproc_pair(name_a, name_b, pump_b)
    return NativeLink(first), NativeLink(second)
