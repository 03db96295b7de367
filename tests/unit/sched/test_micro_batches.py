"""Several micro-batches in flight: the batcher under any sequence of calls, and its rules one by
one."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lamina.sched.placement import Mode
from lamina.types import FinishReason, StepPlan
from support.scheduling import LaneExecutors, make_batcher, make_request


class BatcherMachine(RuleBasedStateMachine):
    """Adds, aborts, plans and applies in any order, with pages for little more than one
    sequence."""

    @initialize(
        mode=st.sampled_from(["heads", "requests", "tokens"]),
        spill=st.booleans(),
        num_remote=st.integers(0, 3),
        pages=st.lists(st.integers(16, 24), min_size=4, max_size=4),
        depth=st.integers(1, 4),
        num_replicas=st.integers(1, 3),
        max_num_rows=st.integers(6, 20),
        max_num_seqs=st.integers(1, 6),
    )
    def start(
        self,
        mode: Mode,
        spill: bool,
        num_remote: int,
        pages: list[int],
        depth: int,
        num_replicas: int,
        max_num_rows: int,
        max_num_seqs: int,
    ) -> None:
        self.batcher = make_batcher(
            dict(enumerate(pages[: num_remote + 1])),
            mode=mode,
            spill=spill,
            depth=depth,
            num_replicas=num_replicas,
            max_num_rows=max_num_rows,
            max_num_seqs=max_num_seqs,
        )
        self.executors = LaneExecutors(self.batcher)
        self.in_flight: dict[int, StepPlan] = {}
        self.open: set[str] = set()
        self.num_added = 0

    @rule(num_prompt=st.integers(1, 31), max_tokens=st.none() | st.integers(1, 31))
    def add(self, num_prompt: int, max_tokens: int | None) -> None:
        name = str(self.num_added)
        self.num_added += 1
        self.batcher.add(make_request(name, num_prompt, max_tokens=max_tokens))
        self.open.add(name)

    @rule(pick=st.integers(0, 99))
    def abort(self, pick: int) -> None:
        if self.open:
            name = sorted(self.open)[pick % len(self.open)]
            assert self.batcher.abort(name)
            assert not self.batcher.abort(name)
            self.open.discard(name)

    @rule(depth=st.integers(1, 4))
    def set_depth(self, depth: int) -> None:
        self.batcher.depth = min(depth, self.batcher.num_micro_batches)

    @rule(executor=st.integers(1, 3), weight=st.floats(0.1, 10.0))
    def set_weight(self, executor: int, weight: float) -> None:
        if executor in self.batcher.placer.weights:
            self.batcher.placer.weights[executor] = weight

    @rule(pick=st.integers(0, 3))
    def plan(self, pick: int) -> None:
        if idle := self.batcher.idle:
            self.plan_one(idle[pick % len(idle)])

    @rule(pick=st.integers(0, 3))
    def apply(self, pick: int) -> None:
        if self.in_flight:
            self.apply_one(sorted(self.in_flight)[pick % len(self.in_flight)])

    def plan_one(self, micro_batch: int) -> None:
        oldest, _ = self.oldest()
        plan = self.batcher.plan(micro_batch)
        assert not oldest or self.batcher.sequence(oldest).placement, "the oldest was preempted"
        if plan is None:
            return
        assert plan.micro_batch == micro_batch
        assert plan.num_rows <= 20
        self.executors.follow(plan)
        for span in plan.spans:
            sequence = self.batcher.sequence(span.sequence)
            assert sequence.micro_batch == micro_batch
            assert span.context_tokens == sequence.num_computed
        self.in_flight[micro_batch] = plan

    def apply_one(self, micro_batch: int) -> None:
        plan = self.in_flight.pop(micro_batch)
        self.executors.done(plan)
        sampled = [s for s, _ in self.batcher.sampled_rows(plan)]
        names = {s.id: s.request.request_id for s in sampled}
        aborted = {s.id for s in sampled if s.aborted}
        finishes = self.batcher.apply(plan, {s.id: 1 for s in sampled})
        assert finishes.keys() == names.keys() - aborted
        for sequence_id, finish in finishes.items():
            if finish is not None:
                assert finish.reason is FinishReason.LENGTH
                self.open.discard(names[sequence_id])

    @invariant()
    def books_agree(self) -> None:
        budget = self.batcher.budget
        for executor in budget.capacity_pages:
            sequences = budget.sequences(executor)
            unreleased = self.executors.sequences(executor) - sequences
            assert self.executors.num_used(executor) <= budget.used(executor) + sum(
                self.executors.held(executor, s) for s in unreleased
            )
            assert budget.used(executor) <= budget.capacity_pages[executor]
            for plan in self.in_flight.values():
                for span in plan.spans:
                    sequence = self.batcher.sequence(span.sequence)
                    if not sequence.prefilling:
                        shares = [s for s in span.store_on if s.executor == executor]
                        need = sum(budget.pages(s, sequence.num_tokens) for s in shares)
                        assert self.executors.held(executor, span.sequence) == need

    def teardown(self) -> None:
        """Whatever was begun comes to an end, the oldest first to get what it needs."""
        if not hasattr(self, "batcher"):
            return
        progress, since = (0, 0), 0
        turn = 0
        while self.batcher.has_work:
            turn += 1
            for micro_batch in reversed(self.batcher.idle) if turn % 2 else self.batcher.idle:
                self.plan_one(micro_batch)
            assert self.in_flight, "work is left and nothing is in flight, but nobody has a plan"
            # One step at a time is through: the others stay in flight.
            flying = sorted(self.in_flight)
            self.apply_one(flying[turn % len(flying)])
            self.books_agree()
            oldest = self.oldest()
            if oldest != progress:
                progress, since = oldest, turn
            assert turn - since < 30, "the oldest does not progress"
        assert not self.open
        assert not self.in_flight
        assert self.executors.is_empty

    def oldest(self) -> tuple[int, int]:
        """The oldest running sequence and its length so far."""
        running = [s for s in self.batcher.sequences() if s.placement]
        oldest = min(running, key=lambda s: s.id, default=None)
        return (0, 0) if oldest is None else (oldest.id, oldest.num_computed)


BatcherMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestBatcherMachine = BatcherMachine.TestCase
