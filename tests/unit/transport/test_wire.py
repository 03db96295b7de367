"""The wire format: what goes in comes out, and nothing that comes in breaks more than one link."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.attention.spec import AttentionSpec
from lamina.errors import ConfigError, ProtocolMismatch
from lamina.transport import wire
from lamina.transport.wire import (
    MAX_TEXT_BYTES,
    WELCOME_BYTES,
    Assign,
    Hello,
    IntegrityReply,
    Join,
    JoinRequest,
    LinkAddress,
    Welcome,
    WorkerError,
)

U16 = st.integers(0, 2**16 - 1)
U64 = st.integers(0, 2**64 - 1)
TEXT = st.text(max_size=MAX_TEXT_BYTES // 4)
SPECS = st.builds(
    lambda layer, kv_heads, group, head_dim, scale, window, softcap: AttentionSpec(
        layer=layer, num_query_heads=kv_heads * group, num_kv_heads=kv_heads,
        head_dim_k=head_dim, head_dim_v=head_dim, scale=scale, window=window, softcap=softcap,
    ),
    st.integers(0, 100), st.integers(1, 16), st.integers(1, 8), st.integers(1, 512),
    st.floats(1e-6, 1e6), st.none() | st.integers(1, 2**20), st.none() | st.floats(1, 100),
)  # fmt: skip
LINKS = st.builds(LinkAddress, TEXT, st.binary(max_size=64))
ASSIGN = st.builds(
    Assign, executor=U16, specs=st.lists(SPECS, max_size=4).map(tuple),
    sinks=st.lists(st.none() | st.binary(max_size=64), max_size=4).map(tuple),
    dtype=TEXT, num_pages=U64, page_tokens=U16, max_rows=U16,
    max_spans=U16, units=U16, page_units=U16, num_micro_batches=U16, num_ranks=U16,
    plan_link=LINKS, tensor_links=st.lists(LINKS, max_size=4).map(tuple),
    fingerprint=TEXT, step_deadline_s=st.floats(0, 1e9), busy_poll_s=st.floats(0, 1),
    kv_cache_dtype=st.sampled_from(["auto", "int8"]),
)  # fmt: skip
JOIN = st.builds(Join, name=TEXT, pid=U64, host=TEXT, device=TEXT, memory_bytes=U64,
                 num_threads=U16, protocol_version=U16)  # fmt: skip
INTEGRITY = st.builds(
    IntegrityReply, problems=st.lists(TEXT, max_size=3).map(tuple), pages_used=U64,
    pages_total=U64, sequences=st.lists(U64, max_size=5).map(tuple),
)  # fmt: skip
CONTROL = (
    ASSIGN | INTEGRITY | st.builds(JoinRequest, TEXT, JOIN) | st.builds(WorkerError, TEXT, TEXT)
)


@given(st.binary(max_size=MAX_TEXT_BYTES), TEXT, TEXT, st.data())
def test_hellos_round_trip_however_they_arrive(
    secret: bytes, fingerprint: str, name: str, data: st.DataObject
) -> None:
    hello = Hello(secret, fingerprint, name)
    packed = wire.pack_hello(hello)
    assert wire.unpack_hello(packed, "p") == hello
    assert wire.unpack_hello(packed[: data.draw(st.integers(0, len(packed) - 1))], "p") is None
    with pytest.raises(ProtocolMismatch, match="bytes after"):
        wire.unpack_hello(packed + b"x", "p")


@given(st.booleans(), TEXT, st.data())
def test_welcomes_round_trip_however_they_arrive(
    accepted: bool, text: str, data: st.DataObject
) -> None:
    packed = wire.pack_welcome(Welcome(accepted, text))
    assert len(packed) == WELCOME_BYTES
    assert wire.unpack_welcome(packed, "p") == Welcome(accepted, text)
    cut = data.draw(st.integers(0, WELCOME_BYTES - 1))
    assert wire.unpack_welcome(packed[:cut], "p") is None


def test_long_reasons_are_cut_between_characters() -> None:
    unpacked = wire.unpack_welcome(wire.pack_welcome(Welcome(False, "é" * MAX_TEXT_BYTES)), "p")
    assert unpacked == Welcome(False, "é" * (MAX_TEXT_BYTES // 2))


def test_long_hellos_are_refused_before_they_are_sent() -> None:
    with pytest.raises(ConfigError, match=r"fingerprint has 1025 bytes"):
        wire.pack_hello(Hello(b"", "x" * (MAX_TEXT_BYTES + 1), ""))


@given(CONTROL, st.integers(0, 2**63 - 1))
def test_control_messages_round_trip(message: wire.ControlMessage, request: int) -> None:
    envelope = wire.unpack_control(wire.pack_control(message, request), "p")
    assert envelope == wire.Envelope(request, message)


@given(st.binary(max_size=200), st.sampled_from([b"", b"LMNH\x01\0", b"LMNW\x01\0"]))
def test_garbage_is_a_mismatch_and_nothing_else(garbage: bytes, prefix: bytes) -> None:
    data = prefix + garbage
    for unpack in (wire.unpack_hello, wire.unpack_welcome, wire.unpack_control):
        with contextlib.suppress(ProtocolMismatch):
            unpack(data, "p")


@given(CONTROL, st.data())
def test_damaged_control_messages_are_a_mismatch_and_nothing_else(
    message: wire.ControlMessage, data: st.DataObject
) -> None:
    packed = bytearray(wire.pack_control(message))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    del packed[data.draw(st.integers(0, len(packed))) :]
    with contextlib.suppress(ProtocolMismatch):
        wire.unpack_control(bytes(packed), "p")


def test_a_message_that_breaks_an_invariant_is_a_mismatch() -> None:
    spec = AttentionSpec(
        layer=0, num_query_heads=4, num_kv_heads=2, head_dim_k=8, head_dim_v=8, scale=1.0
    )
    broken = msgspec.to_builtins(spec) | {"num_query_heads": 5}
    data = msgspec.msgpack.encode([0, {"type": "Assign", "specs": [broken]}])
    with pytest.raises(ProtocolMismatch, match="same Lamina version"):
        wire.unpack_control(data, "p")


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"G",
        b"LMNX",
        struct.pack("<4sHHHH", b"LMNH", 1, 2000, 0, 0),
        struct.pack("<4sHHHH", b"LMNH", 1, 1, 0, 0) + b"\0\0",
        struct.pack("<4sHHHH", b"LMNH", 1, 0, 1, 0) + b"\xff",
    ],
)
def test_bad_hellos_are_recognised_early(data: bytes) -> None:
    with pytest.raises(ProtocolMismatch, match=r"^p: "):
        wire.unpack_hello(data, "p")


@pytest.mark.parametrize(
    ("magic", "unpack"), [(b"LMNH", wire.unpack_hello), (b"LMNW", wire.unpack_welcome)]
)
def test_other_versions_are_named(magic: bytes, unpack: Callable[[bytes, str], object]) -> None:
    data = struct.pack("<4sH", magic, 7)
    with pytest.raises(ProtocolMismatch, match=r"version 7, this side 1; run the same"):
        unpack(data, "p")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:80", "127.0.0.1", 80), ("[::1]:0", "::1", 0), ("box:65535", "box", 65535)],
)  # fmt: skip
def test_addresses(text: str, host: str, port: int) -> None:
    assert wire.parse_address(text) == (host, port)
    assert wire.format_address(host, port) == text


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":80", "host:x", "::1:80", "h:65536", "h:-1"]
)
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match="join_address must look like"):
        wire.parse_address(text, "join_address")
