"""The engine's end of the link to one attention executor: plans go there, reports come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import torch

from lamina.transport.native import NativeLink
from lamina.transport.topology import PLAN_MAILBOX, StepMailboxes, plan_mailbox_bytes
from lamina.types import ExecutorPlan

_encode_plan = msgspec.msgpack.Encoder().encode

_MAX_UNREAD_REPORTS = 2
"""As many as a mailbox holds."""


class Report(NamedTuple):
    """When an executor served the layers of a step."""

    executor: int
    step: int
    times_L4: torch.Tensor
    """float64 [layers, 4], seconds of the executor's monotonic clock: attention over cached tokens
    began and ended, the rest began and ended. Zeros where there was nothing to do."""


class PlanEnd:
    """Posts an executor its parts of the steps' plans and takes its reports."""

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
        self._reports = [link.inbox(boxes.report, boxes.report_bytes) for boxes in mailboxes]
        self._due: list[deque[int]] = [deque() for _ in mailboxes]
        self._on_plan = on_plan

    def post(self, part: ExecutorPlan, deadline: float) -> list[Report]:
        """Send the executor its part of a step's plan, ahead of layer 0.

        Returns:
            Reports that had to be taken to make room for this step's, mostly none.
        """
        due = self._due[part.micro_batch]
        reports = []
        if part.spans:
            if len(due) == _MAX_UNREAD_REPORTS:
                reports.append(self._take(part.micro_batch, deadline))
            due.append(part.step)
        self.num_plans += 1
        payload = torch.frombuffer(bytearray(_encode_plan(part)), dtype=torch.uint8)
        self._plans.post(self.num_plans, payload, deadline=deadline)
        if self._on_plan is not None:
            self._on_plan()
        return reports

    def take_reports(self) -> list[Report]:
        """The reports that have come since. Never blocks."""
        reports = []
        for micro_batch, due in enumerate(self._due):
            while due and self._reports[micro_batch].native.holds(due[0]):
                reports.append(self._take(micro_batch, 0.0))
        return reports

    def _take(self, micro_batch: int, deadline: float) -> Report:
        step = self._due[micro_batch].popleft()
        payload = self._reports[micro_batch].wait(step, deadline)
        times_L4 = payload.view(torch.float64).view(-1, 4).clone()
        return Report(self.executor, step, times_L4)
