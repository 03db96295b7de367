"""The model host: a process that loads a model's weights and forks a rank per replica from it.

There is one per tensor-parallel rank. The replicas' ranks read the same memory, so that a machine
has one copy of the weights however many replicas there are. The host then only watches its ranks.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time

import msgspec

from lamina._native import ThreadPool
from lamina.config import EngineConfig
from lamina.errors import DeadlineExceeded, LaminaError
from lamina.transport.control_client import ControlClient
from lamina.transport.join_token import JoinToken
from lamina.transport.rank_wire import LostPeer
from lamina.transport.wire import ShutdownWorker, WorkerError
from lamina.workers.forked import ForkedWorkers
from lamina.workers.identity import describe_self, show_name
from lamina.workers.rank import RankStart, load_model, run_rank

logger = logging.getLogger("lamina.model")

_POLL_S = 0.1
"""How often the host looks for control messages; a rank's end wakes it at once."""
_TERMINATE_GRACE_S = 0.5


class HostStart(msgspec.Struct, frozen=True, kw_only=True):
    """What a model host must know."""

    name: str
    config: EngineConfig
    ranks: tuple[RankStart, ...]
    """Its ranks, of all replicas; they have the same part of the model."""


def run_model_host(start: HostStart) -> None:
    """Load, fork, watch the ranks until the engine says stop; the body of the host's process.

    It must run with one torch thread (`WorkerProcess(num_threads=1)`): it forks.

    Raises:
        SystemExit: with code 1 if the engine is gone, or the model cannot be loaded (which the
            engine was told).
    """
    show_name(start.name)
    try:
        _load_and_watch(start)
    except LaminaError as error:
        logger.error("%s stops: %s", start.name, error)
        raise SystemExit(1) from None


def _load_and_watch(start: HostStart) -> None:
    first = start.ranks[0]
    deadline = time.monotonic() + start.config.startup_timeout_s
    try:
        pool = ThreadPool(1)
        model = load_model(start.config, first, pool)
    except Exception as error:
        with _joined(start, deadline) as control:
            control.send(WorkerError(type(error).__name__, str(error)))
        raise
    ranks = ForkedWorkers(
        {rank.name: functools.partial(run_rank, rank, model, pool) for rank in start.ranks}
    )
    try:
        with _joined(start, deadline) as control:
            _watch(control, ranks)
    finally:
        ranks.terminate(_TERMINATE_GRACE_S)


def _joined(start: HostStart, deadline: float) -> contextlib.closing[ControlClient]:
    rank = start.ranks[0]
    return contextlib.closing(
        ControlClient(
            rank.address,
            JoinToken.parse(rank.token),
            describe_self(start.name, num_threads=1),
            deadline=deadline,
        )
    )


def _watch(control: ControlClient, ranks: ForkedWorkers) -> None:
    """Tell the engine of ranks that end, until it says stop and all have."""
    is_stopping = False
    while len(ranks) or not is_stopping:
        for name, exit_code in ranks.wait(_POLL_S).items():
            if not is_stopping:
                control.send(LostPeer(name, f"its process ended with exit code {exit_code}"))
        until = time.monotonic() + (0.0 if len(ranks) else _POLL_S)
        with contextlib.suppress(DeadlineExceeded):
            is_stopping |= isinstance(control.receive(until).message, ShutdownWorker)
