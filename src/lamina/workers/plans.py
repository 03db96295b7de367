"""The engine's end of the link to one attention executor: plans go there, reports come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from lamina.transport.native import NativeLink
from lamina.transport.topology import PLAN_MAILBOX, StepMailboxes, plan_mailbox_bytes
from lamina.types import ExecutorPlan

_encode_plan = msgspec.msgpack.Encoder().encode


class Report(NamedTuple):
    """When an executor served the layers of a step."""

    executor: int
    step: int
    times: np.ndarray[Any, np.dtype[np.float64]]
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
        on_plan: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            mailboxes: of every micro-batch.
            max_spans: most sequences of one step.
            on_plan: called after a plan is posted; runs the executor's side of it where that side
                lives in this very thread.
        """
        self.executor = executor
        self.num_plans = 0
        """Plans posted so far."""
        self._plans = link.outbox(PLAN_MAILBOX, plan_mailbox_bytes(max_spans))
        self._inboxes = [link.inbox(boxes.report, boxes.report_bytes) for boxes in mailboxes]
        self._due: dict[int, int] = {}  # step, by micro-batch
        self._taken: list[Report] = []
        self._on_plan = on_plan

    def post(self, part: ExecutorPlan, deadline: float) -> None:
        """Send the executor its part of a step's plan, ahead of layer 0.

        Blocks until the executor is done with the micro-batch's step before. That is only where it
        had rows to store and none to attend to; everything else was waited for.
        """
        if part.micro_batch in self._due:
            self._take(part.micro_batch, deadline)
        if part.spans:
            self._due[part.micro_batch] = part.step
        self.num_plans += 1
        payload = torch.frombuffer(bytearray(_encode_plan(part)), dtype=torch.uint8)
        self._plans.post(self.num_plans, payload, deadline=deadline)
        if self._on_plan is not None:
            self._on_plan()

    def take_reports(self) -> list[Report]:
        """The reports that have come since. Never blocks."""
        for micro_batch, step in list(self._due.items()):
            if self._inboxes[micro_batch].native.holds(step):
                self._take(micro_batch, 0.0)
        reports, self._taken = self._taken, []
        return reports

    def _take(self, micro_batch: int, deadline: float) -> None:
        step = self._due.pop(micro_batch)
        payload = self._inboxes[micro_batch].wait(step, deadline).numpy()
        times = payload.view(np.float64).reshape(-1, 4).copy()
        self._taken.append(Report(self.executor, step, times))
