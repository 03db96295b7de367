"""The engine's end of the control channel: who joined, who answers, who fell silent.

ZeroMQ with CURVE: the token's public key proves the engine to the workers, its secret the workers
to the engine, and everything is encrypted. Messages are those of `wire.py`.
"""

from __future__ import annotations

import hmac
import itertools
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import zmq

from lamina.errors import ConfigError, DeadlineExceeded, PeerLost, ProtocolMismatch
from lamina.transport.control_loop import ControlLoop
from lamina.transport.join_token import JoinToken
from lamina.transport.rank_wire import LostPeer
from lamina.transport.wire import (
    PROTOCOL_VERSION,
    ControlMessage,
    Envelope,
    Goodbye,
    Heartbeat,
    Join,
    Joined,
    JoinRequest,
    Refused,
    WorkerError,
    format_address,
    pack_control,
    parse_address,
    unpack_control,
)

_CLOSED = "the engine closed the control channel"


class JoinedPeer(NamedTuple):
    """A worker that joined."""

    name: str
    """Unique among all that ever joined this server."""
    join: Join


class _Peer:
    """What the server knows of a worker."""

    def __init__(self, name: str, identity: bytes, last_seen: float) -> None:
        self.name = name
        self.identity = identity
        self.last_seen = last_seen
        self.lost: str | None = None
        self.requests: dict[int, Future[ControlMessage]] = {}


class ControlServer(ControlLoop):
    """The engine's control socket and its thread. All methods may be called from any thread."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        heartbeat_interval_s: float,
        heartbeat_timeout_s: float,
        on_lost: Callable[[str, str], None],
    ) -> None:
        """Listen at once, on a port that the system chooses if `port` is 0.

        Args:
            heartbeat_interval_s: how often both sides say that they are alive.
            heartbeat_timeout_s: a peer that is silent for longer is lost.
            on_lost: called once for each peer that is lost, with its name and the reason, from the
                thread that noticed; it must not block. Not called by `close`. Peers may also tell
                of others that are lost, even of some that never joined.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        super().__init__(zmq.ROUTER, heartbeat_interval_s)
        public_key, secret_key = zmq.curve_keypair()
        self.token = JoinToken.create(public_key.decode())
        """What workers need to join."""
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._peers: dict[str, _Peer] = {}
        self._by_identity: dict[bytes, _Peer] = {}
        self._waiting_joins: deque[JoinedPeer] = deque()
        self._request_numbers = itertools.count(1)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.curve_server = True
        self._socket.curve_secretkey = secret_key
        self._socket.curve_publickey = public_key
        try:
            ip_address = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
            self._socket.setsockopt(zmq.IPV6, int(":" in ip_address))
            self._socket.bind(f"tcp://{format_address(ip_address, port)}")
        except (zmq.ZMQError, OSError) as error:
            self.close()
            raise ConfigError(
                f"cannot listen on {format_address(host, port)}: {error.strerror}; "
                "choose another address or port 0"
            ) from error
        endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.address = format_address(host, parse_address(endpoint.removeprefix("tcp://"))[1])
        """host:port, as `ControlClient` takes it."""
        self._start("lamina-control-server")

    def wait_for_join(self, deadline: float) -> JoinedPeer:
        """The next worker, in the order of joining; DeadlineExceeded when none came in time."""
        with self._changed:
            while not self._waiting_joins:
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    raise DeadlineExceeded(
                        f"no further worker joined at {self.address} in time", peer="workers"
                    )
                self._changed.wait(remaining_s)
            return self._waiting_joins.popleft()

    def send(self, peer: str, message: ControlMessage) -> None:
        """Send a message that has no answer. Does not block; PeerLost if the peer is lost."""
        with self._changed:
            identity = self._alive(peer).identity
        self._call(lambda: self._deliver(identity, message, 0))

    def request(self, peer: str, message: ControlMessage, deadline: float) -> ControlMessage:
        """Send a message and wait for its answer, which may be a WorkerError.

        Raises:
            PeerLost: the peer is or gets lost. DeadlineExceeded: no answer in time.
        """
        number = next(self._request_numbers)
        answer: Future[ControlMessage] = Future()
        with self._changed:
            entry = self._alive(peer)
            entry.requests[number] = answer
        self._call(lambda: self._deliver(entry.identity, message, number))
        try:
            return answer.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise DeadlineExceeded(
                f"did not answer {type(message).__name__} in time", peer=peer
            ) from None
        finally:
            with self._changed:
                entry.requests.pop(number, None)

    def lost(self, peer: str) -> str | None:
        """Why the peer is lost; None while it is alive."""
        with self._changed:
            return self._peers[peer].lost

    def declare_lost(self, peer: str, reason: str) -> None:
        """Treat the peer as lost, e.g. because its process ended. No effect if it already is."""
        with self._changed:
            entry = self._peers.get(peer)
            if entry is None or entry.lost is not None:
                return
            entry.lost = reason
            unanswered = list(entry.requests.values())
            entry.requests.clear()
        for answer in unanswered:
            answer.set_exception(PeerLost(reason, peer=peer))
        self._call(lambda: self._deliver(entry.identity, Goodbye(f"declared lost: {reason}"), 0))
        self._notify(self._on_lost, peer, reason)

    def close(self) -> None:
        """Say goodbye to all peers and stop. Idempotent; requests in progress raise PeerLost."""
        super().close()
        with self._changed:
            unanswered = [(p.name, a) for p in self._peers.values() for a in p.requests.values()]
            for peer in self._peers.values():
                peer.requests.clear()
        for name, answer in unanswered:
            answer.set_exception(PeerLost(_CLOSED, peer=name))

    def _alive(self, name: str) -> _Peer:
        entry = self._peers.get(name)
        if entry is None:
            raise PeerLost("has not joined", peer=name)
        if self._closing:
            raise PeerLost(_CLOSED, peer=name)
        if entry.lost is not None:
            raise PeerLost(entry.lost, peer=name)
        return entry

    def _deliver(self, identity: bytes, message: ControlMessage, request: int) -> None:
        sent = self._transmit([identity, pack_control(message, request)])
        peer = self._by_identity.get(identity)
        if not sent and peer is not None:
            self.declare_lost(peer.name, "its control connection is gone")

    def _handle(self, frames: list[bytes]) -> None:
        identity, data = frames[0], frames[-1]
        peer = self._by_identity.get(identity)
        try:
            envelope = unpack_control(data, peer.name if peer is not None else "a peer")
        except ProtocolMismatch as error:
            if peer is None:
                self._deliver(identity, Refused(error.reason), 0)
            else:
                self.declare_lost(peer.name, error.reason)
            return
        if isinstance(envelope.message, JoinRequest):
            self._admit(identity, envelope.message)
        elif peer is None or peer.lost is not None:
            self._deliver(identity, Refused("this engine does not know you (any more)"), 0)
        else:
            peer.last_seen = time.monotonic()
            self._dispatch(peer, envelope)

    def _dispatch(self, peer: _Peer, envelope: Envelope) -> None:
        if envelope.request:
            with self._changed:
                answer = peer.requests.pop(envelope.request, None)
            if answer is not None:  # else it was given up
                answer.set_result(envelope.message)
            return
        match envelope.message:
            case WorkerError(kind, text):
                self.declare_lost(peer.name, f"{kind}: {text}")
            case Goodbye(reason):
                self.declare_lost(peer.name, f"left: {reason}")
            case LostPeer(name, reason) if name in self._peers:
                self.declare_lost(name, reason)
            case LostPeer(name, reason):  # one that never joined, or joined elsewhere
                self._notify(self._on_lost, name, reason)

    def _admit(self, identity: bytes, request: JoinRequest) -> None:
        join = request.join
        if join.protocol_version != PROTOCOL_VERSION:
            self._deliver(
                identity,
                Refused(
                    f"worker speaks protocol version {join.protocol_version}, the engine "
                    f"{PROTOCOL_VERSION}; run the same Lamina version on both"
                ),
                0,
            )
            return
        if not hmac.compare_digest(request.secret.encode(), self.token.secret.encode()):
            self._deliver(identity, Refused("the join token is not this engine's"), 0)
            return
        if identity in self._by_identity:
            return
        with self._changed:
            name = next(
                candidate
                for suffix in itertools.count(1)
                if (candidate := f"{join.name}-{suffix}" if suffix > 1 else join.name)
                not in self._peers
            )
            peer = _Peer(name, identity, time.monotonic())
            self._peers[name] = self._by_identity[identity] = peer
        welcome = Joined(
            name=name,
            heartbeat_interval_s=self._interval_s,
            heartbeat_timeout_s=self._heartbeat_timeout_s,
        )
        self._deliver(identity, welcome, 0)
        with self._changed:
            self._waiting_joins.append(JoinedPeer(name, join))
            self._changed.notify_all()

    def _tick(self, now: float, late_s: float) -> None:
        for peer in list(self._by_identity.values()):
            if peer.lost is not None:
                continue
            # If this process was held up, the peers' signs of life may have been as well.
            peer.last_seen += late_s
            silent_s = now - peer.last_seen
            if silent_s > self._heartbeat_timeout_s:
                self.declare_lost(peer.name, f"no heartbeat for {silent_s:.1f} s")
            else:
                self._deliver(peer.identity, Heartbeat(), 0)

    def _goodbye(self) -> None:
        for peer in self._by_identity.values():
            if peer.lost is None:
                self._transmit([peer.identity, pack_control(Goodbye("the engine closed"))])
