"""The model worker: runs slices of the steps in flight; q, k, v and outputs pass to and fro.

It holds weights and no request state. Local and remote executors differ only in the link. With
several replicas a worker runs the slices that the timetable gives it (`sched/rotation.py`), and a
`ContextPort` moves what they need from worker to worker.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from lamina import _native
from lamina.convert.slices import SlicedModel, SliceState
from lamina.sched.rotation import Turns
from lamina.transport.topology import message_number
from lamina.types import LOCAL, ExecutorPlan, StepPlan
from lamina.workers.outputs import Outputs
from lamina.workers.routes import ExecutorEnd, Route, first_rows, layer_units
from lamina.workers.steptimes import NUM_TIMES, new_step_times


class StepInputs(NamedTuple):
    """The tensors of a step's plan."""

    input_ids: torch.Tensor
    """int64 [T], the token of every row."""
    position_ids: torch.Tensor
    """int64 [T], each row's position in its sequence."""
    logit_rows: torch.Tensor
    """int64 [R], the rows whose logits are wanted."""


class ContextPort(Protocol):
    """Moves what a slice needs of earlier slices between the replicas that run them."""

    def send(self, micro_batch: int, slice_index: int, state: SliceState) -> None:
        """After a slice that is not the step's last: give what later slices need to the replica
        that runs the next."""

    def is_ready(self, micro_batch: int, slice_index: int) -> bool:
        """Whether `receive` would not wait."""

    def awaited(self, micro_batch: int, slice_index: int) -> tuple[_native.Inbox, int]:
        """The message that `receive` takes."""

    def receive(
        self, micro_batch: int, slice_index: int, state: SliceState, deadline: float
    ) -> None:
        """Before a slice that is not the step's first: take what it needs into `state`."""


class _Step:
    """A step in flight here."""

    __slots__ = ("first_number", "outputs", "sends_kv", "sends_q", "state", "times")

    def __init__(
        self,
        first_number: int,
        state: SliceState,
        outputs: Outputs,
        sends_q: list[Route],
        sends_kv: list[Route],
        num_slices: int,
    ) -> None:
        self.first_number = first_number
        self.state = state
        self.outputs = outputs
        self.sends_q = sends_q
        self.sends_kv = sends_kv
        self.times = new_step_times(num_slices)


class ModelWorker:
    """Runs slices of up to one step per micro-batch. One thread uses it.

    Attributes:
        turns: what is to run here, in the timetable's order.
    """

    def __init__(
        self,
        model: SlicedModel,
        ends: Sequence[ExecutorEnd],
        *,
        num_micro_batches: int,
        early_q: bool,
        defer: bool = True,
        step_deadline_s: float,
        replica: int = 0,
        num_replicas: int = 1,
        context: ContextPort | None = None,
    ) -> None:
        """
        Args:
            ends: links to the executors, at least one.
            defer: send k and v before the rest of the slice is computed.
            step_deadline_s: longest wait for anything of a slice.
            context: None with one replica.
        """
        assert (context is None) == (num_replicas == 1), "replicas exchange contexts"
        self.model = model
        self.num_slices = model.num_layers + 1
        self.turns = Turns(num_micro_batches, replica, num_replicas)
        # The local executor last: the others get their q, k and v first.
        self._ends = {end.executor: end for end in sorted(ends, key=lambda e: e.executor == LOCAL)}
        self._early_q = early_q
        self._defer = defer
        self._step_deadline_s = step_deadline_s
        self._num_replicas = num_replicas
        self._context = context
        self._steps: list[_Step | None] = [None] * num_micro_batches
        num_units = ends[0].num_units
        self._merger = _native.ShareMerger(
            layer_units(model.attention_specs, num_units, model.dtype),
            num_units,
            str(model.dtype).removeprefix("torch."),
            num_micro_batches,
        )

    @torch.inference_mode()
    def begin(self, plan: StepPlan, parts: Mapping[int, ExecutorPlan], inputs: StepInputs) -> None:
        """Take up a step with rows; that of the same micro-batch before it is through here.

        Args:
            parts: the plan's part of every executor that takes part.
        """
        model, num_rows = self.model, plan.num_rows
        rows = first_rows(plan)
        routes = [
            Route(end, parts[executor], rows, num_rows)
            for executor, end in self._ends.items()
            if executor in parts
        ]
        sends_q = [route for route in routes if route.attends]
        outputs = Outputs(
            model.attention_specs,
            sends_q,
            self._merger,
            micro_batch=plan.micro_batch,
            num_rows=num_rows,
            dtype=model.dtype,
        )
        self._steps[plan.micro_batch] = _Step(
            message_number(plan.step, 0, model.num_layers),
            model.begin(*inputs),
            outputs,
            sends_q,
            [route for route in routes if route.stores],
            self.num_slices,
        )
        self.turns.begin(plan.micro_batch, self.num_slices)

    def times(self, micro_batch: int) -> array[float]:
        """The `SliceTimes` of the micro-batch's last step, as far as it ran here; they stay."""
        step = self._steps[micro_batch]
        assert step is not None, "a step was begun"
        return step.times

    def is_ready(self, micro_batch: int) -> bool:
        """Whether the micro-batch's next slice here would not wait for another process."""
        step = self._steps[micro_batch]
        assert step is not None, "a step was begun"
        index = self.turns.slice_of(micro_batch)
        if index == 0:
            return True
        if not step.outputs.are_here(step.first_number + index - 1):
            return False
        return self._context is None or self._context.is_ready(micro_batch, index)

    def missing(self, micro_batch: int) -> list[tuple[_native.Inbox, int]]:
        """The messages that the micro-batch's next slice here still waits for. Never blocks."""
        step = self._steps[micro_batch]
        assert step is not None, "a step was begun"
        index = self.turns.slice_of(micro_batch)
        if index == 0:
            return []
        messages = step.outputs.missing(step.first_number + index - 1)
        if self._context is not None and not self._context.is_ready(micro_batch, index):
            messages.append(self._context.awaited(micro_batch, index))
        return messages

    def run_next(self) -> tuple[int, torch.Tensor | None]:
        """Run the slice whose turn it is; a step must be in flight. Otherwise as `advance`.

        Returns:
            The micro-batch, and what `advance` returned.
        """
        micro_batch = self.turns.next(self.is_ready)
        assert micro_batch is not None, "no step is in flight"
        return micro_batch, self.advance(micro_batch)

    @torch.inference_mode()
    def advance(self, micro_batch: int) -> torch.Tensor | None:
        """Run the micro-batch's next slice here, waiting for what it needs.

        Returns:
            After the step's last slice its logits [R, vocabulary] in the model's dtype; else None.

        Raises:
            PeerLost, DeadlineExceeded, ProtocolMismatch: an executor failed; the step is void.
        """
        step = self._steps[micro_batch]
        assert step is not None, "a step was begun"
        index = self.turns.slice_of(micro_batch)
        model, state, context, clock = self.model, step.state, self._context, time.monotonic
        begin = clock()
        deadline = begin + self._step_deadline_s
        number = step.first_number + index
        if index:
            if context is not None:
                context.receive(micro_batch, index, state, deadline)
            state.attention_output = step.outputs.wait(index - 1, number - 1, deadline)
        here = clock()
        if index == model.num_layers:
            logits = model.run_last(state)
            end = clock()
            times = (begin, here, end, end, end, end, end)
        else:
            logits = None
            q = model.run_q(index, state)
            q_end = q_sent = clock()
            if self._early_q:
                for route in step.sends_q:
                    route.post_q(index, number, q, deadline)
                q_sent = clock()
            k, v = model.run_kv(index, state)
            if not self._defer:
                model.run_deferred(index, state)
            kv_end = clock()
            if not self._early_q:
                for route in step.sends_q:
                    route.post_q(index, number, q, deadline)
            for route in step.sends_kv:
                route.post_kv(index, number, k, v, deadline)
            kv_sent = clock()
            if self._defer:
                model.run_deferred(index, state)
            if context is not None:
                context.send(micro_batch, index, state)
            times = (begin, here, q_end, q_sent, kv_end, kv_sent, clock())
        step.times[index * NUM_TIMES : (index + 1) * NUM_TIMES] = array("d", times)
        self.turns.ran(micro_batch)
        return logits
