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
from lamina.attention.partition import query_head_range, shard_specs
from lamina.attention.spec import fingerprint
from lamina.config import EngineConfig
from lamina.convert import SlicedModel
from lamina.errors import CapacityError, DeadlineExceeded, EngineDead, PeerLost
from lamina.transport.control import ControlServer
from lamina.transport.handshake import Listener
from lamina.transport.inproc import inproc_pair
from lamina.transport.native import NativeLink
from lamina.transport.wire import (
    Assign,
    IntegrityQuery,
    IntegrityReply,
    ShutdownWorker,
    WorkerError,
)
from lamina.types import LOCAL
from lamina.workers.attention import WorkerStart, integrity, run_attention_worker
from lamina.workers.deployment import Deployment
from lamina.workers.process import WorkerProcess
from lamina.workers.routes import ExecutorEnd, Share
from lamina.workers.serving import ExecutorServer

logger = logging.getLogger("lamina.workers")

_CLOSE_GRACE_S = 3.0
_QUERY_TIMEOUT_S = 10.0


class ExecutorFleet:
    """Starts, watches and stops the executors. Used by the engine's thread, except `_on_lost`."""

    def __init__(
        self,
        config: EngineConfig,
        model: SlicedModel,
        deployment: Deployment,
        pool: _native.ThreadPool,
    ) -> None:
        """Prepare; `start` is the way to get a running fleet."""
        self.ends: list[ExecutorEnd] = []
        """The model worker's ends of the links to all executors."""
        self._config = config
        self._model = model
        self._deployment = deployment
        self._names = {e: f"attention-worker-{e}" for e in deployment.remote} | {LOCAL: "local"}
        self._executors = {name: e for e, name in self._names.items()}
        self._processes: dict[int, WorkerProcess] = {}
        self._links: dict[int, NativeLink] = {}
        self._lost: dict[int, str] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._control: ControlServer | None = None
        self._local = self._start_local(pool)

    @classmethod
    def start(
        cls,
        config: EngineConfig,
        model: SlicedModel,
        deployment: Deployment,
        pool: _native.ThreadPool,
    ) -> ExecutorFleet:
        """Start all executors and connect them.

        Args:
            pool: the model worker's threads, which the local executor uses when slices do not.

        Raises:
            CapacityError: a cache's memory cannot be had.
            EngineDead: a worker process did not start.
        """
        fleet = cls(config, model, deployment, pool)
        try:
            if deployment.remote:
                fleet._start_remote()
        except BaseException:
            fleet.close()
            raise
        return fleet

    def name(self, executor: int) -> str:
        return self._names[executor]

    def lost(self, executor: int) -> str | None:
        """Why an executor is lost; None while it lives."""
        return self._lost.get(executor)

    def check(self) -> None:
        """PeerLost if any executor is lost."""
        for executor, reason in list(self._lost.items()):
            raise PeerLost(reason, peer=self._names[executor])

    def integrity(self) -> dict[int, IntegrityReply]:
        """What every executor says of its pages, all posted plans served.

        Raises:
            PeerLost, DeadlineExceeded: a worker does not answer.
        """
        reports: dict[int, IntegrityReply] = {}
        for end in self.ends:
            if end.executor == LOCAL:
                reports[LOCAL] = integrity(self._local)
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
        specs = model.attention_specs
        executor = AttentionExecutor(
            specs,
            model.sinks,
            dtype=model.dtype,
            num_pages=deployment.num_pages[LOCAL],
            page_tokens=self._config.block_size,
            kv_cache_dtype=self._config.kv_cache_dtype,
            pool=pool,
        )
        ours, theirs = inproc_pair("model-worker", "local", lambda: server.loop.pump())
        server = ExecutorServer(
            theirs,
            executor,
            specs,
            dtype=model.dtype,
            max_rows=self._config.max_num_batched_tokens,
            max_spans=self._config.max_num_seqs,
            step_deadline_s=self._config.step_deadline_s,
        )
        self._connect(LOCAL, ours, (0, 1, 1), on_plan=server.take_plan)
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
        partition = deployment.partition
        assert partition is not None
        share = (0, partition.units, partition.units)
        specs = shard_specs(model.attention_specs, *share)
        dtype = str(model.dtype).removeprefix("torch.")
        name, secret = self._names[executor], secrets.token_bytes(32)
        digest = fingerprint(specs, dtype)
        assign = Assign(
            executor=executor,
            specs=specs,
            sinks=tuple(
                None if sinks is None else _bytes(sinks[slice(*query_head_range(spec, *share))])
                for spec, sinks in zip(model.attention_specs, model.sinks, strict=True)
            ),
            dtype=dtype,
            kv_cache_dtype=config.kv_cache_dtype,
            num_pages=deployment.num_pages[executor],
            page_tokens=config.block_size,
            max_rows=config.max_num_batched_tokens,
            max_spans=config.max_num_seqs,
            tensor_address=listener.address,
            secret=secret,
            fingerprint=digest,
            step_deadline_s=config.step_deadline_s,
            busy_poll_s=config.busy_poll_s,
        )
        reply = control.request(name, assign, deadline)
        if isinstance(reply, WorkerError):
            error = CapacityError if reply.kind == CapacityError.__name__ else EngineDead
            raise error(f"{name}: {reply.message}")
        link = listener.accept({secret: (name, digest)}, deadline)
        self._connect(executor, link, share)

    def _connect(
        self,
        executor: int,
        link: NativeLink,
        share: Share,
        on_plan: Callable[[], None] | None = None,
    ) -> None:
        self.ends.append(
            ExecutorEnd(
                executor,
                link,
                self._model.attention_specs,
                share,
                dtype=self._model.dtype,
                max_rows=self._config.max_num_batched_tokens,
                max_spans=self._config.max_num_seqs,
                on_plan=on_plan,
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
        executor = self._executors[name]
        with self._lock:
            if self._closing or executor in self._lost:
                return
            self._lost[executor] = reason
            link = self._links.get(executor)
        logger.error("%s is lost: %s", name, reason)
        if link is not None:
            link.fail(reason)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()
