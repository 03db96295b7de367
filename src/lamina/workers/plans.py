"""The engine's end of the link to one attention executor: plans go there, reports come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from lamina.transport.native import NativeLink
from lamina.transport.topology import (
    PLAN_MAILBOX,
    StepMailboxes,
    channel_of,
    plan_mailbox_bytes,
)
from lamina.types import ExecutorPlan

_encode_plan = msgspec.msgpack.Encoder().encode


Times = np.ndarray[Any, np.dtype[np.float64]]


class Report(NamedTuple):
    """When an executor served the layers of a step."""

    executor: int
    step: int
    times: Times
    """[layers, 4], seconds of the executor's monotonic clock: attention over cached tokens
    began and ended, the rest began and ended. Zeros where there was nothing to do."""


class PlanEnd:
    """Posts an executor its parts of the steps' plans and takes its reports.

    A step's report is taken before the next plan of its micro-batch is posted at the latest, so
    that the mailbox never fills.
    """

    def __init__(
        self,
        executor: int,
        link: NativeLink,
        mailboxes: Sequence[StepMailboxes],
        *,
        max_spans: int,
        num_ranks: int = 1,
        units: int = 1,
        on_plan: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            mailboxes: of every channel (`topology.channel_of`).
            max_spans: most sequences of one step.
            num_ranks: tensor-parallel ranks of the model worker.
            units: head units of the model, of which each rank has an equal part.
            on_plan: called after a plan is posted; runs the executor's side of it where that side
                lives in this very thread.
        """
        self.executor = executor
        self.num_plans = 0
        """Plans posted so far."""
        self._plans = link.outbox(PLAN_MAILBOX, plan_mailbox_bytes(max_spans))
        self._inboxes = [link.inbox(boxes.report, boxes.report_bytes) for boxes in mailboxes]
        self._num_ranks = num_ranks
        self._units = units
        self._due: dict[int, int] = {}  # step, by channel
        self._taken: list[Report] = []
        self._on_plan = on_plan

    def post(self, part: ExecutorPlan, deadline: float) -> None:
        """Send the executor its part of a step's plan, ahead of layer 0.

        Blocks until the executor is done with the micro-batch's step before. That is only where it
        had rows to store and none to attend to; everything else was waited for.
        """
        for rank in range(self._num_ranks):
            channel = channel_of(part.micro_batch, rank, self._num_ranks)
            if channel in self._due:
                self._take(channel, deadline)
            if self._has_rows(part, rank):
                self._due[channel] = part.step
        self.num_plans += 1
        payload = torch.frombuffer(bytearray(_encode_plan(part)), dtype=torch.uint8)
        self._plans.post(self.num_plans, payload, deadline=deadline)
        if self._on_plan is not None:
            self._on_plan()

    def take_reports(self) -> list[Report]:
        """The reports that have come since. Never blocks."""
        for channel, step in list(self._due.items()):
            if self._inboxes[channel].native.holds(step):
                self._take(channel, 0.0)
        reports, self._taken = self._taken, []
        return reports

    def _has_rows(self, part: ExecutorPlan, rank: int) -> bool:
        """Whether anything of the part is of a rank's heads; otherwise it has no report."""
        if self._num_ranks == 1:
            return bool(part.spans)
        size = self._units // self._num_ranks
        start, stop = rank * size, (rank + 1) * size
        return any(span.unit_start < stop and span.unit_stop > start for span in part.spans)

    def _take(self, channel: int, deadline: float) -> None:
        step = self._due.pop(channel)
        payload = self._inboxes[channel].wait(step, deadline).numpy()
        times = payload.view(np.float64).reshape(-1, 4).copy()
        self._taken.append(Report(self.executor, step, times))
