"""One engine in simulated time: the real batcher decides, the cost model says how long it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from lamina.plan.recorder import Busy, Occupancy, RequestTimes
from lamina.plan.step import StepCost, StepLoad, StepTimes, round_s
from lamina.sched.batcher import Batcher
from lamina.types import LOCAL, EngineRequest, SamplingParams, StepPlan

_LIMITS: dict[int, SamplingParams] = {}


def engine_request(index: int, num_prompt: int, num_output: int) -> EngineRequest:
    """A request whose tokens nobody looks at; `seed` is its index in the workload."""
    sampling = _LIMITS.get(num_output)
    if sampling is None:
        sampling = _LIMITS[num_output] = SamplingParams(max_tokens=num_output, temperature=0.0)
    return EngineRequest(
        request_id=str(index),
        # Scheduling reads no more of a prompt than its length, and a range has one in no memory.
        prompt_token_ids=cast("tuple[int, ...]", range(num_prompt)),
        sampling=sampling,
        seed=index,
    )


@dataclass(slots=True)
class Flight:
    """A step that runs."""

    plan: StepPlan
    load: StepLoad
    times: StepTimes
    tokens: dict[int, int]
    """What will have been sampled for each sequence; any token does."""
    first: list[int]
    """Of these sequences, those whose prompts this step completes."""
    left: float = 1.0
    """Part of the step that is still to run."""
    duration_s: float = math.inf
    """Of the whole step, as things are now."""


class Instance:
    """A batcher with its micro-batches in flight.

    The micro-batches advance together: while the same steps are in flight each has a steady speed;
    when one ends or begins, the others' speeds change for what they have left.
    """

    def __init__(
        self,
        batcher: Batcher,
        cost: StepCost,
        *,
        requests: RequestTimes,
        num_requests: int,
        num_replicas: int = 1,
        prompts_are_free: bool = False,
        own_executor: int = LOCAL,
        kv_bytes_per_page: dict[int, float],
        on_finish: Callable[[int, float], None] | None = None,
        gives_tokens: bool = True,
    ) -> None:
        """
        Args:
            requests: of the whole workload.
            prompts_are_free: their KV comes from elsewhere; a prompt's last row alone is computed,
                as a decode row.
            own_executor: the one whose KV lies on the model worker's own devices.
            on_finish: called with the request's index and the time when it ends here.
            gives_tokens: users get the tokens that are sampled here.
        """
        self.batcher = batcher
        self.cost = cost
        self.occupancy = Occupancy(num_requests)
        self.model_busy = Busy()
        self.busy = {e: Busy() for e in cost.attention if e not in (LOCAL, own_executor)}
        self.num_steps = 0
        self._requests = requests
        self._num_replicas = num_replicas
        self._prompts_are_free = prompts_are_free
        self._own = own_executor
        self._page_bytes = kv_bytes_per_page
        self._on_finish = on_finish
        self._gives_tokens = gives_tokens
        self._flights: dict[int, Flight] = {}
        self._last_token_s: dict[int, float] = {}
        self._now_s = 0.0
        self._end: tuple[float, int] | None = None  # of the first flight to end
        self._num_finished = 0

    @property
    def next_s(self) -> float:
        """When the next step ends; infinity if none runs."""
        return math.inf if self._end is None else self._end[0]

    def add(self, request: EngineRequest) -> None:
        """Queue a request; call `fill` afterwards."""
        self.batcher.add(request)

    def advance(self, now_s: float) -> None:
        """Let time pass; ends the step that ends then, if one does. Call `fill` afterwards."""
        elapsed_s = now_s - self._now_s
        flights = self._flights
        ended = self._end if self._end is not None and self._end[0] <= now_s else None
        tokens = len(flights[ended[1]].tokens) if ended else 0
        self._account(now_s, tokens if self._gives_tokens else 0)
        if elapsed_s > 0:
            for flight in flights.values():
                flight.left -= elapsed_s / flight.duration_s
        self._now_s = now_s
        if ended:
            self._finish(flights.pop(ended[1]))

    def fill(self) -> None:
        """Plan steps for idle micro-batches."""
        batcher = self.batcher
        changed = True
        began = False
        while changed:
            changed = False
            idle = batcher.idle
            for micro_batch in idle:
                plan = batcher.plan(micro_batch)
                if plan is None:
                    continue
                if plan.spans:
                    self._flights[micro_batch] = self._begin(plan)
                    changed = len(idle) > 1
                    began = True
                else:
                    batcher.apply(plan, {})
        if began or self._end is None or self._end[0] <= self._now_s:
            self._set_speeds()

    def _set_speeds(self) -> None:
        flights = self._flights
        self._end = None
        for micro_batch, flight in flights.items():
            others = [f.times for m, f in flights.items() if m != micro_batch]
            flight.duration_s = self.cost.step_s(round_s(flight.times, others, self._num_replicas))
            end_s = self._now_s + max(0.0, flight.left) * flight.duration_s
            if self._end is None or end_s < self._end[0]:
                self._end = end_s, micro_batch

    def _begin(self, plan: StepPlan) -> Flight:
        load = StepLoad()
        tokens: dict[int, int] = {}
        first: list[int] = []
        units = self.batcher.placer.units
        attending, attended, own = load.attending, load.attended, self._own
        sequence_of = self.batcher.sequence
        for span in plan.spans:
            sequence = sequence_of(span.sequence)
            total = span.context_tokens + span.num_rows
            shares = span.attend_on
            if sequence.num_computed < sequence.prefill_target:
                if span.context_tokens == 0:
                    self._requests.started(sequence.request.seed, self._now_s)
                if total == sequence.num_tokens:
                    tokens[span.sequence] = 0
                    first.append(span.sequence)
                if not self._prompts_are_free:
                    load.rows += span.num_rows
                    load.prompts.append((span.num_rows, span.context_tokens))
                    for share in span.store_on:
                        if share.executor not in (LOCAL, own):
                            load.stored[share.executor] = (
                                load.stored.get(share.executor, 0.0)
                                + span.num_rows * share.num_units / units
                            )
                    continue
                shares = sequence.placement
            else:
                tokens[span.sequence] = 0
            load.rows += 1
            for share in shares:
                executor = LOCAL if share.executor == own else share.executor
                part = share.num_units / units
                attending[executor] = attending.get(executor, 0.0) + part
                attended[executor] = attended.get(executor, 0.0) + part * share.num_tokens(total)
        load.logit_rows = len(tokens)
        return Flight(plan, load, self.cost.times(load), tokens, first)

    def _finish(self, flight: Flight) -> None:
        now_s, requests = self._now_s, self._requests
        self.num_steps += 1
        self._add_work(flight.load)
        indices = {}
        for sequence_id in flight.first:
            indices[sequence_id] = self.batcher.sequence(sequence_id)
        if self._gives_tokens:
            requests.tokens(len(flight.tokens), now_s)
            last = self._last_token_s
            for sequence_id in flight.first:
                if sequence_id not in last:  # else it was preempted and its prompt computed again
                    requests.first_token(indices[sequence_id].request.seed, now_s)
                    last[sequence_id] = math.nan
            gaps: dict[float, int] = {}
            for sequence_id in flight.tokens:
                before = last[sequence_id]
                gaps[before] = gaps.get(before, 0) + 1
                last[sequence_id] = now_s
            for before, count in gaps.items():
                if before == before:
                    requests.gap(now_s - before, count)
        ended = [
            (sequence_id, self.batcher.sequence(sequence_id).request.seed)
            for sequence_id in flight.tokens
        ]
        finishes = self.batcher.apply(flight.plan, flight.tokens)
        for sequence_id, index in ended:
            if finishes[sequence_id] is not None:
                self._num_finished += 1
                self._last_token_s.pop(sequence_id, None)
                if self._on_finish is not None:
                    self._on_finish(index, now_s)

    def _account(self, now_s: float, tokens: int) -> None:
        batcher, budget = self.batcher, self.batcher.budget
        elapsed_s = now_s - self._now_s
        self.occupancy.passed(
            now_s,
            running=batcher.num_running,
            waiting=batcher.num_waiting,
            finished=self._num_finished,
            tokens=tokens,
        )
        for executor, page_bytes in self._page_bytes.items():
            busy = self.busy.get(executor, self.model_busy)
            busy.memory_byte_s += budget.used(executor) * page_bytes * elapsed_s

    def _add_work(self, load: StepLoad) -> None:
        cost = self.cost
        work = cost.model_work(load)
        self.model_busy.flops += work.flops
        self.model_busy.num_bytes += work.num_bytes
        for executor, busy in self.busy.items():
            work = cost.attention_work(load, executor)
            busy.flops += work.flops
            busy.num_bytes += work.num_bytes
            hop = cost.hop_bytes(load, executor)
            busy.network_bytes += hop
            self.model_busy.network_bytes += hop
