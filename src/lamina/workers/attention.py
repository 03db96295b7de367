"""The attention worker: a process with its own KV pages that serves one engine.

Life: join over the control channel -> receive an assignment (specs, pages, where to connect) ->
allocate and measure -> open the links -> serve steps until told to stop or a peer is gone.
"""

from __future__ import annotations

import logging
import time

import msgspec
import torch

from lamina._native import MemoryReader, ThreadPool
from lamina.attention.executor import AttentionExecutor
from lamina.attention.partition import shard_specs
from lamina.errors import DeadlineExceeded, LaminaError, PeerLost
from lamina.kv.pages import bytes_per_page, cache_dtype_name
from lamina.transport.control_client import ControlClient, Incoming
from lamina.transport.handshake import connect
from lamina.transport.join_token import JoinToken
from lamina.transport.native import NativeLink
from lamina.transport.wire import (
    Assign,
    Assigned,
    IntegrityQuery,
    IntegrityReply,
    LinkAddress,
    ShutdownWorker,
    WorkerError,
)
from lamina.workers.blame import tell_and_wait, was_told_to_stop
from lamina.workers.identity import describe_self, show_name
from lamina.workers.process import pinned_pool
from lamina.workers.serving import ExecutorServer

logger = logging.getLogger("lamina.attention")

_CONTROL_POLL_S = 0.05
"""How often a worker that has nothing to do looks for control messages."""
_PROBE_BYTES = 128 << 20
"""Memory that is read to measure its bandwidth: more than caches hold."""
_PROBE_S = 0.1
_PROBE_READS = 5


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """What an attention worker must know to find its engine."""

    name: str
    address: str
    """host:port of the engine's control channel."""
    token: str
    """The join token's line."""
    num_threads: int
    cores: tuple[int, ...]
    """Cores to keep to; empty: any."""
    startup_timeout_s: float


def run_attention_worker(start: WorkerStart) -> None:
    """Serve until the engine says stop; the body of the worker's process.

    Raises:
        SystemExit: the engine refused, is gone, or broke the protocol. It was told why where it can
            still hear it.
    """
    show_name(start.name)
    try:
        _join_and_serve(start)
    except LaminaError as error:
        logger.error("%s stops: %s", start.name, error)
        raise SystemExit(1) from None


def _join_and_serve(start: WorkerStart) -> None:
    deadline = time.monotonic() + start.startup_timeout_s
    control = ControlClient(
        start.address,
        JoinToken.parse(start.token),
        describe_self(start.name, num_threads=start.num_threads),
        deadline=deadline,
    )
    links: list[NativeLink] = []
    try:
        pool = pinned_pool(start.num_threads, start.cores)
        _Worker(control, pool, links, deadline).serve()
    except Exception as error:  # whatever it is, the engine must learn of it
        if isinstance(error, PeerLost) and was_told_to_stop(control):
            return  # and so was the peer, a moment earlier
        tell_and_wait(control, error)
        raise
    finally:
        for link in links:
            link.close()
        control.close()


class _Worker:
    """An attention worker that has joined."""

    def __init__(
        self, control: ControlClient, pool: ThreadPool, links: list[NativeLink], deadline: float
    ) -> None:
        """`links`: takes those that are opened here; the caller closes them."""
        self._control = control
        self._queries: list[Incoming] = []
        self._links = links
        incoming = control.receive(deadline)
        assign = incoming.message
        assert isinstance(assign, Assign), "an assignment comes first"
        try:
            read_bytes_per_s = _read_speed(assign, pool)
            self._executor = _executor(assign, pool)
        except LaminaError as error:
            control.reply(incoming, WorkerError(type(error).__name__, str(error)))
            raise
        control.reply(incoming, Assigned(assign.num_pages, read_bytes_per_s))
        plan_link = self._open(assign, assign.plan_link, deadline)
        tensor_links = [self._open(assign, link, deadline) for link in assign.tensor_links]
        self._server = ExecutorServer(
            plan_link,
            self._executor,
            dtype=getattr(torch, assign.dtype),
            max_rows=assign.max_rows,
            max_spans=assign.max_spans,
            step_deadline_s=assign.step_deadline_s,
            num_micro_batches=assign.num_micro_batches,
            tensor_links=[
                tensor_links[i : i + assign.num_ranks]
                for i in range(0, len(tensor_links), assign.num_ranks)
            ],
        )

    def _open(self, assign: Assign, link: LinkAddress, deadline: float) -> NativeLink:
        opened = connect(
            link.address,
            link.secret,
            assign.fingerprint,
            self._control.name,
            deadline,
            busy_poll_s=assign.busy_poll_s,
        )
        self._links.append(opened)
        return opened

    def serve(self) -> None:
        """Steps and control messages, until ShutdownWorker."""
        while not self._handle_control():
            self._server.serve(time.monotonic() + _CONTROL_POLL_S)

    def _handle_control(self) -> bool:
        """Answer what has come; True when told to stop."""
        while True:
            try:
                incoming = self._control.receive(time.monotonic())
            except DeadlineExceeded:
                break
            match incoming.message:
                case IntegrityQuery():
                    self._queries.append(incoming)
                case ShutdownWorker():
                    return True
                case message:
                    logger.warning("ignored a %s", type(message).__name__)
        self._answer_queries()
        return False

    def _answer_queries(self) -> None:
        """Answer the integrity queries whose plans have all been served."""
        waiting = []
        for incoming in self._queries:
            query = incoming.message
            assert isinstance(query, IntegrityQuery)
            if query.num_plans > self._server.num_plans:
                waiting.append(incoming)
            else:
                self._control.reply(incoming, integrity(self._executor))
        self._queries = waiting


def integrity(executor: AttentionExecutor) -> IntegrityReply:
    """The state of an executor's page books."""
    return IntegrityReply(
        problems=tuple(executor.check_integrity()),
        pages_used=executor.num_pages - executor.num_free_pages,
        pages_total=executor.num_pages,
        sequences=tuple(executor.sequences),
    )


def _executor(assign: Assign, pool: ThreadPool) -> AttentionExecutor:
    return AttentionExecutor(
        assign.specs,
        [_float32(sinks) for sinks in assign.sinks],
        dtype=getattr(torch, assign.dtype),
        num_pages=assign.num_pages,
        page_tokens=assign.page_tokens,
        units=assign.units,
        page_units=assign.page_units,
        num_ranks=assign.num_ranks,
        kv_cache_dtype=assign.kv_cache_dtype,
        pool=pool,
    )


def _read_speed(assign: Assign, pool: ThreadPool) -> float:
    """Bytes per second that the pool's threads read together: the best of some tries.

    As much memory as the pages take, up to `_PROBE_BYTES`; takes about 0.2 s at most.
    """
    specs = shard_specs(assign.specs, 0, assign.page_units, assign.units)
    cache_dtype = cache_dtype_name(assign.kv_cache_dtype, assign.dtype)
    page_bytes = bytes_per_page(specs, assign.page_tokens, cache_dtype)
    reader = MemoryReader(min(assign.num_pages * page_bytes, _PROBE_BYTES), pool)
    seconds: list[float] = []
    while len(seconds) < _PROBE_READS and sum(seconds) < _PROBE_S:
        seconds.append(reader.read())
    return reader.size / min(seconds)


def _float32(data: bytes | None) -> torch.Tensor | None:
    return None if data is None else torch.frombuffer(bytearray(data), dtype=torch.float32)
