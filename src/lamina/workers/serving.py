"""The executor's side of its links: plans in, then the native layer loop.

The same code serves the local executor (pumped by the model worker's wait) and a remote one (the
loop of an attention worker's process). Python takes up each plan; the layers of its step pass
without it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import torch

from lamina import _native
from lamina.attention.executor import AttentionExecutor
from lamina.attention.partition import shard_specs
from lamina.errors import ProtocolMismatch
from lamina.sched.rotation import replica_of
from lamina.transport.native import NativeLink
from lamina.transport.topology import (
    PLAN_MAILBOX,
    StepMailboxes,
    channel_of,
    message_number,
    plan_mailbox_bytes,
    step_mailboxes,
)
from lamina.types import ExecutorPlan

_decode_plan = msgspec.msgpack.Decoder(ExecutorPlan).decode


class Turn(NamedTuple):
    """Whose layers an executor serves: those whose slices one replica of the model runs."""

    replica: int
    num_replicas: int


_ALL_LAYERS = Turn(0, 1)


class ExecutorServer:
    """Serves one attention executor over the mailboxes of its links."""

    def __init__(
        self,
        link: NativeLink,
        executor: AttentionExecutor,
        *,
        dtype: torch.dtype,
        max_rows: int,
        max_spans: int,
        step_deadline_s: float,
        num_micro_batches: int = 1,
        tensor_links: Sequence[Sequence[NativeLink]] = (),
        turn: Turn = _ALL_LAYERS,
        out_link: NativeLink | None = None,
    ) -> None:
        """
        Args:
            link: of the engine: for plans and reports.
            dtype: of q, k, v and the output.
            tensor_links: per replica of the model, and per tensor-parallel rank of the executor,
                the link for q, k, v and outputs; empty: `link` is for them too.
            turn: of a model rank's own executor, which sees only the layers of that rank; default:
                all layers.
            out_link: where outputs go, if not to where q comes from.
        """
        self.executor = executor
        self.num_plans = 0
        """Plans taken up so far."""
        self._link = link
        self._num_micro_batches = num_micro_batches
        num_ranks, specs = executor.num_ranks, executor.specs
        replicas = tensor_links or [[link]]
        assert all(len(links) == num_ranks for links in replicas), "a link per rank and replica"
        self._tensor_links = replicas
        self._out_link = out_link
        self._plans = link.inbox(PLAN_MAILBOX, plan_mailbox_bytes(max_spans))
        rank_specs = shard_specs(specs, 0, executor.units // num_ranks, executor.units)
        mailboxes = step_mailboxes(rank_specs, dtype.itemsize, max_rows, num_micro_batches)
        boxes: list[list[list[_Boxes]]] = [
            [[_open(rank_link, out_link or rank_link, m) for m in mailboxes] for rank_link in links]
            for links in replicas
        ]
        reports = step_mailboxes(specs, dtype.itemsize, max_rows, num_micro_batches * num_ranks)
        channels = []
        for micro_batch in range(num_micro_batches):
            in_turn = [replica_of(micro_batch, k, len(replicas)) for k in range(len(replicas))]
            for rank in range(num_ranks):
                report = reports[channel_of(micro_batch, rank, num_ranks)]
                channels.append(
                    (
                        [boxes[replica][rank][micro_batch] for replica in in_turn],
                        link.outbox(report.report, report.report_bytes).native,
                        (turn.replica - micro_batch) % turn.num_replicas,
                        turn.num_replicas,
                    )
                )
        self.loop = _native.LayerLoop(
            executor.native, self._plans.native, channels, step_deadline_s
        )

    def serve(self, wake_at: float) -> None:
        """Serve layers until a plan has come, which is taken up, or there is nothing to do.

        Args:
            wake_at: `time.monotonic()` from which on to return as soon as there is nothing to do.

        Raises:
            DeadlineExceeded: the model worker fell silent in a step.
            PeerLost, ProtocolMismatch: a link failed.
            CapacityError: a plan needs more pages than there are.
        """
        if self.loop.serve(self.num_plans + 1, wake_at):
            self.take_plan()

    def take_plan(self) -> None:
        """Take up the plan that has come.

        Raises:
            DeadlineExceeded: none has. Otherwise as `serve`.
        """
        payload = self._plans.wait(self.num_plans + 1, time.monotonic())
        self.num_plans += 1
        try:
            plan = _decode_plan(payload.numpy().data)
        except msgspec.DecodeError as error:
            raise ProtocolMismatch(
                f"unreadable step plan: {error}", peer=self._link.peer
            ) from error
        if not 0 <= plan.micro_batch < self._num_micro_batches:
            raise ProtocolMismatch(
                f"a plan of micro-batch {plan.micro_batch}, of {self._num_micro_batches}",
                peer=self._link.peer,
            )
        schedules = self.executor.begin(plan)
        first_message = message_number(plan.step, 0, len(self.executor.specs))
        for rank, schedule in enumerate(schedules):
            channel = channel_of(plan.micro_batch, rank, len(schedules))
            self.loop.add(channel, plan.step, first_message, schedule)


_Boxes = tuple[_native.Inbox, _native.Inbox, _native.Outbox]


def _open(link: NativeLink, out_link: NativeLink, mailboxes: StepMailboxes) -> _Boxes:
    """A micro-batch's ends of Q, KV and OUT."""
    return (
        link.inbox(mailboxes.q, mailboxes.q_bytes).native,
        link.inbox(mailboxes.kv, mailboxes.kv_bytes).native,
        out_link.outbox(mailboxes.out, mailboxes.out_bytes).native,
    )
