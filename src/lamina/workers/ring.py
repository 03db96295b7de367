"""Contexts between replicas: each sends what the next slice needs to the replica after it."""

from __future__ import annotations

import time
from collections.abc import Callable

from lamina import _native
from lamina.convert.slices import SlicedModel, SliceState
from lamina.transport.native import NativeLink
from lamina.transport.topology import context_mailbox, context_number


class Ring:
    """A rank's place between the same ranks of its neighbour replicas (a `ContextPort`)."""

    def __init__(
        self,
        model: SlicedModel,
        previous: NativeLink,
        following: NativeLink,
        *,
        num_micro_batches: int,
        max_rows: int,
        step_deadline_s: float,
        run_local: Callable[[int], None],
    ) -> None:
        """
        Args:
            previous, following: links to the replicas whose slices come before and after ours.
            run_local: lets the local executor serve the micro-batch's present layer, whose output
                goes to the following replica ahead of the context.
        """
        capacity = max(model.context_bytes(i, max_rows) for i in range(model.num_layers))
        boxes = [context_mailbox(m, num_micro_batches) for m in range(num_micro_batches)]
        self._model = model
        self._inboxes = [previous.inbox(box, capacity) for box in boxes]
        self._outboxes = [following.outbox(box, capacity) for box in boxes]
        self._steps = [0] * num_micro_batches
        self._step_deadline_s = step_deadline_s
        self._run_local = run_local

    def begin(self, micro_batch: int, step: int) -> None:
        """The step that the micro-batch's contexts belong to from now on."""
        self._steps[micro_batch] = step

    def awaited(self, micro_batch: int, slice_index: int) -> tuple[_native.Inbox, int]:
        return self._inboxes[micro_batch].native, self._number(micro_batch, slice_index)

    def send(self, micro_batch: int, slice_index: int, state: SliceState) -> None:
        self._run_local(micro_batch)
        parts = self._model.export_context(slice_index, state)
        deadline = time.monotonic() + self._step_deadline_s
        number = self._number(micro_batch, slice_index + 1)
        self._outboxes[micro_batch].post(number, *parts, deadline=deadline)

    def is_ready(self, micro_batch: int, slice_index: int) -> bool:
        number = self._number(micro_batch, slice_index)
        return self._inboxes[micro_batch].native.holds(number)

    def receive(
        self, micro_batch: int, slice_index: int, state: SliceState, deadline: float
    ) -> None:
        num_bytes = self._model.context_bytes(slice_index - 1, state.num_rows)
        payload = self._inboxes[micro_batch].wait(
            self._number(micro_batch, slice_index), deadline, num_bytes=num_bytes
        )
        self._model.import_context(slice_index - 1, state, payload)

    def _number(self, micro_batch: int, slice_index: int) -> int:
        return context_number(self._steps[micro_batch], slice_index, self._model.num_layers + 1)
