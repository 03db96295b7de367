"""The tensor-parallel ranks of a model as threads of one process, in lockstep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from lamina.convert import SlicedModel, TensorParallel, convert
from lamina.convert.collectives import use_group
from lamina.convert.process_group import ProcessGroup, Rendezvous, join_store
from support.slices import run_slices

T = TypeVar("T")


class _Meeting:
    """Where the ranks of one group put their tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.tensors: list[torch.Tensor | None] = [None] * size


class LockstepRank:
    """One rank's collectives; the others' threads have to make the same calls."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self._meeting = meeting
        self._rank = rank
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        """What was called, with the tensors' shapes."""

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        meeting = self._meeting
        meeting.tensors[self._rank] = x.clone()
        meeting.barrier.wait()
        tensors = [t for t in meeting.tensors if t is not None]
        meeting.barrier.wait()
        shapes = {tuple(t.shape) for t in tensors}
        assert shapes == {tuple(x.shape)}, f"ranks disagree: {shapes}"
        return tensors

    def all_reduce(self, x: torch.Tensor) -> None:
        self.calls.append(("all_reduce", tuple(x.shape)))
        x.copy_(torch.stack(self._exchange(x)).sum(0))

    def all_gather(self, x: torch.Tensor, num_ranks: int) -> Sequence[torch.Tensor]:
        self.calls.append(("all_gather", tuple(x.shape)))
        tensors = self._exchange(x)
        assert len(tensors) == num_ranks
        return tensors

    def leave(self) -> None:
        """Let the others fail at once instead of wait."""
        self._meeting.barrier.abort()


def group_of(rank: int) -> str:
    """The tag of a rank's collectives: in one process every rank needs its own."""
    return f"rank {rank}"


def convert_ranks(folder: Path, size: int, **options: Any) -> list[SlicedModel]:
    """The models of all ranks, for `run_ranks`."""
    return [
        convert(
            folder,
            parallel=TensorParallel(rank=rank, size=size, group=group_of(rank)),
            **options,
        )
        for rank in range(size)
    ]


def run_sharded(
    models: list[SlicedModel], sequences: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[LockstepRank]]:
    """Like `run_slices`, by all ranks; they must agree on the logits. And what each called."""
    logits, ranks = run_ranks(len(models), lambda rank: run_slices(models[rank], sequences))
    for other in logits[1:]:
        for mine, first in zip(other, logits[0], strict=True):
            assert torch.equal(mine, first), "all ranks get the same logits"
    return logits[0], ranks


def run_ranks(size: int, run: Callable[[int], T]) -> tuple[list[T], list[LockstepRank]]:
    """`run(rank)` of all ranks at once; their results and what they called."""
    meeting = _Meeting(size)
    ranks = [LockstepRank(meeting, rank) for rank in range(size)]
    for number, rank in enumerate(ranks):
        use_group(rank, group_of(number))

    def guarded(rank: int) -> T:
        try:
            with torch.no_grad():
                return run(rank)
        except BaseException:
            ranks[rank].leave()
            raise

    try:
        with ThreadPoolExecutor(size) as pool:
            futures = [pool.submit(guarded, rank) for rank in range(size)]
        errors = [f.exception() for f in futures]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            if error is not None:
                raise error
        return [f.result() for f in futures], ranks
    finally:
        for number in range(size):
            use_group(None, group_of(number))


def serve_rank(
    folder: Path, rendezvous: Rendezvous, sequences: list[torch.Tensor], answers: Any
) -> None:
    """Rank 1 of 2 in a process of its own: puts its logits into `answers`, a queue, and ends."""
    group = ProcessGroup(
        join_store(rendezvous, timeout_s=60), 1, 2, timeout_s=60, address=rendezvous.host
    )
    use_group(group)
    model = convert(folder, parallel=TensorParallel(rank=1, size=2))
    with torch.no_grad():
        answers.put([logits.tolist() for logits in run_slices(model, sequences)])
