"""Control messages of model ranks and their hosts; see `wire.py` for the channel. Pure.

engine --> rank   AssignRank, answered by RankAssigned; ConnectRank; IntegrityQuery
rank   --> engine LostPeer, unasked for
host   --> engine LostPeer, when a rank that it forked has ended
"""

from __future__ import annotations

from typing import Literal

import msgspec


class RankPeer(msgspec.Struct, frozen=True, array_like=True):
    """Who will connect to a rank's listener, and how it proves to be that."""

    name: str
    secret: bytes
    fingerprint: str


class RankAddress(msgspec.Struct, frozen=True, array_like=True):
    """A rank's listener, and what the one who connects there must present."""

    address: str
    secret: bytes
    fingerprint: str


class AssignRank(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a rank is to run: it allocates, listens, and answers RankAssigned."""

    engine: RankPeer
    previous: RankPeer | None
    """The same rank of the replica before it, which sends contexts; None with one replica."""
    followers: tuple[RankPeer, ...]
    """For the first rank of a replica: the others, which run slices in its order."""
    executors: tuple[tuple[int, RankPeer], ...]
    """Attention workers by their executor ids."""
    page_units: tuple[tuple[int, int], ...]
    """Head units of each lane, by executor."""
    transport: Literal["shm", "tcp"]
    host: str
    """Where to listen with tcp."""
    num_micro_batches: int
    num_units: int
    """Head units of the whole model; the ranks of a replica have equal parts of them."""
    num_pages: int
    """Of this rank's local executor."""
    page_tokens: int
    kv_cache_dtype: Literal["auto", "int8"]
    max_rows: int
    max_spans: int
    max_shares: int
    """Most shares of all spans of a step."""
    early_q: bool
    defer: bool
    step_deadline_s: float
    busy_poll_s: float


class RankAssigned(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The local executor's pages are allocated and the rank listens."""

    address: str
    sinks: tuple[bytes | None, ...]
    """Per layer the sink values of the rank's query heads, float32; None: no sinks."""
    store_port: int | None
    """Where the ranks of the replica meet; None but for the first of several."""


class ConnectRank(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Connect to these ranks, accept the assigned peers, and meet the replica's other ranks."""

    following: RankAddress | None
    """The same rank of the next replica; None with one replica."""
    leader: RankAddress | None
    """The replica's first rank; None for that itself."""
    store_host: str
    store_port: int | None
    """Of the replica's first rank; None without tensor parallelism."""


class LostPeer(msgspec.Struct, frozen=True, tag=True):
    """The sender knows that somebody else is lost."""

    name: str
    reason: str
