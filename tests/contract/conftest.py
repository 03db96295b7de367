"""The transports that the contract suite runs over, and links between their two ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lamina.transport.faulty import FaultyLink
from lamina.transport.handshake import Listener, connect
from lamina.transport.inproc import inproc_pair
from lamina.transport.mailbox import Inbox, Link, Outbox
from lamina.transport.native import NativeLink

SIZE = 4096
Pair = tuple[Link, Link]
NativePair = tuple[NativeLink, NativeLink]


def opened_pair(address: str) -> NativePair:
    secret, deadline = bytes(32), time.monotonic() + 10
    listener = Listener(address, name="a")
    try:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(connect, listener.address, secret, "print", "b", deadline)
            accepted = listener.accept({secret: ("b", "print")}, deadline)
            return accepted, future.result()
    finally:
        listener.close()


def shm_pair() -> NativePair:
    return opened_pair("unix:@")


def tcp_pair() -> NativePair:
    return opened_pair("127.0.0.1:0")


def faulty(make: Callable[[], NativePair]) -> Callable[[], Pair]:
    def pair() -> Pair:
        a, b = make()
        return FaultyLink(a), FaultyLink(b)

    return pair


TRANSPORTS: dict[str, Callable[[], Pair]] = {
    "inproc": lambda: inproc_pair("a", "b"),
    "shm": shm_pair,
    "tcp": tcp_pair,
    "faulty-shm": faulty(shm_pair),
    "faulty-tcp": faulty(tcp_pair),
}


@pytest.fixture(params=TRANSPORTS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    a, b = TRANSPORTS[request.param]()
    yield a, b
    a.close()
    b.close()


@pytest.fixture
def box(pair: Pair) -> tuple[Outbox, Inbox]:
    """Mailbox 1, from a to b."""
    a, b = pair
    return a.outbox(1, SIZE), b.inbox(1, SIZE)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor
