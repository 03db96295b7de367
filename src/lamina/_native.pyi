"""Lamina's native data plane (C++ in `native/`)."""

from collections.abc import Callable, Sequence

from torch import Tensor

# --- core ---

def active_isa() -> str:
    """The instruction set level in use: portable, avx2, avx512 or avx512bf16.

    The environment variable LAMINA_ISA forces one. Raises ValueError if the machine lacks it.
    """

def available_isas() -> list[str]:
    """Levels that this machine can run, lowest first."""

class ThreadPool:
    """Threads that run native jobs together with the calling thread. Share one per process."""

    def __init__(self, num_threads: int, cores: list[int] = ...) -> None:
        """`cores`: pin thread i to cores[i] (thread 0 is the caller, which is not pinned)."""

    @property
    def num_threads(self) -> int: ...

# --- transport ---

PACER_YIELD_S: float
"""Seconds that a wait yields the core before it sleeps."""

class Outbox:
    """The sending end of a native mailbox. Belongs to its link, which must outlive it."""

    @property
    def capacity_bytes(self) -> int: ...
    def post(self, seq: int, deadline: float, *parts: int) -> None:
        """Send memory. `parts`: address and length of each part in turn, at most 16 parts.

        Blocks and raises as `lamina.transport.mailbox.Outbox.post`.
        """

class Inbox:
    """The receiving end of a native mailbox. Belongs to its link, which must outlive it."""

    @property
    def capacity_bytes(self) -> int: ...
    def wait(self, seq: int, deadline: float, num_bytes: int | None) -> tuple[int, int]:
        """The slot (0 or 1) that message `seq` lies in, and its length.

        Blocks and raises as `lamina.transport.mailbox.Inbox.wait`.
        """

    def slot(self, index: int) -> Tensor:
        """The memory of a slot: uint8 [capacity_bytes], aligned to 64 bytes, kept alive by it."""

class Link:
    """A link of any native transport. Errors as `lamina.transport.mailbox.Link`."""

    @property
    def peer(self) -> str: ...
    def outbox(self, mailbox: int, capacity_bytes: int) -> Outbox: ...
    def inbox(self, mailbox: int, capacity_bytes: int) -> Inbox: ...
    def wait_any(self, awaited: Sequence[tuple[Inbox, int]], deadline: float) -> int: ...
    def fail(self, reason: str) -> None: ...
    def close(self) -> None: ...

class InprocLink(Link):
    """One end of a link within this process; made by `inproc_pair`."""

class ShmLink(Link):
    """A link between two processes of this machine."""

    def __init__(self, fd: int, peer: str, yield_s: float) -> None:
        """Takes over `fd`, a connected Unix stream socket.

        `yield_s`: how long a wait yields the core before it sleeps.
        """

class TcpLink(Link):
    """A link over a stream socket."""

    def __init__(self, fd: int, peer: str, version: int, busy_poll_s: float) -> None:
        """Takes over `fd`, a connected stream socket; `version` is that of the protocol.

        `busy_poll_s`: how long a wait looks and yields the core before it sleeps.
        """

class FaultyLink(Link):
    """Another link with the faults of `lamina.transport.faulty`."""

    def __init__(self, link: Link) -> None: ...
    def inject(
        self, kind: str, mailbox: int | None, after: int, count: int | None, delay_s: float
    ) -> None: ...
    def clear(self) -> None: ...

def inproc_pair(
    name_a: str, name_b: str, pump_b: Callable[[], None] | None
) -> tuple[InprocLink, InprocLink]:
    """As `lamina.transport.inproc.inproc_pair`."""

def ping(
    outbox: Outbox,
    inbox: Inbox,
    first_seq: int,
    count: int,
    num_bytes: int,
    check: bool,
    timeout_s: float,
) -> list[float]:
    """Send `count` messages one by one, each after the answer to the one before.

    `check` compares every byte of every answer (RuntimeError: it arrived changed), `timeout_s` is
    the deadline of each round trip. Returns the seconds that each took.
    """

def pong(
    inbox: Inbox,
    outbox: Outbox,
    first_seq: int,
    count: int,
    num_bytes: int,
    check: bool,
    timeout_s: float,
) -> None:
    """The other side of `ping`: answers each message with its own bytes."""

def bare_ping(fd: int, count: int, num_bytes: int, yields: bool) -> list[float]:
    """As `ping` over a connected socket in blocking mode without mailboxes.

    `yields`: wait as the links do; otherwise in blocking calls. An empty message is one byte.
    """

def bare_pong(fd: int, count: int, num_bytes: int, yields: bool) -> None:
    """The other side of `bare_ping`."""

# --- attention ---

# --- worker ---

# --- dense ---
