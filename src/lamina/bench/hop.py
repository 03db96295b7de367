"""Round trips per transport and payload size, in turns with a bare C ping-pong over TCP.

Each side is one thread on its own core: `shm`, `tcp` and the bare sockets between two processes,
`inproc` between two threads of this one. Both loops are native (`native/transport/hop.cpp`). With
mailboxes, the asking side copies the payload into the slot and the answering side copies it from
there into the answer's slot, so every payload is written twice and read twice. The bare ping-pong
sends and receives the same bytes from and into one buffer, with TCP_NODELAY on loopback; `bare`
waits exactly as the links do (looks, then yields the core), `bare-blocking` in blocking calls.
"""

from __future__ import annotations

import os
import secrets
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import msgspec

from lamina import _native
from lamina.errors import EngineDead
from lamina.transport.handshake import Listener, connect
from lamina.transport.inproc import inproc_pair
from lamina.transport.native import NativeInbox, NativeLink, NativeOutbox
from lamina.workers.process import WorkerProcess

BASELINE = "bare"
SUBJECTS = ("shm", "tcp", "inproc", BASELINE, "bare-blocking")
_ADDRESSES = {"shm": "unix:@", "tcp": "127.0.0.1:0"}
_QUESTIONS, _ANSWERS = 1, 2
_WARM_UP = 200
"""Round trips at the start of a turn that are not counted."""
_TIMEOUT_S = 300.0


class HopFigure(msgspec.Struct, frozen=True, kw_only=True):
    """Round trips of one subject with one payload size."""

    subject: str
    num_bytes: int
    num_round_trips: int
    median_us: float
    p99_us: float
    low_us: float
    high_us: float
    """Lowest and highest median of a turn."""
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    """Medians of a turn over those of the bare ping-pong beside it: median, lowest, highest."""


class _Turn(msgspec.Struct, frozen=True):
    """What both sides do next."""

    subject: str
    first_seq: int
    count: int
    num_bytes: int
    check: bool


class _Doors(msgspec.Struct, frozen=True):
    """Where the answering process connects."""

    links: dict[str, str]
    bare_port: int | None
    secret: bytes
    capacity_bytes: int
    core: int | None


def measure(
    subjects: Sequence[str],
    sizes: Sequence[int],
    *,
    round_trips: int,
    turns: int,
    cores: tuple[int, int] | None,
    check: bool,
    progress: Callable[[str], None] = lambda line: None,
) -> list[HopFigure]:
    """Measure all subjects in turns. Blocks until done; the calling thread is pinned meanwhile.

    Args:
        subjects: of `SUBJECTS`.
        sizes: payloads in bytes.
        round_trips: of each subject and size, over all turns.
        cores: of the asking and the answering side; None: wherever the system puts them.
        check: compare every byte of every message on both sides (not of the bare sockets), which
            makes the times longer.
        progress: is told of each size that is done.

    Raises:
        EngineDead: a message was lost, out of turn, or changed on the way; the reason says which.
    """
    count = max(1, round_trips // turns)
    times: dict[tuple[str, int], list[list[float]]] = {
        (subject, size): [] for size in sizes for subject in subjects
    }
    with _pinned(cores[0] if cores else None), ExitStack() as stack:
        players = _players(subjects, max(sizes), cores[1] if cores else None, stack)
        first_seq = 1
        for size in sizes:
            for _ in range(turns):
                for subject in subjects:
                    turn = _Turn(subject, first_seq, count + _WARM_UP, size, check)
                    try:
                        seconds = players[subject](turn)
                    except RuntimeError as error:
                        raise EngineDead(f"{subject}, {size} bytes: {error}") from error
                    times[subject, size].append(seconds[_WARM_UP:])
                first_seq += count + _WARM_UP
            progress(f"{size} bytes: done")
    return [_figure(subject, size, times) for size in sizes for subject in subjects]


def _figure(subject: str, size: int, times: dict[tuple[str, int], list[list[float]]]) -> HopFigure:
    own = times[subject, size]
    medians = [statistics.median(turn) for turn in own]
    everything = sorted(seconds for turn in own for seconds in turn)
    ratios: list[float] = []
    if (BASELINE, size) in times:
        bare = [statistics.median(turn) for turn in times[BASELINE, size]]
        ratios = [a / b for a, b in zip(medians, bare, strict=True)]
    return HopFigure(
        subject=subject,
        num_bytes=size,
        num_round_trips=len(everything),
        median_us=1e6 * statistics.median(everything),
        p99_us=1e6 * everything[len(everything) * 99 // 100],
        low_us=1e6 * min(medians),
        high_us=1e6 * max(medians),
        ratio=statistics.median(ratios) if ratios else None,
        ratio_low=min(ratios, default=None),
        ratio_high=max(ratios, default=None),
    )


def _players(
    subjects: Sequence[str], capacity_bytes: int, core: int | None, stack: ExitStack
) -> dict[str, Callable[[_Turn], list[float]]]:
    """For each subject what plays one turn of it; both sides stand ready until `stack` closes."""
    secret = secrets.token_bytes(32)
    listeners = {
        name: Listener(address) for name, address in _ADDRESSES.items() if name in subjects
    }
    for listener in listeners.values():
        stack.callback(listener.close)
    is_bare = any(subject.startswith(BASELINE) for subject in subjects)
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0))) if is_bare else None
    doors = _Doors(
        {name: listener.address for name, listener in listeners.items()},
        server.getsockname()[1] if server is not None else None,
        secret,
        capacity_bytes,
        core,
    )
    ours, theirs = Pipe()
    process = WorkerProcess("bench-hop", _answer, (doors, theirs))
    stack.callback(process.terminate)
    theirs.close()

    players: dict[str, Callable[[_Turn], list[float]]] = {}
    deadline = time.monotonic() + _TIMEOUT_S
    for name, listener in listeners.items():
        link = listener.accept({secret: ("answering side", name)}, deadline)
        stack.callback(link.close)
        players[name] = _asking(link, capacity_bytes, ours.send)
    if server is not None:
        server.settimeout(_TIMEOUT_S)
        connection = stack.enter_context(server.accept()[0])
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(True)

        def bare(turn: _Turn) -> list[float]:
            ours.send(turn)
            return _native.bare_ping(
                connection.fileno(), turn.count, turn.num_bytes, turn.subject == BASELINE
            )

        players |= {subject: bare for subject in subjects if subject.startswith(BASELINE)}
    if "inproc" in subjects:
        near, far = inproc_pair("asking side", "answering side")
        stack.callback(near.close)
        boxes = _boxes(far, capacity_bytes, _ANSWERS, _QUESTIONS)

        def start_thread(turn: _Turn) -> None:
            threading.Thread(target=_answer_turn, args=(*boxes, turn, core), daemon=True).start()

        players["inproc"] = _asking(near, capacity_bytes, start_thread)
    return players


def _boxes(
    link: NativeLink, capacity_bytes: int, outgoing: int, incoming: int
) -> tuple[NativeOutbox, NativeInbox]:
    return link.outbox(outgoing, capacity_bytes), link.inbox(incoming, capacity_bytes)


def _asking(
    link: NativeLink, capacity_bytes: int, start: Callable[[_Turn], None]
) -> Callable[[_Turn], list[float]]:
    """The asking side over a link; `start` sets the answering side going."""
    outbox, inbox = _boxes(link, capacity_bytes, _QUESTIONS, _ANSWERS)

    def ask(turn: _Turn) -> list[float]:
        start(turn)
        return _native.ping(
            outbox.native, inbox.native, turn.first_seq, turn.count, turn.num_bytes, turn.check,
            _TIMEOUT_S,
        )  # fmt: skip

    return ask


def _answer_turn(
    outbox: NativeOutbox, inbox: NativeInbox, turn: _Turn, core: int | None = None
) -> None:
    """The answering side over a link; in a thread of its own if there is a core for it."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    _native.pong(
        inbox.native, outbox.native, turn.first_seq, turn.count, turn.num_bytes, turn.check,
        _TIMEOUT_S,
    )  # fmt: skip


def _answer(doors: _Doors, commands: Connection) -> None:
    """The answering process."""
    if doors.core is not None:
        os.sched_setaffinity(0, {doors.core})
    deadline = time.monotonic() + _TIMEOUT_S
    boxes: dict[str, tuple[NativeOutbox, NativeInbox]] = {}
    with ExitStack() as stack:
        for name, address in doors.links.items():
            link = connect(address, doors.secret, name, "answering side", deadline)
            stack.callback(link.close)
            boxes[name] = _boxes(link, doors.capacity_bytes, _ANSWERS, _QUESTIONS)
        descriptor = -1
        if doors.bare_port is not None:
            connection = stack.enter_context(
                socket.create_connection(("127.0.0.1", doors.bare_port))
            )
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            descriptor = connection.fileno()
        while True:
            try:
                turn = commands.recv()
            except EOFError:
                return
            if turn.subject in boxes:
                _answer_turn(*boxes[turn.subject], turn)
            else:
                _native.bare_pong(descriptor, turn.count, turn.num_bytes, turn.subject == BASELINE)


@contextmanager
def _pinned(core: int | None) -> Iterator[None]:
    """Keep the calling thread on a core."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
