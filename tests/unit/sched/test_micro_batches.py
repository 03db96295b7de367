"""Several micro-batches in flight: the batcher under any sequence of calls, and its rules one by
one."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lamina.sched.batcher import Batcher
from lamina.sched.placement import Mode
from lamina.types import LOCAL, FinishReason, StepPlan
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


def add_decoding(batcher: Batcher, names: str, num_prompt: int = 4) -> None:
    """Requests whose prompts are computed, one after the other, in whatever micro-batch takes
    them."""
    for name in names:
        batcher.add(make_request(name, num_prompt, max_tokens=24))
        for micro_batch in batcher.idle:
            if plan := batcher.plan(micro_batch):
                apply(batcher, plan)


def apply(batcher: Batcher, plan: StepPlan) -> None:
    batcher.apply(plan, {s.id: 1 for s, _ in batcher.sampled_rows(plan)})


def must_plan(batcher: Batcher, micro_batch: int) -> StepPlan:
    plan = batcher.plan(micro_batch)
    assert plan is not None
    return plan


def rows(plan: StepPlan) -> dict[int, int]:
    return {span.sequence: span.num_rows for span in plan.spans}


def micro_batches(batcher: Batcher) -> dict[int, int]:
    return {s.id: s.micro_batch for s in batcher.sequences() if s.placement}


BIG = {LOCAL: 64, 1: 256}


def test_newcomers_go_where_the_fewest_rows_are() -> None:
    batcher = make_batcher(BIG, depth=2, max_num_seqs=8)
    add_decoding(batcher, "abc")
    assert sorted(micro_batches(batcher).values()) in ([0, 0, 1], [0, 1, 1])
    emptier = 0 if list(micro_batches(batcher).values()).count(0) == 1 else 1
    batcher.add(make_request("d", 4))
    fuller = must_plan(batcher, 1 - emptier)
    assert 4 not in rows(fuller), "not simply to the one that asks"
    assert rows(must_plan(batcher, emptier))[4] == 4


def test_equal_rows_are_told_apart_by_cached_tokens() -> None:
    batcher = make_batcher(BIG, depth=2, max_num_seqs=8)
    add_decoding(batcher, "a", num_prompt=12)
    add_decoding(batcher, "b", num_prompt=2)
    where = micro_batches(batcher)
    assert where[1] != where[2]
    batcher.add(make_request("c", 4))
    assert 3 not in rows(must_plan(batcher, where[1]))
    assert 3 in rows(must_plan(batcher, where[2]))


def test_one_sequence_leaves_the_other_micro_batch_alone() -> None:
    batcher = make_batcher(BIG, depth=2)
    add_decoding(batcher, "a")
    (where,) = micro_batches(batcher).values()
    assert batcher.plan(1 - where) is None
    assert rows(must_plan(batcher, where)) == {1: 1}
    assert batcher.plan(1 - where) is None
    assert batcher.idle == (1 - where,)


def test_a_prompt_goes_to_the_micro_batch_without_decode_rows() -> None:
    batcher = make_batcher(BIG, depth=2)
    add_decoding(batcher, "a")
    (where,) = micro_batches(batcher).values()
    batcher.add(make_request("b", 30))
    decode = must_plan(batcher, where)
    assert rows(decode) == {1: 1}
    chunk = must_plan(batcher, 1 - where)
    assert rows(chunk) == {2: 16}
    apply(batcher, decode)
    assert rows(must_plan(batcher, where)) == {1: 1}, "undisturbed"


def test_a_micro_batch_whose_step_is_full_of_prompts_takes_no_newcomer() -> None:
    batcher = make_batcher(BIG, depth=2)
    add_decoding(batcher, "a")
    (where,) = micro_batches(batcher).values()
    batcher.add(make_request("b", 30))
    batcher.add(make_request("c", 30))
    assert rows(must_plan(batcher, 1 - where)) == {2: 16}
    # 14 rows of b are left, so there is room for c behind them; but not for another one.
    assert rows(must_plan(batcher, where)) == {1: 1}
    batcher = make_batcher(BIG, depth=2, max_num_rows=10)
    add_decoding(batcher, "a")
    (where,) = micro_batches(batcher).values()
    batcher.add(make_request("b", 30))
    batcher.add(make_request("c", 30))
    assert rows(must_plan(batcher, 1 - where)) == {2: 10}
    assert rows(must_plan(batcher, where)) == {1: 1, 3: 9}


def test_a_deeper_pipeline_takes_its_share_of_the_decode_rows() -> None:
    batcher = make_batcher(BIG, depth=4, max_num_seqs=8)
    batcher.depth = 1
    add_decoding(batcher, "abcdefg")
    assert set(micro_batches(batcher).values()) == {0}
    batcher.depth = 2
    first, second = must_plan(batcher, 0), must_plan(batcher, 1)
    assert len(first.spans) == 4
    assert len(second.spans) == 3
    assert not rows(first).keys() & rows(second).keys()
    batcher.depth = 1
    apply(batcher, first)
    assert len(must_plan(batcher, 0).spans) == 4, "those in flight stay"
    apply(batcher, second)
    assert batcher.idle == (1,)
    assert batcher.plan(1) is None, "handed over to micro-batch 0, which is in flight"
    assert batcher.idle == ()


def test_rows_that_end_unevenly_are_evened_out() -> None:
    batcher = make_batcher(BIG, depth=2, max_num_seqs=8)
    add_decoding(batcher, "abcdef")
    where = micro_batches(batcher)
    for sequence, micro_batch in where.items():
        if micro_batch == 1:
            batcher.abort("abcdef"[sequence - 1])
    assert len(must_plan(batcher, 0).spans) == 2
    assert len(must_plan(batcher, 1).spans) == 1


def test_prompts_in_progress_stay_with_the_replicas_that_have_them() -> None:
    batcher = make_batcher(BIG, depth=2, num_replicas=2)
    batcher.depth = 2
    add_decoding(batcher, "a")
    (where,) = micro_batches(batcher).values()
    batcher.add(make_request("b", 30))
    apply(batcher, must_plan(batcher, 1 - where))
    if where == 0:
        batcher.depth = 1
        assert batcher.idle == (0, 1), "not in use any more, but not empty"
    apply(batcher, must_plan(batcher, 1 - where))
    assert micro_batches(batcher)[2] == 1 - where
    if where == 0:
        assert batcher.plan(1) is None
        assert micro_batches(batcher)[2] == 0, "its prompt is computed"


def test_an_aborted_sequence_in_flight_ends_with_its_step() -> None:
    batcher = make_batcher({LOCAL: 16, 1: 64}, depth=2)
    executors = LaneExecutors(batcher)
    batcher.add(make_request("a", 6, max_tokens=9))
    first = must_plan(batcher, 0)
    executors.follow(first)
    assert batcher.abort("a")
    batcher.add(make_request("a", 6, max_tokens=9))
    assert batcher.budget.holds(1, 1)
    second = must_plan(batcher, 1)
    executors.follow(second)
    assert second.releases == ()
    executors.done(first)
    assert batcher.apply(first, {1: 5}) == {}, "its token is nobody's"
    third = batcher.plan(0)
    assert third is None, "the other micro-batch has rows and will carry the releases"
    executors.done(second)
    assert batcher.apply(second, {2: 5}) == {2: None}
    last = must_plan(batcher, 1)
    executors.follow(last)
    assert set(last.releases) == {(LOCAL, 1), (1, 1), (LOCAL, 2)}


def test_the_oldest_waits_for_those_in_flight_and_is_served_first() -> None:
    # Eight pages of two lanes each: the oldest begins with three and takes the last one.
    batcher = make_batcher({LOCAL: 16, 1: 16}, depth=2)
    batcher.add(make_request("a", 12, max_tokens=19))
    batcher.add(make_request("b", 15, max_tokens=9))
    for plan in (must_plan(batcher, 0), must_plan(batcher, 1)):
        apply(batcher, plan)
    oldest, youngest = batcher.sequences()
    in_flight = must_plan(batcher, youngest.micro_batch)
    while plan := batcher.plan(oldest.micro_batch):
        apply(batcher, plan)
    assert oldest.num_tokens == 17, "it needs another page"
    assert oldest.starved
    assert batcher.num_preemptions == 0
    apply(batcher, in_flight)
    assert batcher.plan(youngest.micro_batch) is None, "it gives its pages to the oldest"
    assert not youngest.placement
    assert rows(must_plan(batcher, oldest.micro_batch)) == {1: 1}
