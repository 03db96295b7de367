"""All model ranks of an engine: their hosts' processes, their assignments, their links."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lamina.attention.spec import fingerprint
from lamina.config import EngineConfig
from lamina.convert import SlicedModel
from lamina.errors import CapacityError, DeadlineExceeded, EngineDead, PeerLost
from lamina.transport.control import ControlServer
from lamina.transport.handshake import connect
from lamina.transport.native import NativeLink
from lamina.transport.rank_wire import (
    AssignRank,
    ConnectRank,
    RankAddress,
    RankAssigned,
    RankPeer,
)
from lamina.transport.wire import (
    IntegrityQuery,
    IntegrityReply,
    LinkAddress,
    ShutdownWorker,
    WorkerError,
)
from lamina.types import LOCAL
from lamina.workers.blame import ENGINE
from lamina.workers.deployment import Deployment
from lamina.workers.host import HostStart, run_model_host
from lamina.workers.process import WorkerProcess
from lamina.workers.rank import RankStart

logger = logging.getLogger("lamina.workers")

_CLOSE_GRACE_S = 3.0
_TERMINATE_GRACE_S = 1.5
"""More than a host gives its ranks."""
_QUERY_TIMEOUT_S = 10.0
_LOCALHOST = "127.0.0.1"
"""All ranks run on the engine's machine."""


class _Rank(NamedTuple):
    """A rank's place."""

    replica: int
    tensor_rank: int

    @property
    def name(self) -> str:
        return f"model-rank-{self.replica}.{self.tensor_rank}"


class ModelRanks:
    """Starts, watches and stops the ranks. Used by the engine's thread, except `note_lost`."""

    def __init__(self, config: EngineConfig, deployment: Deployment) -> None:
        """Start the hosts, which begin to load the model at once."""
        self.links: dict[str, NativeLink] = {}
        """The engine's link to every rank, by name."""
        self.num_steps = 0
        """Steps that every rank has been sent."""
        self._config = config
        self._deployment = deployment
        self._ranks = [
            _Rank(replica, tensor_rank)
            for tensor_rank in range(config.tensor_parallel_size)
            for replica in range(config.model_replicas)
        ]
        self.pids: dict[str, int] = {}
        """Of the ranks and hosts that have joined, by name."""
        self.leaders = frozenset(rank.name for rank in self._ranks if rank.tensor_rank == 0)
        """The first rank of each replica."""
        self._deadline = time.monotonic() + config.startup_timeout_s
        self._addresses: dict[_Rank, str] = {}
        self._secrets: dict[tuple[str, str], bytes] = {}
        self._store_ports: dict[int, int | None] = {}
        self._fingerprint = ""
        self._lost: dict[str, str] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._hosts: dict[str, WorkerProcess] = {}
        self._control = ControlServer(
            heartbeat_interval_s=config.heartbeat_interval_s,
            heartbeat_timeout_s=config.heartbeat_timeout_s,
            on_lost=self.note_lost,
        )
        for tensor_rank in range(config.tensor_parallel_size):
            name = f"model-host-{tensor_rank}"
            start = HostStart(
                name=name,
                config=config,
                ranks=tuple(
                    self._rank_start(rank)
                    for rank in self._ranks
                    if rank.tensor_rank == tensor_rank
                ),
            )
            self._hosts[name] = WorkerProcess(
                name, run_model_host, (start,), num_threads=1, on_exit=self._on_exit
            )

    def assign(
        self, model: SlicedModel, worker_names: dict[int, str]
    ) -> tuple[torch.Tensor | None, ...]:
        """Wait until the ranks have the model, and let them allocate and listen.

        Args:
            model: its structure is enough.
            worker_names: of the attention workers that will connect, by executor id.

        Returns:
            The attention layers' sinks, of all heads.

        Raises:
            EngineDead: a host or rank did not start, or cannot load the model.
            CapacityError: the memory for local pages cannot be had.
        """
        self._wait_for_joins()
        dtype = str(model.dtype).removeprefix("torch.")
        self._fingerprint = fingerprint(model.attention_specs, dtype)
        sinks: dict[_Rank, tuple[bytes | None, ...]] = {}
        for rank in self._ranks:
            assign = self._assignment(rank, model, worker_names)
            reply = self._control.request(rank.name, assign, self._deadline)
            if isinstance(reply, WorkerError):
                error = CapacityError if reply.kind == CapacityError.__name__ else EngineDead
                raise error(f"{rank.name}: {reply.message}")
            assert isinstance(reply, RankAssigned), f"{rank.name} answered {type(reply).__name__}"
            self._addresses[rank] = reply.address
            sinks[rank] = reply.sinks
            if rank.tensor_rank == 0:
                self._store_ports[rank.replica] = reply.store_port
        parts = [sinks[rank] for rank in self._ranks if rank.replica == 0]
        return tuple(_joined(layer) for layer in zip(*parts, strict=True))

    def tensor_links(self, worker_name: str) -> tuple[LinkAddress, ...]:
        """Where an attention worker connects with all ranks of the first replica, then the next."""
        return tuple(
            LinkAddress(self._addresses[rank], self._secret(rank, worker_name))
            for rank in sorted(self._ranks)
        )

    def connect_ranks(self) -> None:
        """Tell all ranks to connect with each other and to accept the attention workers."""
        for rank in self._ranks:
            following, leader = self._following(rank), rank._replace(tensor_rank=0)
            self._control.send(
                rank.name,
                ConnectRank(
                    following=self._address(following, rank) if following != rank else None,
                    leader=self._address(leader, rank) if leader != rank else None,
                    store_host=_LOCALHOST,
                    store_port=self._store_ports[rank.replica],
                ),
            )

    def connect(self) -> None:
        """Open the engine's links.

        Raises:
            TransportError: a rank is lost, or does not answer in time.
        """
        for rank in self._ranks:
            link = connect(
                self._addresses[rank],
                self._secret(rank, ENGINE),
                self._fingerprint,
                ENGINE,
                self._deadline,
                busy_poll_s=self._config.busy_poll_s,
            )
            with self._lock:
                self.links[rank.name] = link
            self.check()

    def wait_until_ready(self) -> None:
        """Return when all ranks serve. Raises TransportError."""
        for rank in self._ranks:
            self._control.request(rank.name, IntegrityQuery(), self._deadline)

    @property
    def lost(self) -> dict[str, str]:
        """Who is lost and why, the first one first: ranks, hosts, and whom they miss."""
        return dict(self._lost)

    def check(self) -> None:
        """PeerLost if a rank, or anybody else whom one of them needs, is lost."""
        for name, reason in list(self._lost.items()):
            raise PeerLost(reason, peer=name)

    def integrity(self) -> IntegrityReply:
        """What the ranks' local executors say of their pages, as if they were one, all steps taken
        up that they have been sent.

        Raises:
            PeerLost, DeadlineExceeded: a rank does not answer.
        """
        replies: dict[str, IntegrityReply] = {}
        for rank in self._ranks:
            deadline = time.monotonic() + _QUERY_TIMEOUT_S
            reply = self._control.request(rank.name, IntegrityQuery(self.num_steps), deadline)
            assert isinstance(reply, IntegrityReply), f"{rank.name} answered {reply!r}"
            replies[rank.name] = reply
        problems = [f"{name}: {p}" for name, reply in replies.items() for p in reply.problems]
        first = replies[self._ranks[0].name]
        problems += [
            f"{name} holds sequences {sorted(reply.sequences)} in {reply.pages_used} pages, "
            f"another rank {sorted(first.sequences)} in {first.pages_used}"
            for name, reply in replies.items()
            if (reply.pages_used, set(reply.sequences)) != (first.pages_used, set(first.sequences))
        ]
        return IntegrityReply(
            problems=tuple(problems),
            pages_used=first.pages_used * self._config.tensor_parallel_size,
            pages_total=first.pages_total * self._config.tensor_parallel_size,
            sequences=first.sequences,
        )

    def note_lost(self, name: str, reason: str) -> None:
        """Somebody whom steps need is lost: wake whoever waits for a rank. From any thread."""
        with self._lock:
            if self._closing or name in self._lost:
                return
            self._lost[name] = reason
            links = list(self.links.values())
        logger.error("%s is lost: %s", name, reason)
        for link in links:
            link.fail(reason)

    def missed(self, error: PeerLost) -> None:
        """A rank's link failed: raise PeerLost for whoever was lost first.

        Links also fail because somebody else is lost. If nobody is known to be, it is the rank.
        """
        self.check()
        self.note_lost(error.peer, error.reason)
        self.check()

    def close(self) -> None:
        """End all hosts and ranks, politely at first. Idempotent; blocks for seconds at most."""
        with self._lock:
            self._closing = True
        for name in (*(rank.name for rank in self._ranks), *self._hosts):
            try:
                self._control.send(name, ShutdownWorker())
            except PeerLost:
                logger.debug("%s is gone already", name)
        deadline = time.monotonic() + (0.0 if self._lost else _CLOSE_GRACE_S)
        for host in self._hosts.values():
            host.join(max(0.0, deadline - time.monotonic()))
        for host in self._hosts.values():
            host.terminate(_TERMINATE_GRACE_S)
        for link in self.links.values():
            link.close()
        self._control.close()

    def _rank_start(self, rank: _Rank) -> RankStart:
        index = sorted(self._ranks).index(rank)
        return RankStart(
            name=rank.name,
            address=self._control.address,
            token=self._control.token.line,
            replica=rank.replica,
            num_replicas=self._config.model_replicas,
            tensor_rank=rank.tensor_rank,
            num_tensor_ranks=self._config.tensor_parallel_size,
            num_threads=self._deployment.num_threads,
            cores=self._deployment.model_cores[index],
            startup_timeout_s=self._config.startup_timeout_s,
        )

    def _assignment(
        self,
        rank: _Rank,
        model: SlicedModel,
        worker_names: dict[int, str],
    ) -> AssignRank:
        config, deployment = self._config, self._deployment
        previous = next(r for r in self._ranks if self._following(r) == rank)
        is_leader = rank.tensor_rank == 0
        followers = [r for r in self._ranks if r.replica == rank.replica and r.tensor_rank]
        return AssignRank(
            engine=self._peer(rank, ENGINE),
            previous=self._peer(rank, previous.name) if previous != rank else None,
            followers=tuple(self._peer(rank, r.name) for r in followers if is_leader),
            executors=tuple((e, self._peer(rank, name)) for e, name in worker_names.items()),
            page_units=tuple((e, deployment.page_units[e]) for e in worker_names),
            transport="tcp" if config.transport == "tcp" else "shm",
            host=_LOCALHOST,
            num_micro_batches=deployment.max_depth,
            num_units=deployment.units,
            num_pages=deployment.num_pages[LOCAL],
            page_tokens=config.block_size,
            kv_cache_dtype=config.kv_cache_dtype,
            max_rows=config.max_num_batched_tokens,
            max_spans=config.max_num_seqs,
            max_shares=max_shares(config, deployment.units),
            early_q=config.early_q,
            defer=config.defer,
            step_deadline_s=config.step_deadline_s,
            busy_poll_s=config.busy_poll_s,
        )

    def _following(self, rank: _Rank) -> _Rank:
        return rank._replace(replica=(rank.replica + 1) % self._config.model_replicas)

    def _secret(self, rank: _Rank, peer: str) -> bytes:
        """What `peer` presents to the rank's listener."""
        return self._secrets.setdefault((rank.name, peer), secrets.token_bytes(32))

    def _peer(self, rank: _Rank, name: str) -> RankPeer:
        return RankPeer(name, self._secret(rank, name), self._fingerprint)

    def _address(self, rank: _Rank, peer: _Rank) -> RankAddress:
        """Where and how `peer` connects to the rank."""
        return RankAddress(self._addresses[rank], self._secret(rank, peer.name), self._fingerprint)

    def _wait_for_joins(self) -> None:
        missing = {*(rank.name for rank in self._ranks), *self._hosts}
        while missing:
            try:
                self.check()
            except PeerLost as error:
                raise EngineDead(f"{error.peer} could not start: {error.reason}") from error
            try:
                until = min(self._deadline, time.monotonic() + 0.1)
                name, join = self._control.wait_for_join(until)
                self.pids[name] = join.pid
                missing.discard(name)
            except DeadlineExceeded:
                if time.monotonic() >= self._deadline:
                    raise EngineDead(
                        f"{', '.join(sorted(missing))} did not start within "
                        f"{self._config.startup_timeout_s:.0f} s"
                    ) from None

    def _on_exit(self, name: str, exit_code: int) -> None:
        """A host's process ended (called by its watcher's thread)."""
        reason = f"its process ended with exit code {exit_code}"
        self.note_lost(name, reason)
        self._control.declare_lost(name, reason)


def max_shares(config: EngineConfig, num_units: int) -> int:
    """Most shares of all spans of a step: of every sequence, those that attend and that store."""
    per_span = 1 + num_units * max(1, len(config.attention_workers))
    return 2 * config.max_num_seqs * per_span


def _joined(parts: Sequence[bytes | None]) -> torch.Tensor | None:
    """Sinks of all heads from those of the ranks, in order."""
    data = b"".join(part for part in parts if part is not None)
    return torch.frombuffer(bytearray(data), dtype=torch.float32) if data else None
