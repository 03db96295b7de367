"""Continuous batching: which rows run in the next step of a micro-batch, and what its result
changes.

Order within a step: decode rows first (one per running sequence, oldest first), then prompts in
progress, then newly admitted ones, within `max_num_rows`. Prompt rows attend in the local executor
and their k and v also go to the sequence's placement; decode rows attend where the KV lives.

A sequence belongs to one micro-batch and is in at most one step in flight; between steps, decode
rows move to where there are fewer (`sched/balance.py`), and so do newcomers. Sequences in flight
are not touched: their pages stay where they are until the step is applied.

When a decode row lacks a page, the youngest sequences that are not in flight are preempted: their
pages are released and they wait, in front, to be computed again from their tokens. If the younger
ones are all in flight, the row waits; until it has its page, no younger one gets any there.
Releases ride with the next plan of any micro-batch: executors take the plans in order, so it may
use the pages itself.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping
from operator import attrgetter

from lamina.errors import CapacityError
from lamina.sched.balance import best_for_newcomer, rebalance
from lamina.sched.budget import PageBudget
from lamina.sched.placement import Placer
from lamina.sched.sequence import Finish, Sequence, check_finish
from lamina.types import LOCAL, EngineRequest, FinishReason, Span, StepPlan, ceil_div

_by_age = attrgetter("id")


class Batcher:
    """Owns all sequences of an engine, from `add` to their end."""

    def __init__(
        self,
        budget: PageBudget,
        placer: Placer,
        *,
        num_micro_batches: int = 1,
        num_replicas: int = 1,
        max_num_seqs: int,
        max_num_rows: int,
        max_model_len: int,
    ) -> None:
        """
        Args:
            num_micro_batches: most that may be in use; see `depth`. num_replicas: of the model.
            What the local executors hold of a sequence is spread over them
                by its micro-batch (`rotation.replica_of`).
            max_num_seqs: most sequences that run at once, over all micro-batches.
            max_num_rows: most rows of one step.
        """
        assert max_num_rows >= max_num_seqs, "every running sequence may have a row"
        self.budget = budget
        self.placer = placer
        self.max_model_len = max_model_len
        self.num_micro_batches = num_micro_batches
        self.num_preemptions = 0
        self._depth = num_micro_batches
        self._num_replicas = num_replicas
        self._max_num_seqs = max_num_seqs
        self._max_num_rows = max_num_rows
        self._waiting: list[Sequence] = []  # oldest first
        self._running: list[Sequence] = []  # oldest first
        self._sequences: dict[int, Sequence] = {}
        self._ids: dict[str, int] = {}
        self._in_flight: dict[int, StepPlan] = {}
        self._releases: list[tuple[int, int]] = []  # for the next plan
        self._next_id = 1
        self._next_step = 1
        if placer.max_tokens < max_model_len:
            raise CapacityError(
                f"the KV pages hold {placer.max_tokens} tokens of one sequence, "
                f"less than max_model_len ({max_model_len})"
            )

    @property
    def depth(self) -> int:
        """Micro-batches in use: 0, 1, ..., depth - 1. May be set at any time."""
        return self._depth

    @depth.setter
    def depth(self, depth: int) -> None:
        assert 1 <= depth <= self.num_micro_batches, "depth is within num_micro_batches"
        self._depth = depth

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_decoding(self) -> int:
        """Running sequences whose prompts are computed."""
        return sum(not s.prefilling for s in self._running)

    @property
    def has_work(self) -> bool:
        """Whether anything is in flight or `plan` would return a plan for an idle micro-batch."""
        return bool(self._sequences or self._releases or self._in_flight)

    @property
    def idle(self) -> tuple[int, ...]:
        """Micro-batches to call `plan` for: no step in flight, and in use (or still with
        sequences).

        Any call of `add`, `abort`, `plan` or `apply` may give work to any of them.
        """
        left = {s.micro_batch for s in self._running if s.micro_batch >= self._depth}
        return tuple(m for m in (*range(self._depth), *sorted(left)) if m not in self._in_flight)

    def sequence(self, sequence_id: int) -> Sequence:
        return self._sequences[sequence_id]

    def sequences(self) -> Iterable[Sequence]:
        return self._sequences.values()

    def add(self, request: EngineRequest) -> None:
        """Queue a request. The caller has checked its prompt against `max_model_len`."""
        assert request.request_id not in self._ids, f"request {request.request_id} was added twice"
        assert 0 < len(request.prompt_token_ids) < self.max_model_len, "prompt must leave room"
        sequence = Sequence(id=self._next_id, request=request)
        self._next_id += 1
        self._sequences[sequence.id] = sequence
        self._ids[request.request_id] = sequence.id
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> bool:
        """Forget a request; False if it is unknown.

        Its pages are released with the next plan; if it is in flight, with the next one after its
        step was applied.
        """
        sequence_id = self._ids.pop(request_id, None)
        if sequence_id is None:
            return False
        sequence = self._sequences[sequence_id]
        if sequence.in_flight:
            sequence.aborted = True
        else:
            self._remove(sequence)
        return True

    def plan(self, micro_batch: int = 0) -> StepPlan | None:
        """The next step of an idle micro-batch, in flight until it is applied; its pages are
        reserved.

        Returns:
            None when there is nothing for this micro-batch to do now. A plan without rows only
            releases pages.
        """
        assert micro_batch not in self._in_flight, f"micro-batch {micro_batch} has a step in flight"
        self._rebalance()
        spans: list[Span] = []
        self._append_decode_rows(spans, micro_batch)
        rows_left = self._max_num_rows - len(spans)
        for sequence in self._running:
            if sequence.micro_batch == micro_batch and sequence.prefilling and rows_left > 0:
                rows_left -= self._append_prompt_rows(spans, sequence, rows_left)
        self._admit(spans, micro_batch, rows_left)
        # Releases alone make a step only when no other will ever carry them.
        if not spans and (self._sequences or not self._releases):
            can_start = micro_batch < self._depth and not (self._running or self._in_flight)
            assert not (can_start and self._waiting), "sequences wait but none can be admitted"
            return None
        plan = self._make_plan(spans, micro_batch)
        self._in_flight[micro_batch] = plan
        for span in spans:
            self._sequences[span.sequence].rows_in_flight = span.num_rows
        return plan

    def plan_releases(self, micro_batch: int = 0) -> StepPlan | None:
        """A step without rows that frees what waits for release; None when nothing does.

        It is not in flight, and not to be applied.
        """
        assert micro_batch not in self._in_flight, f"micro-batch {micro_batch} has a step in flight"
        return self._make_plan([], micro_batch) if self._releases else None

    def sampled_rows(self, plan: StepPlan) -> list[tuple[Sequence, int]]:
        """(sequence, row) of every row of a plan in flight whose logits give the sequence's next
        token."""
        result = []
        row = 0
        for span in plan.spans:
            row += span.num_rows
            sequence = self._sequences[span.sequence]
            if span.context_tokens + span.num_rows == sequence.num_tokens:
                result.append((sequence, row - 1))
        return result

    def apply(self, plan: StepPlan, tokens: Mapping[int, int]) -> dict[int, Finish | None]:
        """Commit a step that ran.

        Args:
            tokens: the token sampled for each sequence of `sampled_rows(plan)`.

        Returns:
            For each of those sequences, how it ended or None; those aborted meanwhile are left out.
            Stop tokens are not appended. A finished sequence is forgotten; its pages are released
            with the next plan.
        """
        in_flight = self._in_flight.pop(plan.micro_batch, None)
        assert in_flight is plan, "a plan in flight is applied, and once"
        finishes: dict[int, Finish | None] = {}
        for span in plan.spans:
            sequence = self._sequences[span.sequence]
            sequence.rows_in_flight = 0
            if sequence.aborted:
                self._remove(sequence)
                continue
            was_prefilling = sequence.prefilling
            sequence.num_computed = span.context_tokens + span.num_rows
            if was_prefilling and not sequence.prefilling:
                self._release_prompt(sequence)
            if sequence.id in tokens:
                finishes[sequence.id] = self._append(sequence, tokens[sequence.id])
        return finishes

    def _append(self, sequence: Sequence, token_id: int) -> Finish | None:
        finish = check_finish(sequence, token_id, self.max_model_len)
        if finish is None or finish.reason is FinishReason.LENGTH:
            sequence.output_token_ids.append(token_id)
        if finish is not None:
            del self._ids[sequence.request.request_id]
            self._remove(sequence)
        return finish

    def _make_plan(self, spans: list[Span], micro_batch: int) -> StepPlan:
        plan = StepPlan(self._next_step, micro_batch, tuple(spans), tuple(self._releases))
        self._releases.clear()
        self._next_step += 1
        return plan

    def _rebalance(self) -> None:
        if self.num_micro_batches > 1:
            rebalance(self._running, self._depth, self._may_move)

    def _may_move(self, sequence: Sequence, micro_batch: int) -> bool:
        """Whether the sequence may run in the steps of another micro-batch from now on."""
        if sequence.in_flight:
            return False
        # What is kept locally lies in the replicas that the micro-batch's layers run on.
        same_replicas = (sequence.micro_batch - micro_batch) % self._num_replicas == 0
        return same_replicas or not self.budget.holds(LOCAL, sequence.id)

    def _append_decode_rows(self, spans: list[Span], micro_batch: int) -> None:
        """Rows of the sequences whose prompts are computed; whoever starves, in any micro-batch,
        gets its pages before younger ones."""
        for sequence in list(self._running):
            if sequence.in_flight or sequence.prefilling or not sequence.placement:
                continue
            is_due = sequence.micro_batch == micro_batch
            if not (is_due or sequence.starved):
                continue
            sequence.starved = not self._grow(sequence)
            if is_due and not sequence.starved:
                where = sequence.placement
                spans.append(Span(sequence.id, 1, sequence.num_computed, where, where))

    def _grow(self, sequence: Sequence) -> bool:
        """Reserve the page for the sequence's next row; False if it must wait for it.

        Older sequences are asked first, so a younger one finds nothing to preempt where one
        starves.
        """
        if sequence.num_tokens <= sequence.reserved_tokens:
            return True
        missing = self.budget.missing(sequence.id, sequence.placement, sequence.num_tokens)
        while lacking := self.budget.lacking(missing):
            victim = self._youngest_holder(sequence, lacking)
            if victim is None:
                return False
            self._preempt(victim)
        self._reserve(sequence, missing)
        return True

    def _youngest_holder(self, than: Sequence, executors: set[int]) -> Sequence | None:
        """The youngest sequence younger than another that is not in flight and has pages there."""
        for sequence in reversed(self._running):
            if sequence is than:
                return None
            if not sequence.in_flight and any(self.budget.holds(e, sequence.id) for e in executors):
                return sequence
        return None

    def _reserve(self, sequence: Sequence, missing: Mapping[int, int]) -> None:
        self.budget.reserve(sequence.id, missing)
        page = self.budget.page_tokens
        sequence.reserved_tokens = ceil_div(sequence.num_tokens, page) * page

    def _append_prompt_rows(self, spans: list[Span], sequence: Sequence, rows_left: int) -> int:
        num_rows = min(rows_left, sequence.prefill_target - sequence.num_computed)
        local = self.placer.local_share
        elsewhere = [share for share in sequence.placement if share.executor != LOCAL]
        spans.append(
            Span(sequence.id, num_rows, sequence.num_computed, (local,), (local, *elsewhere))
        )
        return num_rows

    def _admit(self, spans: list[Span], micro_batch: int, rows_left: int) -> None:
        """Start waiting sequences while there are rows and pages, unless they do better
        elsewhere."""
        if not self._waiting or micro_batch >= self._depth:
            return
        # The next page stays free for each running sequence that may still need one (for those that
        # starve, the one that they wait for), so that those that run can go on for a while before
        # the newcomer would have to be preempted again.
        keep_free: dict[int, int] = {}
        for running in self._running:
            self._add_next_pages(running, keep_free)
        while rows_left > 0 and self._waiting and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            if micro_batch != best_for_newcomer(
                self._running,
                self._depth,
                sequence.num_tokens,
                self._max_num_rows,
                asking=micro_batch,
            ):
                return
            placement = self.placer.place(
                sequence.num_tokens, sequence.longest(self.max_model_len), keep_free
            )
            if placement is None:
                return
            del self._waiting[0]
            sequence.placement = placement
            sequence.micro_batch = micro_batch
            sequence.prefill_target = sequence.num_tokens
            shares = {self.placer.local_share, *placement}
            self._reserve(sequence, self.budget.missing(sequence.id, shares, sequence.num_tokens))
            insort(self._running, sequence, key=_by_age)
            self._add_next_pages(sequence, keep_free)
            rows_left -= self._append_prompt_rows(spans, sequence, rows_left)

    def _add_next_pages(self, sequence: Sequence, pages: dict[int, int]) -> None:
        """Add what the sequence will need next if it grows beyond the pages that it holds."""
        after = sequence.reserved_tokens + 1
        if after <= sequence.longest(self.max_model_len):
            for executor, count in self.budget.missing(
                sequence.id, sequence.placement, after
            ).items():
                pages[executor] = pages.get(executor, 0) + count

    def _preempt(self, sequence: Sequence) -> None:
        self._release_all(sequence)
        self._running.remove(sequence)
        sequence.placement = ()
        sequence.num_computed = 0
        sequence.prefill_target = 0
        sequence.reserved_tokens = 0
        sequence.starved = False
        self.num_preemptions += 1
        insort(self._waiting, sequence, key=_by_age)

    def _remove(self, sequence: Sequence) -> None:
        if sequence.placement:
            self._release_all(sequence)
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        del self._sequences[sequence.id]

    def _release_prompt(self, sequence: Sequence) -> None:
        """Give back the local pages of a prompt that is computed, unless it stays there."""
        if all(share.executor != LOCAL for share in sequence.placement):
            self._release(LOCAL, sequence)

    def _release_all(self, sequence: Sequence) -> None:
        for executor in sorted({LOCAL, *(share.executor for share in sequence.placement)}):
            self._release(executor, sequence)

    def _release(self, executor: int, sequence: Sequence) -> None:
        if self.budget.release(executor, sequence.id):
            self._releases.append((executor, sequence.id))
