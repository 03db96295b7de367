"""How a rank takes up its assignment: memory, a listener, and links to everybody it talks to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamina._native import ThreadPool
from lamina.attention.executor import AttentionExecutor
from lamina.convert import SlicedModel
from lamina.convert.collectives import use_group
from lamina.convert.process_group import ProcessGroup, Rendezvous, join_store, open_store
from lamina.errors import LaminaError
from lamina.transport.control_client import ControlClient
from lamina.transport.handshake import Listener, connect
from lamina.transport.native import NativeLink
from lamina.transport.rank_wire import (
    AssignRank,
    ConnectRank,
    RankAddress,
    RankAssigned,
    RankPeer,
)
from lamina.transport.wire import WorkerError

if TYPE_CHECKING:
    from lamina.workers.rank import RankStart


@dataclass(frozen=True, slots=True)
class RankLinks:
    """What a rank was assigned, and the peers that it talks to."""

    assign: AssignRank
    local: AttentionExecutor
    """For prompts in progress; with the pages of all layers."""
    engine: NativeLink
    executors: dict[int, NativeLink]
    """Attention workers by their executor ids."""
    previous: NativeLink | None
    following: NativeLink | None
    """The replicas before and after this one; None with one replica."""
    leader: NativeLink | None
    """The first rank of this replica; None for that itself."""
    followers: list[NativeLink]
    """The other ranks of this replica; empty but for the first."""

    def all(self) -> list[NativeLink]:
        links = (self.engine, self.previous, self.following, self.leader)
        present = [link for link in links if link is not None]
        return [*present, *self.executors.values(), *self.followers]


@contextlib.contextmanager
def connected(
    control: ControlClient,
    start: RankStart,
    model: SlicedModel,
    pool: ThreadPool,
    deadline: float,
) -> Iterator[RankLinks]:
    """Receive the assignment, allocate, and connect with all peers. Closes the links in the end.

    Raises:
        CapacityError: the local executor's pages cannot be had.
        TransportError: a peer did not come or could not be reached in time.
    """
    incoming = control.receive(deadline)
    assign = incoming.message
    assert isinstance(assign, AssignRank), "an assignment comes first"
    try:
        local = _local_executor(assign, start, model, pool)
        listener = Listener(
            "unix:@" if assign.transport == "shm" else f"{assign.host}:0",
            name=start.name,
            busy_poll_s=assign.busy_poll_s,
        )
    except LaminaError as error:
        control.reply(incoming, WorkerError(type(error).__name__, str(error)))
        raise
    with contextlib.closing(listener):
        store, store_port = None, None
        if start.num_tensor_ranks > 1 and start.tensor_rank == 0:
            store, place = open_store(assign.host, timeout_s=start.startup_timeout_s)
            store_port = place.port
        sinks = tuple(None if s is None else s.numpy().tobytes() for s in model.sinks)
        control.reply(
            incoming, RankAssigned(address=listener.address, sinks=sinks, store_port=store_port)
        )
        order = control.receive(deadline).message
        assert isinstance(order, ConnectRank), "then the engine says with whom to connect"
        links = _connect(listener, assign, order, start.name, local, deadline)
    try:
        if order.store_port is not None:
            rest_s = deadline - time.monotonic()
            if store is None:
                store = join_store(Rendezvous(order.store_host, order.store_port), timeout_s=rest_s)
            use_group(
                ProcessGroup(
                    store,
                    start.tensor_rank,
                    start.num_tensor_ranks,
                    timeout_s=assign.step_deadline_s,
                    address=assign.host,
                )
            )
        yield links
    finally:
        use_group(None)
        for link in links.all():
            link.close()


def _connect(
    listener: Listener,
    assign: AssignRank,
    order: ConnectRank,
    name: str,
    local: AttentionExecutor,
    deadline: float,
) -> RankLinks:
    # Every rank of a ring dials and answers at the same time.
    with ThreadPoolExecutor(max_workers=2) as dialling:

        def dial(to: RankAddress) -> NativeLink:
            return connect(
                to.address, to.secret, to.fingerprint, name, deadline,
                busy_poll_s=assign.busy_poll_s,
            )  # fmt: skip

        following, leader = (
            dialling.submit(dial, to) if to is not None else None
            for to in (order.following, order.leader)
        )
        peers = [assign.engine, *assign.followers, *(peer for _, peer in assign.executors)]
        if assign.previous is not None:
            peers.append(assign.previous)
        accepted = _accept(listener, peers, deadline)
        return RankLinks(
            assign=assign,
            local=local,
            engine=accepted[assign.engine.name],
            executors={executor: accepted[peer.name] for executor, peer in assign.executors},
            previous=accepted[assign.previous.name] if assign.previous is not None else None,
            following=following.result() if following is not None else None,
            leader=leader.result() if leader is not None else None,
            followers=[accepted[peer.name] for peer in assign.followers],
        )


def _accept(
    listener: Listener, peers: Sequence[RankPeer], deadline: float
) -> dict[str, NativeLink]:
    """The links of all peers, by name, in whatever order they come."""
    waiting = {peer.secret: (peer.name, peer.fingerprint) for peer in peers}
    accepted: dict[str, NativeLink] = {}
    while waiting:
        link = listener.accept(waiting, deadline)
        accepted[link.peer] = link
        waiting = {s: peer for s, peer in waiting.items() if peer[0] != link.peer}
    return accepted


def _local_executor(
    assign: AssignRank, start: RankStart, model: SlicedModel, pool: ThreadPool
) -> AttentionExecutor:
    """With the pages of this rank's heads; it shares the threads with the slices."""
    units = assign.num_units // start.num_tensor_ranks
    return AttentionExecutor(
        model.attention_specs,
        model.sinks,
        dtype=model.dtype,
        num_pages=assign.num_pages,
        page_tokens=assign.page_tokens,
        units=units,
        page_units=units,
        kv_cache_dtype=assign.kv_cache_dtype,
        pool=pool,
    )
