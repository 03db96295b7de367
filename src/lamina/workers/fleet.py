"""All attention executors of an engine: the local one and the attention workers' processes."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable

import torch

from lamina import _native
from lamina.attention.executor import AttentionExecutor
from lamina.attention.spec import fingerprint
from lamina.config import EngineConfig
from lamina.convert import SlicedModel
from lamina.errors import CapacityError, DeadlineExceeded, EngineDead, PeerLost
from lamina.transport.control import ControlServer
from lamina.transport.handshake import Listener
from lamina.transport.inproc import inproc_pair
from lamina.transport.native import NativeLink
from lamina.transport.topology import step_mailboxes
from lamina.transport.wire import (
    Assign,
    Assigned,
    IntegrityQuery,
    IntegrityReply,
    LinkAddress,
    ShutdownWorker,
    WorkerError,
)
from lamina.types import LOCAL
from lamina.workers.attention import WorkerStart, integrity, run_attention_worker
from lamina.workers.deployment import Deployment
from lamina.workers.plans import PlanEnd
from lamina.workers.process import WorkerProcess
from lamina.workers.ranks import ModelRanks
from lamina.workers.routes import ExecutorEnd
from lamina.workers.serving import ExecutorServer

logger = logging.getLogger("lamina.workers")

_CLOSE_GRACE_S = 3.0
_QUERY_TIMEOUT_S = 10.0


def worker_name(executor: int) -> str:
    """What an attention worker is called that the engine starts."""
    return f"attention-worker-{executor}"


class ExecutorFleet:
    """Starts, watches and stops the executors. Used by the engine's thread, except `_on_lost`."""

    def __init__(
        self,
        config: EngineConfig,
        model: SlicedModel,
        deployment: Deployment,
        pool: _native.ThreadPool | None,
        ranks: ModelRanks | None,
    ) -> None:
        """Prepare; `start` is the way to get a running fleet."""
        self.ends: list[ExecutorEnd] = []
        """The model worker's ends of the same links; none where ranks of their own have them."""
        self.plan_ends: list[PlanEnd] = []
        """The engine's ends of the links to all executors that it posts plans to."""
        self.read_bytes_per_s: dict[int, float] = {}
        """How fast each remote executor reads memory, measured when it joined."""
        self._config = config
        self._model = model
        self._deployment = deployment
        self._names = {e: worker_name(e) for e in deployment.remote} | {LOCAL: "local"}
        self._executors = {name: e for e, name in self._names.items()}
        self._processes: dict[int, WorkerProcess] = {}
        self._links: dict[int, NativeLink] = {}
        self._lost: dict[int, str] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._control: ControlServer | None = None
        self._ranks = ranks
        self._local = None if pool is None else self._start_local(pool)

    @classmethod
    def start(
        cls,
        config: EngineConfig,
        model: SlicedModel,
        deployment: Deployment,
        *,
        pool: _native.ThreadPool | None = None,
        ranks: ModelRanks | None = None,
    ) -> ExecutorFleet:
        """Start all executors and connect them.

        Args:
            model: with ranks, its structure and sinks are enough.
            pool: the model worker's threads, which the local executor uses when slices do not.
            ranks: instead of a pool: the model's ranks, which have local executors of their own and
                wait for the attention workers.

        Raises:
            CapacityError: a cache's memory cannot be had.
            EngineDead: a worker process did not start.
        """
        fleet = cls(config, model, deployment, pool, ranks)
        try:
            if deployment.remote:
                fleet._start_remote()
        except BaseException:
            fleet.close()
            raise
        return fleet

    @property
    def pids(self) -> dict[int, int]:
        """Of the attention workers' processes."""
        return {executor: process.pid for executor, process in self._processes.items()}

    def name(self, executor: int) -> str:
        return self._names[executor]

    def lost(self, executor: int) -> str | None:
        """Why an executor is lost; None while it lives."""
        return self._lost.get(executor)

    def check(self) -> None:
        """PeerLost if any executor, or a rank, is lost."""
        if self._ranks is not None:
            self._ranks.check()
        for executor, reason in list(self._lost.items()):
            raise PeerLost(reason, peer=self._names[executor])

    def integrity(self) -> dict[int, IntegrityReply]:
        """What every executor says of its pages, all posted plans served.

        Raises:
            PeerLost, DeadlineExceeded: a worker does not answer.
        """
        reports: dict[int, IntegrityReply] = {}
        if self._local is not None:
            reports[LOCAL] = integrity(self._local)
        elif self._ranks is not None:
            reports[LOCAL] = self._ranks.integrity()
        for end in self.plan_ends:
            if end.executor == LOCAL:
                continue
            assert self._control is not None
            name = self._names[end.executor]
            deadline = time.monotonic() + _QUERY_TIMEOUT_S
            reply = self._control.request(name, IntegrityQuery(end.num_plans), deadline)
            assert isinstance(reply, IntegrityReply), f"{name} answered {type(reply).__name__}"
            reports[end.executor] = reply
        return reports

    def close(self) -> None:
        """End all worker processes, politely at first. Idempotent; blocks for seconds at most."""
        self._closing = True
        for executor in self._processes:
            if self._control is not None and executor not in self._lost:
                try:
                    self._control.send(self._names[executor], ShutdownWorker())
                except PeerLost:
                    logger.debug("%s is gone already", self._names[executor])
        # After a loss the others may be waiting inside the step that was given up: only a signal
        # reaches them. A lost one that still exists is stopped or stuck: SIGTERM may not reach it.
        deadline = time.monotonic() + (0.0 if self._lost else _CLOSE_GRACE_S)
        for executor, process in self._processes.items():
            process.join(max(0.0, deadline - time.monotonic()))
            process.terminate(grace_s=0.0 if executor in self._lost else 1.0)
        for link in self._links.values():
            link.close()
        if self._control is not None:
            self._control.close()

    def _start_local(self, pool: _native.ThreadPool) -> AttentionExecutor:
        model, deployment = self._model, self._deployment
        executor = AttentionExecutor(
            model.attention_specs,
            model.sinks,
            dtype=model.dtype,
            num_pages=deployment.num_pages[LOCAL],
            page_tokens=self._config.block_size,
            units=deployment.units,
            page_units=deployment.page_units[LOCAL],
            kv_cache_dtype=self._config.kv_cache_dtype,
            pool=pool,
        )
        ours, theirs = inproc_pair("model-worker", "local", lambda: server.loop.pump())
        server = ExecutorServer(
            theirs,
            executor,
            dtype=model.dtype,
            max_rows=self._config.max_num_batched_tokens,
            max_spans=self._config.max_num_seqs,
            step_deadline_s=self._config.step_deadline_s,
            num_micro_batches=deployment.max_depth,
        )
        self._connect(LOCAL, ours, on_plan=server.take_plan)
        return executor

    def _start_remote(self) -> None:
        config, deployment = self._config, self._deployment
        deadline = time.monotonic() + config.startup_timeout_s
        self._control = ControlServer(
            heartbeat_interval_s=config.heartbeat_interval_s,
            heartbeat_timeout_s=config.heartbeat_timeout_s,
            on_lost=self._on_lost,
        )
        for executor in deployment.remote:
            start = WorkerStart(
                name=self._names[executor],
                address=self._control.address,
                token=self._control.token.line,
                num_threads=deployment.worker_num_threads[executor],
                cores=deployment.worker_cores[executor],
                startup_timeout_s=config.startup_timeout_s,
            )
            self._processes[executor] = WorkerProcess(
                self._names[executor],
                run_attention_worker,
                (start,),
                num_threads=deployment.worker_num_threads[executor],
                on_exit=self._on_exit,
            )
        self._wait_for_joins(self._control, deadline)
        # All workers that the engine starts itself are on this machine.
        listener = Listener(
            "127.0.0.1:0" if config.transport == "tcp" else "unix:@",
            busy_poll_s=config.busy_poll_s,
        )
        try:
            for executor in deployment.remote:
                self._assign(self._control, listener, executor, deadline)
        finally:
            listener.close()

    def _wait_for_joins(self, control: ControlServer, deadline: float) -> None:
        joined: set[str] = set()
        while len(joined) < len(self._processes):
            self.check()
            try:
                joined.add(control.wait_for_join(min(deadline, time.monotonic() + 0.1)).name)
            except DeadlineExceeded:
                if time.monotonic() >= deadline:
                    missing = sorted(set(self._names.values()) - joined - {"local"})
                    raise EngineDead(
                        f"{', '.join(missing)} did not start within "
                        f"{self._config.startup_timeout_s:.0f} s"
                    ) from None

    def _assign(
        self, control: ControlServer, listener: Listener, executor: int, deadline: float
    ) -> None:
        config, model, deployment = self._config, self._model, self._deployment
        dtype = str(model.dtype).removeprefix("torch.")
        name, secret = self._names[executor], secrets.token_bytes(32)
        tensor_links = () if self._ranks is None else self._ranks.tensor_links(name)
        digest = fingerprint(model.attention_specs, dtype)
        assign = Assign(
            executor=executor,
            specs=model.attention_specs,
            sinks=tuple(None if sinks is None else _bytes(sinks) for sinks in model.sinks),
            units=deployment.units,
            page_units=deployment.page_units[executor],
            dtype=dtype,
            kv_cache_dtype=config.kv_cache_dtype,
            num_pages=deployment.num_pages[executor],
            page_tokens=config.block_size,
            max_rows=config.max_num_batched_tokens,
            max_spans=config.max_num_seqs,
            num_micro_batches=deployment.max_depth,
            num_ranks=deployment.tensor_parallel_size,
            plan_link=LinkAddress(listener.address, secret),
            tensor_links=tensor_links,
            fingerprint=digest,
            step_deadline_s=config.step_deadline_s,
            busy_poll_s=config.busy_poll_s,
        )
        reply = control.request(name, assign, deadline)
        if isinstance(reply, WorkerError):
            error = CapacityError if reply.kind == CapacityError.__name__ else EngineDead
            raise error(f"{name}: {reply.message}")
        assert isinstance(reply, Assigned), f"{name} answered {type(reply).__name__}"
        self.read_bytes_per_s[executor] = reply.read_bytes_per_s
        link = listener.accept({secret: (name, digest)}, deadline)
        self._connect(executor, link)

    def _connect(
        self, executor: int, link: NativeLink, on_plan: Callable[[], None] | None = None
    ) -> None:
        model, deployment, config = self._model, self._deployment, self._config
        max_rows, num_ranks = config.max_num_batched_tokens, deployment.tensor_parallel_size
        channels = step_mailboxes(
            model.attention_specs, model.dtype.itemsize, max_rows, deployment.max_depth * num_ranks
        )
        self.plan_ends.append(
            PlanEnd(
                executor,
                link,
                channels,
                max_spans=config.max_num_seqs,
                num_ranks=num_ranks,
                units=deployment.units,
                on_plan=on_plan,
            )
        )
        if self._ranks is None:
            self.ends.append(
                ExecutorEnd(
                    executor,
                    link,
                    model.attention_specs,
                    dtype=model.dtype,
                    max_rows=max_rows,
                    page_units=deployment.page_units[executor],
                    num_micro_batches=deployment.max_depth,
                )
            )
        with self._lock:
            self._links[executor] = link
            reason = self._lost.get(executor)
        if reason is not None:
            link.fail(reason)

    def _on_exit(self, name: str, exit_code: int) -> None:
        """A worker's process ended (called by its watcher's thread)."""
        reason = f"its process ended with exit code {exit_code}"
        self._on_lost(name, reason)
        if self._control is not None:
            self._control.declare_lost(name, reason)

    def _on_lost(self, name: str, reason: str) -> None:
        """A worker is lost (called by the control channel's or a watcher's thread)."""
        executor = self._executors.get(name)
        if executor is None:  # a worker misses a rank
            assert self._ranks is not None, f"nobody is called {name}"
            self._ranks.note_lost(name, reason)
            return
        with self._lock:
            if self._closing or executor in self._lost:
                return
            self._lost[executor] = reason
            link = self._links.get(executor)
        logger.error("%s is lost: %s", name, reason)
        if link is not None:
            link.fail(reason)
        if self._ranks is not None:
            self._ranks.note_lost(name, reason)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()
