"""A rank's loop: steps of the engine in, slices in the timetable's order, results out."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import msgspec
import torch

from lamina import _native
from lamina.attention.partition import head_units
from lamina.convert import SlicedModel
from lamina.errors import DeadlineExceeded
from lamina.transport.control_client import ControlClient, Incoming
from lamina.transport.topology import STEP_MAILBOX, result_mailbox, step_mailbox_bytes
from lamina.transport.wire import IntegrityQuery, ShutdownWorker
from lamina.types import LOCAL, ExecutorPlan, StepPlan
from lamina.workers.attention import integrity
from lamina.workers.model import ModelWorker
from lamina.workers.pipeline import executor_parts
from lamina.workers.rank_links import RankLinks
from lamina.workers.rank_local import LocalServing
from lamina.workers.rank_messages import RankResult, result_bytes, result_parts, unpack_step
from lamina.workers.rank_order import FollowOrder, LeadOrder, Order
from lamina.workers.ring import Ring
from lamina.workers.routes import ExecutorEnd
from lamina.workers.serving import Turn

if TYPE_CHECKING:
    from lamina.workers.rank import RankStart

_CONTROL_POLL_S = 0.05
"""How often a rank looks for control messages."""


class RankLoop:
    """Serves the steps of all micro-batches, whichever can go on. One thread uses it."""

    def __init__(
        self, control: ControlClient, start: RankStart, model: SlicedModel, links: RankLinks
    ) -> None:
        assign = links.assign
        self._control = control
        self._model = model
        self._num_ranks = start.num_tensor_ranks
        self._num_units = assign.num_units // start.num_tensor_ranks
        self._first_unit = start.tensor_rank * self._num_units
        self._gives_logits = start.tensor_rank == 0
        self._step_deadline_s = assign.step_deadline_s
        self._peer = links.engine.peer
        assert head_units(model.attention_specs) % self._num_units == 0, (
            "the rank's heads are its units of the model's"
        )
        self._local = LocalServing(links, model, Turn(start.replica, start.num_replicas))
        ends = [
            ExecutorEnd(
                executor,
                link,
                model.attention_specs,
                dtype=model.dtype,
                max_rows=assign.max_rows,
                page_units=dict(assign.page_units)[executor],
                num_micro_batches=assign.num_micro_batches,
                first_unit=self._first_unit,
                num_units=self._num_units,
            )
            for executor, link in links.executors.items()
        ]
        self._ring: Ring | None = None
        if links.previous is not None and links.following is not None:
            self._ring = Ring(
                model,
                links.previous,
                links.following,
                num_micro_batches=assign.num_micro_batches,
                max_rows=assign.max_rows,
                step_deadline_s=assign.step_deadline_s,
                run_local=self._local.run_layer,
            )
        self._worker = ModelWorker(
            model,
            [*ends, self._local.end],
            num_micro_batches=assign.num_micro_batches,
            early_q=assign.early_q,
            defer=assign.defer,
            step_deadline_s=assign.step_deadline_s,
            replica=start.replica,
            num_replicas=start.num_replicas,
            context=self._ring,
        )
        self._steps = links.engine.inbox(
            STEP_MAILBOX, step_mailbox_bytes(assign.max_rows, assign.max_spans, assign.max_shares)
        )
        capacity = result_bytes(
            model.num_layers, assign.max_rows * model.vocab_size * model.dtype.itemsize
        )
        self._results = [
            links.engine.outbox(result_mailbox(m), capacity)
            for m in range(assign.num_micro_batches)
        ]
        self._order: Order = (
            LeadOrder(links.followers, assign.step_deadline_s)
            if links.leader is None
            else FollowOrder(links.leader)
        )
        self._plans: dict[int, StepPlan] = {}
        self._since = [0.0] * assign.num_micro_batches
        """When the last slice of each micro-batch ran here."""
        self._num_steps = 0
        self._queries: list[Incoming] = []

    def serve(self) -> None:
        """Steps and control messages, until ShutdownWorker.

        Raises:
            PeerLost, DeadlineExceeded, ProtocolMismatch: a peer failed; it is named.
            CapacityError: a plan needs more local pages than there are.
        """
        control_at = 0.0
        worker = self._worker
        while True:
            now = time.monotonic()
            if now >= control_at:
                if self._handle_control():
                    return
                self._check_deadlines(now)
                control_at = now + _CONTROL_POLL_S
            while self._steps.native.holds(self._num_steps + 1):
                self._take_step()
            micro_batch = self._order.next(worker)
            if micro_batch is not None:
                self._advance(micro_batch)
                continue
            awaited = [(self._steps.native, self._num_steps + 1), *self._order.awaited(worker)]
            with contextlib.suppress(DeadlineExceeded):
                _native.wait_any(awaited, control_at)

    def _check_deadlines(self, now: float) -> None:
        """DeadlineExceeded if a micro-batch waits for too long; names whom it waits for."""
        for micro_batch in self._worker.turns.active:
            if now - self._since[micro_batch] >= self._step_deadline_s:
                for inbox, number in self._worker.missing(micro_batch):
                    inbox.wait(number, now, None)

    def _take_step(self) -> None:
        """Take up the step that has come."""
        self._num_steps += 1
        payload = self._steps.wait(self._num_steps, time.monotonic())
        plan, inputs = unpack_step(payload, self._peer)
        parts = executor_parts(plan)
        if LOCAL in parts:
            parts[LOCAL] = self._own_part(parts[LOCAL])
            self._local.begin(parts[LOCAL], time.monotonic() + self._step_deadline_s)
        if not plan.spans:
            return
        micro_batch = plan.micro_batch
        self._plans[micro_batch] = plan
        if self._ring is not None:
            self._ring.begin(micro_batch, plan.step)
        self._worker.begin(plan, parts, inputs)
        self._since[micro_batch] = time.monotonic()
        if micro_batch not in self._worker.turns.active:
            self._finish(micro_batch, None)  # fewer slices than replicas

    def _own_part(self, part: ExecutorPlan) -> ExecutorPlan:
        """A plan of the local executor with this rank's head units, counted from its first."""
        if self._num_ranks == 1:
            return part
        first, stop = self._first_unit, self._first_unit + self._num_units
        return msgspec.structs.replace(
            part,
            spans=tuple(
                msgspec.structs.replace(
                    span,
                    unit_start=max(span.unit_start, first) - first,
                    unit_stop=min(span.unit_stop, stop) - first,
                )
                for span in part.spans
                if span.unit_start < stop and span.unit_stop > first
            ),
        )

    def _advance(self, micro_batch: int) -> None:
        logits = self._worker.advance(micro_batch)
        self._since[micro_batch] = time.monotonic()
        if micro_batch not in self._worker.turns.active:
            self._finish(micro_batch, logits)

    def _finish(self, micro_batch: int, logits: torch.Tensor | None) -> None:
        """This rank's part of the step is through."""
        plan = self._plans.pop(micro_batch)
        result = RankResult(
            self._worker.times(micro_batch),
            self._local.end_step(micro_batch, plan.step),
            logits if self._gives_logits else None,
        )
        deadline = time.monotonic() + self._step_deadline_s
        self._results[micro_batch].post(plan.step, *result_parts(result), deadline=deadline)

    def _handle_control(self) -> bool:
        """Answer what has come; True when told to stop."""
        with contextlib.suppress(DeadlineExceeded):
            while True:
                incoming = self._control.receive(0.0)
                match incoming.message:
                    case IntegrityQuery():
                        self._queries.append(incoming)
                    case ShutdownWorker():
                        return True
        waiting = []
        for incoming in self._queries:
            assert isinstance(incoming.message, IntegrityQuery)
            if incoming.message.num_plans > self._num_steps:
                waiting.append(incoming)
            else:
                self._control.reply(incoming, integrity(self._local.executor))
        self._queries = waiting
        return False
