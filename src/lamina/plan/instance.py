"""One engine in simulated time: the real batcher decides, the cost model says how long it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

from lamina.plan.flight import Flight, contents, fill_due
from lamina.plan.recorder import Busy, Occupancy, RequestTimes
from lamina.plan.steady import SteadyBatcher, WatchedPlacer
from lamina.plan.step import StepCost, StepLoad, round_s
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


class Instance:
    """A batcher with its micro-batches in flight.

    The micro-batches advance together: while the same steps are in flight each has a steady speed;
    when one ends or begins, the others' speeds change for what they have left.
    """

    def __init__(
        self,
        batcher: SteadyBatcher,
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
        step_by_step: bool = False,
    ) -> None:
        """
        Args:
            requests: of the whole workload.
            prompts_are_free: their KV comes from elsewhere; a prompt's last row alone is computed,
                as a decode row.
            own_executor: the one whose KV lies on the model worker's own devices.
            on_finish: called with the request's index and the time when it ends here.
            gives_tokens: users get the tokens that are sampled here.
            step_by_step: let the batcher plan every step.
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
        self._step_by_step = step_by_step
        self._flights: dict[int, Flight] = {}
        self._last_token_s: dict[int, float] = {}
        self._now_s = 0.0
        self._end: tuple[float, int] | None = None  # of the first flight to end
        self._num_finished = 0
        # Whether the first waiting request was refused a place since the last change of pages.
        self._is_blocked = False
        self._has_news = False  # since micro-batches were planned last
        self._num_fills = 0

    @property
    def next_s(self) -> float:
        """When the next step ends; infinity if none runs."""
        return math.inf if self._end is None else self._end[0]

    def add(self, request: EngineRequest) -> None:
        """Queue a request; call `fill` afterwards."""
        self._is_blocked = False
        self._has_news = True
        self.batcher.add(request)

    def advance(self, now_s: float) -> None:
        """Let time pass; ends the step that ends then, if one does. Call `fill` afterwards."""
        elapsed_s = now_s - self._now_s
        flights = self._flights
        ended = None
        if self._end is not None and self._end[0] <= now_s:
            ended = flights[self._end[1]]
        self._account(now_s, len(ended.tokens) if ended and self._gives_tokens else 0)
        if elapsed_s > 0:
            for flight in flights.values():
                flight.left -= elapsed_s / flight.duration_s
        self._now_s = now_s
        if ended is None:
            return
        self.num_steps += 1
        self._add_work(ended.load)
        if self._gives_tokens:
            self._record_tokens(ended)
        if not self._step_by_step and self._passes(ended):
            self._pass(ended)
        else:
            self._finish(ended)

    def fill(self) -> None:
        """Plan steps for idle micro-batches."""
        batcher = self.batcher
        placer = batcher.placer
        began = False
        # Steps that passed have changed nothing for micro-batches that had nothing to do.
        changed = self._has_news and len(self._flights) < batcher.num_micro_batches
        self._has_news = False
        if changed:
            self._num_fills += 1
            self._settle()
        while changed:
            changed = False
            idle = batcher.idle
            for micro_batch in idle:
                if isinstance(placer, WatchedPlacer):
                    placer.failed = False
                plan = batcher.plan(micro_batch)
                if plan is None:
                    continue
                if plan.spans:
                    self._flights[micro_batch] = self._begin(plan)
                    self._is_blocked = isinstance(placer, WatchedPlacer) and placer.failed
                    changed = len(idle) > 1
                    began = True
                else:
                    batcher.apply(plan, {})
        if began or self._end is None or self._end[0] <= self._now_s:
            self._set_speeds()

    def _set_speeds(self) -> None:
        flights = sorted(self._flights.items())
        self._end = None
        for micro_batch, flight in flights:
            others = [f.times for m, f in flights if m != micro_batch]
            flight.duration_s = self.cost.step_s(round_s(flight.times, others, self._num_replicas))
            end_s = self._now_s + max(0.0, flight.left) * flight.duration_s
            if self._end is None or end_s < self._end[0]:
                self._end = end_s, micro_batch

    def _begin(self, plan: StepPlan) -> Flight:
        held = contents(
            plan,
            self.batcher.sequence,
            self.batcher.placer.units,
            own_executor=self._own,
            prompts_are_free=self._prompts_are_free,
        )
        for index in held.started:
            self._requests.started(index, self._now_s)
        times = self.cost.times(held.load)
        return Flight(plan, held.load, times, held.tokens, held.first, held.most_passed)

    def _passes(self, flight: Flight) -> bool:
        """Whether the next step is like the one that has ended but for the contexts; reserves the
        pages for it."""
        passed = flight.num_passed + 1
        batcher = self.batcher
        if passed > flight.most_passed or (batcher.num_waiting and not self._is_blocked):
            return False
        if flight.checked != self._num_fills:
            if not batcher.is_settled(flight.plan):
                return False
            flight.checked = self._num_fills
        if not flight.has_due:
            fill_due(flight, batcher.sequence)
        for sequence in flight.due.get(passed, ()):
            # Taken pages may be what a waiting request is refused for, or make it give way.
            if batcher.num_waiting or not batcher.grow_ahead(sequence, passed):
                return False
            next_due = flight.due.setdefault(passed + batcher.budget.page_tokens, [])
            next_due.append(sequence)
        flight.due.pop(passed, None)
        return True

    def _pass(self, flight: Flight) -> None:
        flight.num_passed += 1
        load = flight.load
        for executor, rows in load.attending.items():
            load.attended[executor] += rows
        flight.times = self.cost.times(load)
        flight.left = 1.0
        self._set_speeds()

    def _settle(self) -> None:
        """Tell the batcher of the steps that have passed."""
        for flight in self._flights.values():
            if flight.num_passed:
                flight.plan = self.batcher.skip(flight.plan, flight.num_passed)
                flight.most_passed -= flight.num_passed
                flight.num_passed = 0
                flight.due.clear()
                flight.has_due = False

    def _record_tokens(self, flight: Flight) -> None:
        now_s, requests, last = self._now_s, self._requests, self._last_token_s
        requests.tokens(len(flight.tokens), now_s)
        for sequence in flight.first:
            if sequence.id not in last:  # else it was preempted and its prompt computed again
                requests.first_token(sequence.request.seed, now_s)
                last[sequence.id] = math.nan
        gaps: dict[float, int] = {}
        for sequence_id in flight.tokens:
            before = last[sequence_id]
            gaps[before] = gaps.get(before, 0) + 1
            last[sequence_id] = now_s
        for before, count in gaps.items():
            if before == before:
                requests.gap(now_s - before, count)

    def _finish(self, flight: Flight) -> None:
        self._settle()
        del self._flights[flight.plan.micro_batch]
        self._is_blocked = False
        self._has_news = True
        indices = {s: self.batcher.sequence(s).request.seed for s in flight.tokens}
        finishes = self.batcher.apply(flight.plan, flight.tokens)
        for sequence_id, finish in finishes.items():
            if finish is not None:
                self._num_finished += 1
                self._last_token_s.pop(sequence_id, None)
                if self._on_finish is not None:
                    self._on_finish(indices[sequence_id], self._now_s)

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
