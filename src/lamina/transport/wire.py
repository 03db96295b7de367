"""What travels between processes: frames, hellos, control messages, addresses. Pure.

Tensor channel (`handshake.py`), all integers little-endian:

    hello    "LMNH" | version u16 | lengths of secret, fingerprint, name: 3 x u16 | their bytes
    welcome  "LMNW" | version u16 | status u16 | length of text u16 | text, zeros up to 1024

The side that connects sends one hello, the listening side answers with one welcome whose text is
its own name or the reason why it refuses. What follows in both directions is native: frames over
TCP (`native/transport/tcp.h`), shared memory over a Unix socket (`native/transport/shm.h`).

Control channel (`control.py`): msgpack of `Envelope`, one ZeroMQ message each, over CURVE:

    worker --> engine   JoinRequest first, then replies, Heartbeat, WorkerError, Goodbye
    engine --> worker   Joined or Refused first, then requests, Heartbeat, ShutdownWorker, Goodbye
"""

from __future__ import annotations

import struct
from typing import Literal, NamedTuple

import msgspec

from lamina.attention.spec import AttentionSpec
from lamina.errors import ConfigError, ProtocolMismatch
from lamina.transport.rank_wire import AssignRank, ConnectRank, LostPeer, RankAssigned

PROTOCOL_VERSION = 1
"""Of the tensor channel and the control messages together; both sides must run the same."""

_HELLO_MAGIC = b"LMNH"
_WELCOME_MAGIC = b"LMNW"
_PREFIX = struct.Struct("<4sH")
_HELLO = struct.Struct("<4sHHHH")
_WELCOME = struct.Struct("<4sHHH")

MAX_TEXT_BYTES = 1024
"""Longest secret, fingerprint, name and reason of a hello or welcome."""
WELCOME_BYTES = _WELCOME.size + MAX_TEXT_BYTES
"""Size of every welcome: fixed, because frames may follow it at once."""
_ACCEPTED = 0
_REFUSED = 1


class Hello(NamedTuple):
    """The first message of the connecting side."""

    secret: bytes
    fingerprint: str
    name: str


class Welcome(NamedTuple):
    """The answer of the listening side."""

    accepted: bool
    text: str
    """The listener's name, or the reason of its refusal."""


class Join(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Who a worker is and what it has to offer."""

    name: str
    """Wished for; the engine makes it unique."""
    pid: int
    host: str
    device: str
    memory_bytes: int
    """KV memory that the worker can give."""
    num_threads: int
    protocol_version: int = PROTOCOL_VERSION


class JoinRequest(msgspec.Struct, frozen=True, tag=True):
    """The first message of a worker."""

    secret: str
    """Of the join token."""
    join: Join


class Joined(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine takes the worker in."""

    name: str
    heartbeat_interval_s: float
    heartbeat_timeout_s: float


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The engine does not take the worker in, or does not know it any more."""

    reason: str


class LinkAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where to open a link, and the one-time secret that proves the right to."""

    address: str
    """host:port or unix:@name of a listener."""
    secret: bytes


class Assign(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the worker is to serve: it allocates, answers Assigned, opens its links."""

    executor: int
    """The worker's executor id."""
    specs: tuple[AttentionSpec, ...]
    """Every attention layer, with all heads."""
    sinks: tuple[bytes | None, ...]
    """Per layer the sink values of all query heads, float32; None: no sinks."""
    units: int
    """Head units of the model (`attention.partition`)."""
    page_units: int
    """Head units of the worker's lanes and pages."""
    dtype: str
    """Of q, k, v and the output."""
    kv_cache_dtype: Literal["auto", "int8"]
    num_pages: int
    """Pages of a lane."""
    page_tokens: int
    max_rows: int
    max_spans: int
    num_micro_batches: int
    num_ranks: int
    """Tensor-parallel ranks of each replica of the model."""
    plan_link: LinkAddress
    """Of the engine."""
    tensor_links: tuple[LinkAddress, ...]
    """Of all ranks of the first replica, then of the next; empty: the plan link carries tensors."""
    fingerprint: str
    """Of the links' hellos."""
    step_deadline_s: float
    busy_poll_s: float
    """How long the worker's waits yield the core before they sleep."""


class Assigned(msgspec.Struct, frozen=True, tag=True):
    """The pages are allocated; the links come next."""

    num_pages: int
    read_bytes_per_s: float
    """How fast the worker's threads read memory together."""


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """I am alive."""


class IntegrityQuery(msgspec.Struct, frozen=True, tag=True):
    """Verify the allocator after the first `num_plans` plans; answered by IntegrityReply."""

    num_plans: int = 0


class IntegrityReply(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the worker's allocator says of itself."""

    problems: tuple[str, ...]
    """Empty when it is sound."""
    pages_used: int
    pages_total: int
    sequences: tuple[int, ...]
    """Sequences that hold pages."""


class WorkerError(msgspec.Struct, frozen=True, tag=True):
    """A request failed; or, unasked for, the worker cannot go on."""

    kind: str
    """Class name of the error."""
    message: str


class ShutdownWorker(msgspec.Struct, frozen=True, tag=True):
    """End the process, with exit code 0."""


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The sender leaves; nothing more comes from it."""

    reason: str


ControlMessage = (
    JoinRequest
    | Joined
    | Refused
    | Assign
    | Assigned
    | AssignRank
    | RankAssigned
    | ConnectRank
    | LostPeer
    | Heartbeat
    | IntegrityQuery
    | IntegrityReply
    | WorkerError
    | ShutdownWorker
    | Goodbye
)


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """One control message."""

    request: int
    """Number of the request that this is, or that this answers; 0: neither."""
    message: ControlMessage


_encode_envelope = msgspec.msgpack.Encoder().encode
_decode_envelope = msgspec.msgpack.Decoder(Envelope).decode


def pack_control(message: ControlMessage, request: int = 0) -> bytes:
    """The bytes of a control message."""
    return _encode_envelope(Envelope(request, message))


def unpack_control(data: bytes, peer: str) -> Envelope:
    """The inverse. ProtocolMismatch: not a control message of this version."""
    try:
        return _decode_envelope(data)
    except (msgspec.DecodeError, UnicodeDecodeError, AssertionError) as error:
        raise ProtocolMismatch(
            f"sent an unreadable control message ({error}); run the same Lamina version on both "
            "sides",
            peer=peer,
        ) from error


def pack_hello(hello: Hello) -> bytes:
    """The bytes of a hello; ConfigError when a part is too long."""
    parts = [hello.secret, hello.fingerprint.encode(), hello.name.encode()]
    for what, part in zip(Hello._fields, parts, strict=True):
        if len(part) > MAX_TEXT_BYTES:
            raise ConfigError(f"{what} has {len(part)} bytes, at most {MAX_TEXT_BYTES} are allowed")
    head = _HELLO.pack(_HELLO_MAGIC, PROTOCOL_VERSION, *(len(part) for part in parts))
    return head + b"".join(parts)


def unpack_hello(data: bytes | bytearray, peer: str) -> Hello | None:
    """The hello that `data` holds; None while bytes are missing.

    Raises:
        ProtocolMismatch: these bytes cannot become a hello, or more follow it.
    """
    if not _head_complete(data, _HELLO, _HELLO_MAGIC, "hello", peer):
        return None
    lengths = _HELLO.unpack_from(data)[2:]
    if max(lengths) > MAX_TEXT_BYTES:
        raise ProtocolMismatch(f"a hello with a part of {max(lengths)} bytes", peer=peer)
    missing = _HELLO.size + sum(lengths) - len(data)
    if missing > 0:
        return None
    if missing < 0:
        raise ProtocolMismatch("bytes after its hello, before the welcome", peer=peer)
    fingerprint_at = _HELLO.size + lengths[0]
    name_at = fingerprint_at + lengths[1]
    return Hello(
        bytes(data[_HELLO.size : fingerprint_at]),
        _decode(data[fingerprint_at:name_at], "hello", peer),
        _decode(data[name_at:], "hello", peer),
    )


def pack_welcome(welcome: Welcome) -> bytes:
    """The bytes of a welcome; the text is cut to `MAX_TEXT_BYTES`."""
    text = welcome.text.encode()[:MAX_TEXT_BYTES].decode(errors="ignore").encode()
    status = _ACCEPTED if welcome.accepted else _REFUSED
    head = _WELCOME.pack(_WELCOME_MAGIC, PROTOCOL_VERSION, status, len(text))
    return (head + text).ljust(WELCOME_BYTES, b"\0")


def unpack_welcome(data: bytes | bytearray, peer: str) -> Welcome | None:
    """The welcome that `data` holds; None while fewer than `WELCOME_BYTES` are there.

    Raises:
        ProtocolMismatch: these bytes cannot become a welcome.
    """
    if not _head_complete(data, _WELCOME, _WELCOME_MAGIC, "welcome", peer):
        return None
    _, _, status, length = _WELCOME.unpack_from(data)
    if status not in (_ACCEPTED, _REFUSED) or length > MAX_TEXT_BYTES:
        raise ProtocolMismatch(f"a welcome with status {status}, length {length}", peer=peer)
    if len(data) < WELCOME_BYTES:
        return None
    text = bytes(data[_WELCOME.size : _WELCOME.size + length])
    return Welcome(status == _ACCEPTED, _decode(text, "welcome", peer))


def parse_address(text: str, field: str = "address") -> tuple[str, int]:
    """`host:port` or `[ipv6]:port` -> host and port; ConfigError names `field`."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{field} must look like host:port or [ipv6]:port, got {text!r}")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """The inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _head_complete(
    data: bytes | bytearray, head: struct.Struct, magic: bytes, what: str, peer: str
) -> bool:
    """Whether the fixed part is there; its magic and version are checked as soon as they are."""
    if not magic.startswith(bytes(data[: len(magic)])):
        raise ProtocolMismatch(f"not a Lamina peer: its {what} starts with other bytes", peer=peer)
    if len(data) < _PREFIX.size:
        return False
    found, version = _PREFIX.unpack_from(data)
    _check_prefix(found, version, magic, what, peer)
    return len(data) >= head.size


def _check_prefix(magic: bytes, version: int, want: bytes, what: str, peer: str) -> None:
    if magic != want:
        raise ProtocolMismatch(
            f"a {what} that starts with {magic!r} instead of {want!r}", peer=peer
        )
    if version != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"speaks protocol version {version}, this side {PROTOCOL_VERSION}; "
            "run the same Lamina version on both sides",
            peer=peer,
        )


def _decode(text: bytes | bytearray, what: str, peer: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ProtocolMismatch(f"a {what} that is not UTF-8", peer=peer) from error
