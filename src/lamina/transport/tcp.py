"""The transport between machines: opening links over TCP (`tcp_link.py` runs them).

The connecting side says hello, the listening side answers with a welcome (`wire.py`). The hello
proves a one-time secret, issued over the control channel, and the fingerprint of the attention
specs. Neither hello nor frames are encrypted: use this transport on networks that you trust.
"""

from __future__ import annotations

import hmac
import logging
import select
import socket
import time
from collections.abc import Mapping

from lamina.errors import ConfigError, DeadlineExceeded, PeerLost, ProtocolMismatch
from lamina.transport.tcp_link import TcpLink, poll_ms
from lamina.transport.wire import (
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


class TcpListener:
    """Accepts the tensor channels of peers that were told a secret. Used by one thread."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, name: str = "engine") -> None:
        """Listen at once, on a port that the system chooses if `port` is 0.

        Args:
            name: how the connecting sides call this one.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        self.name = name
        self._used_secrets: set[bytes] = set()
        self._strangers: dict[int, _Stranger] = {}
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {format_address(host, port)}: {error.strerror or error}; "
                "choose another address or port 0"
            ) from error
        self._socket.setblocking(False)
        self.address = format_address(host, self._socket.getsockname()[1])
        """host:port, as `connect` takes it."""
        self._poller = select.poll()
        self._poller.register(self._socket, select.POLLIN)

    def accept(self, expected: Mapping[bytes, tuple[str, str]], deadline: float) -> TcpLink:
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
            for descriptor, _ in self._poller.poll(poll_ms(wake_at)):
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
            connection, format_address(*address[:2]), time.monotonic() + _HELLO_TIMEOUT_S
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

    def _welcome(self, descriptor: int, hello: Hello, name: str) -> TcpLink | None:
        connection = self._forget(descriptor)
        try:
            connection.sendall(pack_welcome(Welcome(True, self.name)))
        except OSError:
            connection.close()
            return None
        self._used_secrets.add(hello.secret)
        return TcpLink(connection, name)

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


def connect(address: str, secret: bytes, fingerprint: str, name: str, deadline: float) -> TcpLink:
    """Open a link to a `TcpListener` and prove to be the peer it expects.

    Args:
        address: host:port of the listener.
        secret, fingerprint: as the listener expects them.
        name: this side's name, for the listener's messages.
        deadline: `time.monotonic()` after which the call gives up.

    Raises:
        ConfigError: no such address. PeerLost: nobody listens, or the listener hung up.
        ProtocolMismatch: the listener refused; the message is its reason.
        DeadlineExceeded: no answer in time.
    """
    host, port = parse_address(address)
    hello = pack_hello(Hello(secret, fingerprint, name))
    try:
        connection = socket.create_connection((host, port), max(1e-3, deadline - time.monotonic()))
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
    return TcpLink(connection, welcome.text)


def _read_welcome(connection: socket.socket, address: str, deadline: float) -> Welcome:
    received = bytearray()
    while (welcome := unpack_welcome(received, address)) is None:
        connection.settimeout(max(1e-3, deadline - time.monotonic()))
        data = connection.recv(WELCOME_BYTES - len(received))
        if not data:
            raise PeerLost("hung up before its welcome", peer=address)
        received += data
    return welcome
