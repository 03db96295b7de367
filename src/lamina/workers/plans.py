"""The engine's end of the link to one attention executor: plans go there, reports come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from lamina.transport.native import NativeLink
from lamina.transport.topology import PLAN_MAILBOX, StepMailboxes, plan_mailbox_bytes
from lamina.types import ExecutorPlan

_encode_plan = msgspec.msgpack.Encoder().encode

_MAX_DUE = 4
"""Steps of one micro-batch whose reports may still come: more than a mailbox holds."""


class Report(NamedTuple):
    """When an executor served the layers of a step."""

    executor: int
    step: int
    times: np.ndarray[Any, np.dtype[np.float64]]
    """[layers, 4], seconds of the executor's monotonic clock: attention over cached tokens
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
        self._due: list[deque[int]] = [deque(maxlen=_MAX_DUE) for _ in mailboxes]
        self._on_plan = on_plan

    def post(self, part: ExecutorPlan, deadline: float) -> None:
        """Send the executor its part of a step's plan, ahead of layer 0."""
        if part.spans:
            self._due[part.micro_batch].append(part.step)
        self.num_plans += 1
        payload = torch.frombuffer(bytearray(_encode_plan(part)), dtype=torch.uint8)
        self._plans.post(self.num_plans, payload, deadline=deadline)
        if self._on_plan is not None:
            self._on_plan()

    def take_reports(self) -> list[Report]:
        """The reports that have come since. Never blocks; an executor leaves out a report when the
        mailbox is full."""
        reports = []
        for inbox, due in zip(self._reports, self._due, strict=True):
            while (step := next((s for s in due if inbox.native.holds(s)), None)) is not None:
                while due.popleft() != step:
                    pass
                payload = inbox.wait(step, 0.0).numpy()
                times = payload.view(np.float64).reshape(-1, 4).copy()
                reports.append(Report(self.executor, step, times))
        return reports
