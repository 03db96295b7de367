"""Collectives of ranks in processes of their own, with torch.distributed: gloo (CPU), NCCL (GPU).

Rank 0 opens a store, whose port the system chooses, and passes the address on; every rank then
makes a `ProcessGroup` from it. No global state of torch.distributed is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed

from lamina.errors import DeadlineExceeded, PeerLost, ProtocolMismatch, TransportError

_PEER = "tensor-parallel group"

_dist: Any = torch.distributed
Store = Any
"""A torch.distributed.Store, whose stubs hide the class."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one group meet."""

    host: str
    port: int


def open_store(host: str = "127.0.0.1", *, timeout_s: float) -> tuple[Store, Rendezvous]:
    """Rank 0's store and the address for the other ranks. Keep the store as long as the group.

    Raises:
        TransportError: this machine cannot listen on `host`.
    """
    try:
        store = _dist.TCPStore(
            host, 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:
        raise TransportError(
            f"cannot listen on {host} ({_brief(error)}); give an address of this machine",
            peer=_PEER,
        ) from error
    return store, Rendezvous(host, store.port)


def join_store(rendezvous: Rendezvous, *, timeout_s: float) -> Store:
    """Another rank's connection to rank 0's store.

    Raises:
        DeadlineExceeded: nobody listens there.
    """
    try:
        return _dist.TCPStore(
            rendezvous.host,
            rendezvous.port,
            is_master=False,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        raise DeadlineExceeded(
            f"rank 0 does not listen on {rendezvous.host}:{rendezvous.port} after {timeout_s:g} s; "
            "look into the log of rank 0, and check that this machine can reach the address",
            peer=_PEER,
        ) from error


class ProcessGroup:
    """One rank's end of a group (`collectives.Collectives`). After an error it is of no use."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        timeout_s: float,
        backend: Literal["gloo", "nccl"] = "gloo",
        address: str | None = None,
    ) -> None:
        """Blocks until all ranks have come.

        Args:
            timeout_s: the longest wait for other ranks, here and in every call: a step's deadline.
            address: of this rank, for the others to connect to; None: what gloo chooses.

        Raises:
            DeadlineExceeded: not all ranks came.
        """
        self.rank = rank
        self.size = size
        self._timeout = timedelta(seconds=timeout_s)
        prefixed = _dist.PrefixStore(_PEER, store)
        with _TypedErrors(f"connecting {size} ranks", timeout_s):
            if backend == "nccl":
                options = _dist.ProcessGroupNCCL.Options()
                options._timeout = self._timeout
                self._group = _dist.ProcessGroupNCCL(prefixed, rank, size, options)
            else:
                options = _dist.ProcessGroupGloo._Options()
                options._devices = [
                    _dist.ProcessGroupGloo.create_device(hostname=address)
                    if address is not None
                    else _dist.ProcessGroupGloo.create_default_device()
                ]
                options._timeout = self._timeout
                options._threads = 1
                self._group = _dist.ProcessGroupGloo(prefixed, rank, size, options)

    def all_reduce(self, x: torch.Tensor) -> None:
        """See `Collectives`. Raises DeadlineExceeded or PeerLost."""
        self._run(lambda: self._group.allreduce([x]))

    def all_gather(self, x: torch.Tensor, num_ranks: int) -> Sequence[torch.Tensor]:
        """See `Collectives`. Raises DeadlineExceeded or PeerLost."""
        if num_ranks != self.size:
            raise ProtocolMismatch(
                f"the model was cut for {num_ranks} ranks, the group has {self.size}; convert the "
                "model for the size of the group",
                peer=_PEER,
            )
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._run(lambda: self._group.allgather([parts], [x]))
        return parts

    def _run(self, start: Callable[[], Any]) -> None:
        with _TypedErrors("a collective", self._timeout.total_seconds()):
            start().wait(self._timeout)


class _TypedErrors:
    """Errors of torch.distributed, all RuntimeErrors, as Lamina's."""

    def __init__(self, what: str, timeout_s: float) -> None:
        self._what = what
        self._timeout_s = timeout_s

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, RuntimeError):
            return
        text = str(error)
        if "imed out" in text or "imeout" in text:
            raise DeadlineExceeded(
                f"{self._what} took longer than {self._timeout_s:g} s: a rank is stopped, stuck "
                "or overloaded; see the logs of the replica's ranks, or raise the step's deadline",
                peer=_PEER,
            ) from error
        raise PeerLost(
            f"{self._what} failed because a rank ended ({_brief(error)}); see that rank's log and "
            "start the replica again",
            peer=_PEER,
        ) from error


def _brief(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
