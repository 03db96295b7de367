"""Opening links between processes: over TCP, or over shared memory within one machine.

An address is `host:port`, whose links are tcp (`native/transport/tcp.h`), or `unix:@name`, a Unix
socket without a file, whose links are shm (`native/transport/shm.h`). Either way the connecting
side says hello and the listening side answers with a welcome (`wire.py`). The hello proves a
one-time secret, issued over the control channel, and the fingerprint of the attention specs.
Neither hello nor frames are encrypted: use tcp on networks that you trust.
"""

from __future__ import annotations

import hmac
import logging
import math
import secrets
import select
import socket
import struct
import time
from collections.abc import Mapping

from lamina import _native
from lamina.errors import ConfigError, DeadlineExceeded, PeerLost, ProtocolMismatch
from lamina.transport.native import NativeLink
from lamina.transport.wire import (
    PROTOCOL_VERSION,
    WELCOME_BYTES,
    Hello,
    Welcome,
    format_address,
    pack_hello,
    pack_welcome,
    parse_address,
    unpack_hello,
    unpack_welcome,
)

logger = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 5.0
"""A connection that has not said hello by then is closed."""
_MAX_STRANGERS = 64
"""Connections that may be without a hello at the same time; the oldest is closed for one more."""
_READ_BYTES = 4096
_UNIX = "unix:@"
_PEER_CREDENTIALS = struct.Struct("3i")


class Listener:
    """Accepts the tensor channels of peers that were told a secret. Used by one thread."""

    def __init__(
        self,
        address: str = "127.0.0.1:0",
        *,
        name: str = "engine",
        busy_poll_s: float = _native.PACER_YIELD_S,
    ) -> None:
        """Listen at once.

        Args:
            address: host:port (the system chooses port 0) for tcp links, or unix:@name for shm
                links of this machine ("unix:@": a name is chosen).
            name: how the connecting sides call this one.
            busy_poll_s: how long a wait of this side looks and yields the core before it sleeps.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        self.name = name
        self._busy_poll_s = busy_poll_s
        self._used_secrets: set[bytes] = set()
        self._strangers: dict[int, _Stranger] = {}
        try:
            self._socket, self.address = _listen(address)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {address}: {error.strerror or error}; "
                "choose another address or port 0"
            ) from error
        self._socket.setblocking(False)
        self._poller = select.poll()
        self._poller.register(self._socket, select.POLLIN)

    def accept(self, expected: Mapping[bytes, tuple[str, str]], deadline: float) -> NativeLink:
        """Wait for one of the expected peers to connect and prove itself.

        Whoever else connects is told why not, and closed. May be called again after any error.

        Args:
            expected: secret -> (name of the peer, fingerprint). A secret is good for one link.
            deadline: `time.monotonic()` after which the call gives up.

        Raises:
            ProtocolMismatch: a peer with a right secret has another fingerprint; or nobody else
                came until the deadline than peers that were refused (the last refusal).
            DeadlineExceeded: nobody came.
        """
        refusal: ProtocolMismatch | None = None
        while True:
            wake_at = min([deadline, *(s.deadline for s in self._strangers.values())])
            for descriptor, _ in self._poller.poll(_poll_ms(wake_at)):
                if descriptor == self._socket.fileno():
                    self._let_in()
                    continue
                stranger = self._strangers[descriptor]
                try:
                    hello = stranger.read_hello()
                    if hello is None:
                        continue
                    name, fingerprint = self._authenticate(hello, stranger, expected)
                except ProtocolMismatch as error:
                    logger.warning("refused a connection: %s", error)
                    self._dismiss(descriptor, error.reason)
                    refusal = error
                    continue
                except (PeerLost, OSError):
                    self._dismiss(descriptor, "")
                    continue
                if not hmac.compare_digest(hello.fingerprint.encode(), fingerprint.encode()):
                    mismatch = ProtocolMismatch(
                        f"has fingerprint {hello.fingerprint}, {fingerprint} is expected: "
                        "both sides must serve the same model with the same dtype",
                        peer=name,
                    )
                    self._dismiss(descriptor, mismatch.reason)
                    raise mismatch
                link = self._welcome(descriptor, hello, name)
                if link is not None:
                    return link
            now = time.monotonic()
            for descriptor, stranger in list(self._strangers.items()):
                if now >= stranger.deadline:
                    self._dismiss(descriptor, "said no hello in time")
            if now >= deadline:
                names = ", ".join(name for name, _ in expected.values())
                if refusal is not None:
                    raise ProtocolMismatch(
                        f"did not connect; somebody else was refused: {refusal}", peer=names
                    )
                raise DeadlineExceeded(f"did not connect to {self.address} in time", peer=names)

    def close(self) -> None:
        """Stop listening and close connections that never said hello. Idempotent."""
        for descriptor in list(self._strangers):
            self._dismiss(descriptor, "the listener closed")
        self._socket.close()

    def _let_in(self) -> None:
        try:
            connection, address = self._socket.accept()
        except OSError:
            return  # gone again before it was accepted
        connection.setblocking(False)
        if len(self._strangers) >= _MAX_STRANGERS:
            self._dismiss(next(iter(self._strangers)), "too many connections without a hello")
        self._strangers[connection.fileno()] = _Stranger(
            connection, _describe(connection, address), time.monotonic() + _HELLO_TIMEOUT_S
        )
        self._poller.register(connection, select.POLLIN)

    def _authenticate(
        self, hello: Hello, stranger: _Stranger, expected: Mapping[bytes, tuple[str, str]]
    ) -> tuple[str, str]:
        for secret, peer in expected.items():
            if hmac.compare_digest(secret, hello.secret) and secret not in self._used_secrets:
                return peer
        raise ProtocolMismatch(
            f"{hello.name or 'a peer'} presented a secret that is wrong or used up; "
            "it must join over the control channel first",
            peer=stranger.name,
        )

    def _welcome(self, descriptor: int, hello: Hello, name: str) -> NativeLink | None:
        connection = self._forget(descriptor)
        try:
            connection.sendall(pack_welcome(Welcome(True, self.name)))
        except OSError:
            connection.close()
            return None
        self._used_secrets.add(hello.secret)
        return _open_link(connection, name, self._busy_poll_s)

    def _dismiss(self, descriptor: int, reason: str) -> None:
        connection = self._forget(descriptor)
        with connection:
            if reason:
                try:
                    connection.sendall(pack_welcome(Welcome(False, reason)))
                except OSError:
                    logger.debug("could not tell %s why it was refused", descriptor)

    def _forget(self, descriptor: int) -> socket.socket:
        self._poller.unregister(descriptor)
        return self._strangers.pop(descriptor).connection


class _Stranger:
    """A connection that has not proved anything yet."""

    def __init__(self, connection: socket.socket, name: str, deadline: float) -> None:
        self.connection = connection
        self.name = name
        self.deadline = deadline
        self._received = bytearray()

    def read_hello(self) -> Hello | None:
        data = self.connection.recv(_READ_BYTES)
        if not data:
            raise PeerLost("closed the connection", peer=self.name)
        self._received += data
        return unpack_hello(self._received, self.name)


def connect(
    address: str,
    secret: bytes,
    fingerprint: str,
    name: str,
    deadline: float,
    *,
    busy_poll_s: float = _native.PACER_YIELD_S,
) -> NativeLink:
    """Open a link to a `Listener` and prove to be the peer it expects.

    Args:
        address: of the listener: host:port (tcp) or unix:@name (shm).
        secret, fingerprint: as the listener expects them.
        name: this side's name, for the listener's messages.
        deadline: `time.monotonic()` after which the call gives up.
        busy_poll_s: how long a wait of this side looks and yields the core before it sleeps.

    Raises:
        ConfigError: no such address. PeerLost: nobody listens, or the listener hung up.
        ProtocolMismatch: the listener refused; the message is its reason.
        DeadlineExceeded: no answer in time.
    """
    hello = pack_hello(Hello(secret, fingerprint, name))
    try:
        connection = _dial(address, max(1e-3, deadline - time.monotonic()))
    except TimeoutError as error:
        raise DeadlineExceeded("did not accept a connection in time", peer=address) from error
    except socket.gaierror as error:
        raise ConfigError(f"unknown host in address {address}: {error.strerror}") from error
    except OSError as error:
        raise PeerLost(
            f"cannot connect: {error.strerror or error}; is it running, and the address right?",
            peer=address,
        ) from error
    try:
        connection.settimeout(max(1e-3, deadline - time.monotonic()))
        connection.sendall(hello)
        welcome = _read_welcome(connection, address, deadline)
    except TimeoutError as error:
        connection.close()
        raise DeadlineExceeded("did not answer the hello in time", peer=address) from error
    except OSError as error:
        connection.close()
        raise PeerLost(f"hung up: {error.strerror or error}", peer=address) from error
    except (PeerLost, ProtocolMismatch):
        connection.close()
        raise
    if not welcome.accepted:
        connection.close()
        raise ProtocolMismatch(f"refused {name}: {welcome.text}", peer=address)
    return _open_link(connection, welcome.text, busy_poll_s)


def _read_welcome(connection: socket.socket, address: str, deadline: float) -> Welcome:
    received = bytearray()
    while (welcome := unpack_welcome(received, address)) is None:
        connection.settimeout(max(1e-3, deadline - time.monotonic()))
        data = connection.recv(WELCOME_BYTES - len(received))
        if not data:
            raise PeerLost("hung up before its welcome", peer=address)
        received += data
    return welcome


def _listen(address: str) -> tuple[socket.socket, str]:
    """A listening socket and its address in full."""
    if address.startswith(_UNIX):
        if address == _UNIX:
            address += f"lamina-{secrets.token_hex(8)}"
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind("\0" + address.removeprefix(_UNIX))
            listening.listen()
        except OSError:
            listening.close()
            raise
        return listening, address
    host, port = parse_address(address)
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listening = socket.create_server((host, port), family=family)
    return listening, format_address(host, listening.getsockname()[1])


def _dial(address: str, timeout_s: float) -> socket.socket:
    """A connected socket. OSError: the address cannot be reached."""
    if not address.startswith(_UNIX):
        return socket.create_connection(parse_address(address), timeout_s)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect("\0" + address.removeprefix(_UNIX))
    except OSError:
        connection.close()
        raise
    return connection


def _open_link(connection: socket.socket, peer: str, busy_poll_s: float) -> NativeLink:
    """Hand the connection over to the native link that its kind of socket stands for."""
    is_local = connection.family == socket.AF_UNIX
    descriptor = connection.detach()
    if is_local:
        return NativeLink(_native.ShmLink(descriptor, peer, busy_poll_s))
    return NativeLink(_native.TcpLink(descriptor, peer, PROTOCOL_VERSION, busy_poll_s))


def _describe(connection: socket.socket, address: tuple[str, int]) -> str:
    """Who connected: host:port, or the process at the other end of a Unix socket."""
    if connection.family != socket.AF_UNIX:
        return format_address(*address[:2])
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return f"process {_PEER_CREDENTIALS.unpack(data)[0]}"


def _poll_ms(deadline: float) -> int:
    """Milliseconds until `deadline`, rounded up, for `poll`; 0 when it has passed."""
    return max(0, math.ceil((deadline - time.monotonic()) * 1000))
