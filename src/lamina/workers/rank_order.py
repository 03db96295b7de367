"""Which slice a rank runs next.

The tensor-parallel ranks of a replica meet in collectives, so all run the same slices in the same
order. The first one decides: the first in the timetable whose inputs it has. The others follow;
their inputs are on the way, as they come from the same slices and plans.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

from lamina import _native
from lamina.transport.native import NativeLink
from lamina.transport.topology import TURN_BYTES, TURN_MAILBOX
from lamina.workers.model import ModelWorker

_Message = tuple[_native.Inbox, int]


class Order(Protocol):
    """Chooses slices for a model worker."""

    def next(self, worker: ModelWorker) -> int | None:
        """The micro-batch whose slice is to run now, all of whose inputs are here; None: none yet.
        Never blocks for long."""

    def awaited(self, worker: ModelWorker) -> list[_Message]:
        """Messages any of which may change what `next` says."""


class LeadOrder:
    """The order of the timetable; late micro-batches are passed over. Tells the followers."""

    def __init__(self, followers: Sequence[NativeLink], step_deadline_s: float) -> None:
        self._outboxes = [link.outbox(TURN_MAILBOX, TURN_BYTES) for link in followers]
        self._step_deadline_s = step_deadline_s
        self._num_turns = 0

    def next(self, worker: ModelWorker) -> int | None:
        micro_batch = worker.turns.next(worker.is_ready)
        if micro_batch is None or not worker.is_ready(micro_batch):
            return None
        if self._outboxes:
            self._num_turns += 1
            turn = torch.tensor([micro_batch])
            deadline = time.monotonic() + self._step_deadline_s
            for outbox in self._outboxes:
                outbox.post(self._num_turns, turn, deadline=deadline)
        return micro_batch

    def awaited(self, worker: ModelWorker) -> list[_Message]:
        return [message for m in worker.turns.active for message in worker.missing(m)]


class FollowOrder:
    """The order of the replica's first rank."""

    def __init__(self, leader: NativeLink) -> None:
        self._inbox = leader.inbox(TURN_MAILBOX, TURN_BYTES)
        self._num_turns = 0
        self._turn: int | None = None
        """The micro-batch whose turn it is, until its slice can run."""

    def next(self, worker: ModelWorker) -> int | None:
        if self._turn is None and self._inbox.native.holds(self._num_turns + 1):
            self._num_turns += 1
            payload = self._inbox.wait(self._num_turns, time.monotonic(), num_bytes=TURN_BYTES)
            self._turn = int(payload.view(torch.int64))
        micro_batch = self._turn
        # The step itself may still be on its way from the engine.
        if micro_batch not in worker.turns.active or not worker.is_ready(micro_batch):
            return None
        self._turn = None
        return micro_batch

    def awaited(self, worker: ModelWorker) -> list[_Message]:
        if self._turn is None:
            return [(self._inbox.native, self._num_turns + 1)]
        return worker.missing(self._turn) if self._turn in worker.turns.active else []
