"""A worker's end of the control channel: join, receive requests, answer, notice a lost engine."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from lamina.errors import (
    DeadlineExceeded,
    LaminaError,
    PeerLost,
    ProtocolMismatch,
    TransportError,
)
from lamina.transport.control_loop import ControlLoop
from lamina.transport.join_token import JoinToken
from lamina.transport.wire import (
    ControlMessage,
    Goodbye,
    Heartbeat,
    Join,
    Joined,
    JoinRequest,
    Refused,
    format_address,
    pack_control,
    parse_address,
    unpack_control,
)

_JOIN_INTERVAL_S = 0.1
_ENGINE = "engine"


class Incoming(NamedTuple):
    """A message of the engine."""

    message: ControlMessage
    request: int
    """Its number, for `ControlClient.reply`; 0 when no answer is expected."""


class ControlClient(ControlLoop):
    """A worker's control socket and its thread. All methods may be called from any thread."""

    def __init__(
        self,
        address: str,
        token: JoinToken,
        join: Join,
        *,
        deadline: float,
        on_engine_lost: Callable[[str], None] | None = None,
    ) -> None:
        """Join; blocks until the engine has answered. An engine that is not up yet is waited for.

        Args:
            address: host:port of the engine's `ControlServer`.
            deadline: `time.monotonic()` after which joining is given up.
            on_engine_lost: called once with the reason when the engine says goodbye or falls
                silent, from the control thread; it must not block. Not called by `close`.

        Raises:
            ConfigError: the address is malformed.
            ProtocolMismatch: the engine refused, or the token is not its own; says what to do.
            DeadlineExceeded: no answer in time.
        """
        host, port = parse_address(address)
        super().__init__(zmq.DEALER, _JOIN_INTERVAL_S)
        self.name = join.name
        """As the engine calls this worker."""
        self._address = address
        self._on_engine_lost = on_engine_lost
        self._heartbeat_timeout_s: float | None = None
        self._last_heard = time.monotonic()
        self._changed = threading.Condition()
        self._inbox: deque[Incoming] = deque()
        self._joined = False
        self._handshaken = False
        self._engine_lost: TransportError | None = None
        try:
            self._connect(host, port, token)
            self._start("lamina-control-client")
            self._call(lambda: self._send_now(JoinRequest(token.secret, join), 0))
            self._wait_until_joined(deadline)
        except LaminaError:
            self.close()
            raise

    @property
    def engine_lost(self) -> str | None:
        """Why the engine is lost; None while it is alive."""
        error = self._engine_lost
        return error.reason if error is not None else None

    def receive(self, deadline: float) -> Incoming:
        """The engine's next message, heartbeats aside.

        Raises:
            PeerLost: the engine is lost, and all its messages have been received.
            DeadlineExceeded: none came in time.
        """
        with self._changed:
            while not self._inbox:
                if self._engine_lost is not None:
                    raise PeerLost(self._engine_lost.reason, peer=_ENGINE)
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    raise DeadlineExceeded("sent no control message in time", peer=_ENGINE)
                self._changed.wait(remaining_s)
            return self._inbox.popleft()

    def reply(self, incoming: Incoming, message: ControlMessage) -> None:
        """Answer a request. Does not block."""
        assert incoming.request, f"{type(incoming.message).__name__} expects no answer"
        self._call(lambda: self._send_now(message, incoming.request))

    def send(self, message: ControlMessage) -> None:
        """Send a message that has no answer: WorkerError or Goodbye. Does not block."""
        self._call(lambda: self._send_now(message, 0))

    def _connect(self, host: str, port: int, token: JoinToken) -> None:
        public_key, secret_key = zmq.curve_keypair()
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        self._socket.curve_serverkey = token.server_public_key.encode()
        self._socket.curve_publickey = public_key
        self._socket.curve_secretkey = secret_key
        # An engine with another key hangs up without a word; only the monitor tells.
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_CONNECTED
            | zmq.EVENT_DISCONNECTED
            | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        self._socket.connect(f"tcp://{format_address(host, port)}")

    def _wait_until_joined(self, deadline: float) -> None:
        with self._changed:
            while not self._joined:
                if self._engine_lost is not None:
                    error = self._engine_lost
                    raise type(error)(error.reason, peer=f"engine at {self._address}")
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    raise DeadlineExceeded(
                        "did not answer in time; is it running, and is the address right?",
                        peer=f"engine at {self._address}",
                    )
                self._changed.wait(remaining_s)

    def _send_now(self, message: ControlMessage, request: int) -> None:
        self._transmit([pack_control(message, request)])

    def _handle(self, frames: list[bytes]) -> None:
        self._last_heard = time.monotonic()
        try:
            envelope = unpack_control(frames[-1], _ENGINE)
        except ProtocolMismatch as error:
            self._lose(error)
            return
        match envelope.message:
            case Heartbeat():
                pass
            case Joined(name=name, heartbeat_interval_s=interval_s, heartbeat_timeout_s=timeout_s):
                self._interval_s, self._heartbeat_timeout_s = interval_s, timeout_s
                with self._changed:
                    self.name = name
                    self._joined = True
                    self._changed.notify_all()
            case Refused(reason):
                remedy = "copy the token file that the running engine wrote, if it is the token"
                self._lose(ProtocolMismatch(f"refused: {reason}; {remedy}", peer=_ENGINE))
            case Goodbye(reason):
                self._lose(PeerLost(f"said goodbye: {reason}", peer=_ENGINE))
            case message:
                with self._changed:
                    self._inbox.append(Incoming(message, envelope.request))
                    self._changed.notify_all()

    def _handle_monitor(self, monitor: zmq.Socket[bytes]) -> None:
        event = recv_monitor_message(monitor)["event"]
        if event == zmq.EVENT_CONNECTED:
            self._handshaken = False
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._handshaken = True
        elif not self._joined and not self._handshaken:
            self._lose(
                ProtocolMismatch(
                    "does not accept the join token: the token is of another engine or an earlier "
                    "start; copy the token file that the running engine wrote",
                    peer=_ENGINE,
                )
            )

    def _tick(self, now: float, late_s: float) -> None:
        if not self._joined or self._heartbeat_timeout_s is None:
            return
        self._send_now(Heartbeat(), 0)
        # If this process was held up, the engine's signs of life may have been as well.
        self._last_heard += late_s
        silent_s = now - self._last_heard
        if silent_s > self._heartbeat_timeout_s:
            self._lose(PeerLost(f"no heartbeat for {silent_s:.1f} s", peer=_ENGINE))

    def _goodbye(self) -> None:
        if self._joined and self._engine_lost is None:
            self._send_now(Goodbye("closed its control channel"), 0)

    def _lose(self, error: TransportError) -> None:
        with self._changed:
            if self._engine_lost is not None:
                return
            self._engine_lost = error
            was_joined = self._joined
            self._changed.notify_all()
        if was_joined and self._on_engine_lost is not None:
            self._notify(self._on_engine_lost, error.reason)
