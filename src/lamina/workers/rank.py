"""A model rank: a process that runs one replica's slices, or one tensor-parallel part of them.

Life: forked by a model host with the weights in memory -> get threads -> join over the control
channel -> receive an assignment -> connect with engine, attention workers, the next replica and the
other ranks of its own -> serve steps until told to stop or the engine is gone.

A rank that fails tells the engine who is to blame and then waits to be told to stop: its links stay
open, so that nobody else is blamed for their end.
"""

from __future__ import annotations

import contextlib
import logging
import time

import msgspec

from lamina._native import ThreadPool
from lamina.config import EngineConfig
from lamina.convert import SlicedModel, TensorParallel, convert
from lamina.errors import LaminaError, PeerLost
from lamina.transport.control_client import ControlClient
from lamina.transport.join_token import JoinToken
from lamina.workers.blame import tell_and_wait, was_told_to_stop
from lamina.workers.identity import describe_self, show_name
from lamina.workers.process import limit_threads, pinned_pool
from lamina.workers.rank_links import connected
from lamina.workers.rank_loop import RankLoop

logger = logging.getLogger("lamina.model")


class RankStart(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank must know to find its engine, and who it is."""

    name: str
    address: str
    """host:port of the engine's control channel."""
    token: str
    """The join token's line."""
    replica: int
    num_replicas: int
    tensor_rank: int
    num_tensor_ranks: int
    num_threads: int
    cores: tuple[int, ...]
    """Cores to keep to; empty: any."""
    startup_timeout_s: float


def load_model(config: EngineConfig, start: RankStart, pool: ThreadPool) -> SlicedModel:
    """A tensor-parallel rank's part of the model, with packed weights that programs on `pool` read.

    Raises:
        CheckpointError, ConversionError, ConfigError: as `convert`.
    """
    parallel = None
    if start.num_tensor_ranks > 1:
        parallel = TensorParallel(rank=start.tensor_rank, size=start.num_tensor_ranks)
    model = convert(
        config.model,
        dtype=config.dtype,
        load_format=config.load_format,
        seed=config.seed,
        parallel=parallel,
    )
    model.optimize(pool, compile=config.compile)
    return model


def run_rank(start: RankStart, model: SlicedModel, pool: ThreadPool) -> None:
    """Serve until the engine says stop; the body of a forked rank's process.

    Args:
        pool: of one thread, which the model's programs use.

    Raises:
        SystemExit: with code 1 after a failure, which the engine was told where it still hears.
    """
    show_name(start.name)
    limit_threads(start.num_threads)
    pinned_pool(start.num_threads, start.cores, pool)
    deadline = time.monotonic() + start.startup_timeout_s
    try:
        control = ControlClient(
            start.address,
            JoinToken.parse(start.token),
            describe_self(start.name, num_threads=start.num_threads),
            deadline=deadline,
        )
    except LaminaError as error:
        logger.error("%s stops: %s", start.name, error)
        raise SystemExit(1) from None
    with contextlib.closing(control), contextlib.ExitStack() as stack:
        try:
            links = stack.enter_context(connected(control, start, model, pool, deadline))
            RankLoop(control, start, model, links).serve()
        except Exception as error:  # whatever it is, the engine must learn of it
            if isinstance(error, PeerLost) and was_told_to_stop(control):
                return  # and so was the peer, a moment earlier
            tell_and_wait(control, error)
            if not isinstance(error, LaminaError):
                raise
            logger.error("%s stops: %s", start.name, error)
            raise SystemExit(1) from None
