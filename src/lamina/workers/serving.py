"""The executor's side of a link: plans in, then the native layer loop.

The same code serves the local executor (pumped by the model worker's wait) and a remote one (the
loop of an attention worker's process). Python takes up each plan; the layers of its step pass
without it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import torch

from lamina import _native
from lamina.attention.executor import AttentionExecutor
from lamina.attention.spec import AttentionSpec
from lamina.errors import ProtocolMismatch
from lamina.transport.native import NativeLink
from lamina.transport.topology import (
    PLAN_MAILBOX,
    message_number,
    plan_mailbox_bytes,
    step_mailboxes,
)
from lamina.types import ExecutorPlan

_decode_plan = msgspec.msgpack.Decoder(ExecutorPlan).decode


class ExecutorServer:
    """Serves one attention executor over the mailboxes of one link."""

    def __init__(
        self,
        link: NativeLink,
        executor: AttentionExecutor,
        specs: Sequence[AttentionSpec],
        *,
        dtype: torch.dtype,
        max_rows: int,
        max_spans: int,
        step_deadline_s: float,
    ) -> None:
        """
        Args:
            specs: every layer, cut to the executor's share.
            dtype: of q, k, v and the output.
        """
        self.executor = executor
        self.num_plans = 0
        """Plans taken up so far."""
        self._link = link
        self._num_layers = len(specs)
        self._plans = link.inbox(PLAN_MAILBOX, plan_mailbox_bytes(max_spans))
        self.loop = _native.LayerLoop(
            link.native,
            executor.native,
            self._plans.native,
            step_mailboxes(specs, dtype.itemsize, max_rows),
            step_deadline_s,
        )

    def serve(self, wake_at: float) -> None:
        """Serve layers until a plan has come, which is taken up, or there is nothing to do.

        Args:
            wake_at: `time.monotonic()` from which on to return as soon as there is nothing to do.

        Raises:
            DeadlineExceeded: the model worker fell silent in a step.
            PeerLost, ProtocolMismatch: the link failed.
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
        schedule = self.executor.begin(plan)
        first_number = message_number(plan.step, 0, self._num_layers)
        self.loop.add(plan.micro_batch, first_number, schedule)
