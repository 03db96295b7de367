"""How a rank takes up its assignment: memory, a listener, and links to everybody it talks to."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lamina._native import ThreadPool
from lamina.attention.executor import AttentionExecutor
from lamina.attention.partition import head_units
from lamina.convert import SlicedModel
from lamina.convert.collectives import use_group
from lamina.convert.process_group import ProcessGroup, Rendezvous, join_store, open_store
from lamina.errors import LaminaError
from lamina.transport.control_client import ControlClient
from lamina.transport.handshake import Listener, connect
from lamina.transport.native import NativeLink
from lamina.transport.rank_wire import AssignRank, ConnectRank, RankAssigned, RankPeer
from lamina.transport.wire import WorkerError
from lamina.types import LOCAL

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

    def all(self) -> list[NativeLink]:
        links = (self.engine, *self.executors.values(), self.previous, self.following)
        return [link for link in links if link is not None]


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
    following: Future[NativeLink] = Future()
    if order.next_address is not None:
        # Every rank of the ring dials and answers at the same time.
        threading.Thread(
            target=_dial, args=(assign, order, name, deadline, following), daemon=True
        ).start()
    peers = [assign.engine, *(peer for _, peer in assign.executors)]
    if assign.previous is not None:
        peers.append(assign.previous)
    waiting = {peer.secret: (peer.name, peer.fingerprint) for peer in peers}
    accepted: dict[str, NativeLink] = {}
    try:
        while waiting:
            link = listener.accept(waiting, deadline)
            accepted[link.peer] = link
            waiting = {s: peer for s, peer in waiting.items() if peer[0] != link.peer}
        return RankLinks(
            assign=assign,
            local=local,
            engine=accepted[assign.engine.name],
            executors={executor: accepted[peer.name] for executor, peer in assign.executors},
            previous=accepted[assign.previous.name] if assign.previous is not None else None,
            following=following.result() if order.next_address is not None else None,
        )
    except LaminaError:
        for link in accepted.values():
            link.close()
        raise


def _dial(
    assign: AssignRank, order: ConnectRank, name: str, deadline: float, link: Future[NativeLink]
) -> None:
    assert order.next_address is not None
    try:
        link.set_result(
            connect(
                order.next_address,
                order.next_secret,
                order.next_fingerprint,
                name,
                deadline,
                busy_poll_s=assign.busy_poll_s,
            )
        )
    except LaminaError as error:
        link.set_exception(error)
