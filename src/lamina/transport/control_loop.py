"""A thread that owns a ZeroMQ socket: what both ends of the control channel have in common."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import zmq

logger = logging.getLogger(__name__)

_GOODBYE_LINGER_MS = 100
"""How long closing waits for the last messages to leave."""
MAX_MESSAGE_BYTES = 64 << 20


class ControlLoop(ABC):
    """Runs `_handle` for every message and `_tick` in every interval, on a daemon thread.

    Only that thread touches the ZeroMQ socket; other threads hand it calls. `_start` comes last in
    a constructor, `close` is idempotent and may be called from any other thread.
    """

    def __init__(self, kind: zmq.SocketType, interval_s: float) -> None:
        self._interval_s = interval_s
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(kind)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._monitor: zmq.Socket[bytes] | None = None
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._closing = False
        self._close_lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def _start(self, name: str) -> None:
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Say goodbye, end the thread and free the socket."""
        self._closing = True
        self._wake()
        if threading.current_thread() is self._thread:
            return  # it ends after this call
        with self._close_lock:
            if self._thread is not None:
                self._thread.join()
            else:
                self._free()

    def _call(self, call: Callable[[], None]) -> None:
        """Let the loop's thread run `call` soon; dropped when the loop has ended."""
        self._calls.put(call)
        self._wake()

    def _wake(self) -> None:
        # Full: it is awake already. Closed: the loop has ended.
        with contextlib.suppress(OSError):
            self._wake_writer.send(b"\0")

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        if self._monitor is not None:
            poller.register(self._monitor, zmq.POLLIN)
        next_tick = last_tick = time.monotonic()
        try:
            while not self._closing:
                events = dict(poller.poll(math.ceil(max(0.0, next_tick - time.monotonic()) * 1000)))
                if self._wake_reader.fileno() in events:
                    self._drain_wakes()
                self._run_calls()
                if self._monitor is not None and self._monitor in events:
                    self._handle_monitor(self._monitor)
                # Everything that has come is read before anybody's silence is judged.
                while (frames := self._receive()) is not None:
                    self._handle(frames)
                now = time.monotonic()
                if now >= next_tick:
                    self._tick(now, max(0.0, now - last_tick - self._interval_s))
                    last_tick, next_tick = now, now + self._interval_s
            self._run_calls()
            self._goodbye()
        finally:
            self._free()

    def _free(self) -> None:
        if self._socket.closed:
            return
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
        self._socket.close(linger=_GOODBYE_LINGER_MS)
        self._context.term()
        self._wake_reader.close()
        self._wake_writer.close()

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_reader.recv(4096):
                pass

    def _run_calls(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()()

    def _receive(self) -> list[bytes] | None:
        try:
            return self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def _transmit(self, frames: list[bytes]) -> bool:
        """Hand a message to ZeroMQ, never blocks; False: the peer is gone or takes no more."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _notify(self, callback: Callable[..., None], *arguments: str) -> None:
        """Call back into the owner's code; its errors must not end the loop."""
        try:
            callback(*arguments)
        except Exception:
            logger.exception("a callback of the control channel failed")

    def _handle_monitor(self, monitor: zmq.Socket[bytes]) -> None:
        """Read an event of the connection from `monitor`; for those who set `_monitor`."""
        raise NotImplementedError

    @abstractmethod
    def _handle(self, frames: list[bytes]) -> None:
        """A message came."""

    @abstractmethod
    def _tick(self, now: float, late_s: float) -> None:
        """An interval is over; this thread came `late_s` too late to notice."""

    @abstractmethod
    def _goodbye(self) -> None:
        """The last messages before the socket is closed."""
