"""Continuous batching: which rows run in the next step, and what a step's result changes.

Order within a step: decode rows first (one per running sequence, oldest first), then prompts in
progress, then newly admitted ones, within `max_num_rows`. Prompt rows attend in the local executor
and their k and v also go to the sequence's placement; decode rows attend where the KV lives. When
a decode row lacks a page, the youngest running sequence is preempted: its pages are released and it
waits, in front, to be computed again from its tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from lamina.errors import CapacityError
from lamina.sched.admission import Admission, PageBudget
from lamina.sched.sequence import Finish, Sequence, check_finish
from lamina.types import LOCAL, EngineRequest, FinishReason, Span, StepPlan


class Batcher:
    """Owns all sequences of an engine, from `add` to their end."""

    def __init__(
        self,
        budget: PageBudget,
        *,
        by_requests: bool,
        max_num_seqs: int,
        max_num_rows: int,
        max_model_len: int,
    ) -> None:
        self.budget = budget
        self.max_model_len = max_model_len
        self.num_preemptions = 0
        self._admission = Admission(budget, by_requests=by_requests)
        self._max_num_seqs = max_num_seqs
        self._max_num_rows = max_num_rows
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of admission
        self._sequences: dict[int, Sequence] = {}
        self._ids: dict[str, int] = {}
        self._releases: list[tuple[int, int]] = []  # for the next plan
        self._next_id = 1
        self._next_step = 1
        if self._admission.max_tokens < max_model_len:
            raise CapacityError(
                f"the KV pages hold {self._admission.max_tokens} tokens of one sequence, "
                f"less than max_model_len ({max_model_len})"
            )

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether `plan` would return a plan."""
        return bool(self._sequences or self._releases)

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
        """Forget a request and release its pages with the next plan; False if it is unknown."""
        sequence_id = self._ids.get(request_id)
        if sequence_id is None:
            return False
        self._remove(self._sequences[sequence_id])
        return True

    def plan(self, micro_batch: int = 0) -> StepPlan | None:
        """The next step, or None when there is nothing to do. Pages are reserved in the budget."""
        spans: list[Span] = []
        rows_left = self._max_num_rows
        preemptions_before = self.num_preemptions
        for sequence in [s for s in self._running if not s.prefilling]:
            if sequence.placement and self._grow(sequence):
                where = sequence.placement
                spans.append(Span(sequence.id, 1, sequence.num_computed, where, where))
                rows_left -= 1
        for sequence in [s for s in self._running if s.prefilling]:
            rows_left -= self._append_prompt_rows(spans, sequence, rows_left)
        if self.num_preemptions == preemptions_before:
            while rows_left > 0 and (admitted := self._admit()) is not None:
                rows_left -= self._append_prompt_rows(spans, admitted, rows_left)
        if not spans and not self._releases:
            assert not self._sequences, "sequences wait but none can be admitted"
            return None
        return self._make_plan(spans, micro_batch)

    def plan_releases(self) -> StepPlan | None:
        """A step without rows that frees what waits for release; None when nothing does."""
        return self._make_plan([], 0) if self._releases else None

    def sampled_rows(self, plan: StepPlan) -> list[tuple[Sequence, int]]:
        """(sequence, row) of every row of `plan` whose logits give the sequence's next token."""
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
            For each of those sequences, how it ended or None. Stop tokens are not appended.
            A finished sequence is forgotten; its pages are released with the next plan.
        """
        for span in plan.spans:
            sequence = self._sequences[span.sequence]
            was_prefilling = sequence.prefilling
            sequence.num_computed = span.context_tokens + span.num_rows
            if was_prefilling and not sequence.prefilling and LOCAL not in sequence.placement:
                self._release(LOCAL, sequence)
        finishes: dict[int, Finish | None] = {}
        for sequence_id, token_id in tokens.items():
            sequence = self._sequences[sequence_id]
            finish = check_finish(sequence, token_id, self.max_model_len)
            finishes[sequence_id] = finish
            if finish is None or finish.reason is FinishReason.LENGTH:
                sequence.output_token_ids.append(token_id)
            if finish is not None:
                self._remove(sequence)
        return finishes

    def _make_plan(self, spans: list[Span], micro_batch: int) -> StepPlan:
        plan = StepPlan(self._next_step, micro_batch, tuple(spans), tuple(self._releases))
        self._releases.clear()
        self._next_step += 1
        return plan

    def _append_prompt_rows(self, spans: list[Span], sequence: Sequence, rows_left: int) -> int:
        num_rows = min(rows_left, sequence.prefill_target - sequence.num_computed)
        if num_rows > 0:
            stores = tuple(sorted({LOCAL, *sequence.placement}))
            spans.append(Span(sequence.id, num_rows, sequence.num_computed, (LOCAL,), stores))
        return num_rows

    def _admit(self) -> Sequence | None:
        if not self._waiting or len(self._running) >= self._max_num_seqs:
            return None
        sequence = self._waiting[0]
        # One page stays free for each running sequence that may still need one, so that those that
        # run can go on for a while before the newcomer would have to be preempted again.
        keep_free = sum(self._may_grow(running) for running in self._running)
        placement = self._admission.place(sequence.id, sequence.num_tokens, keep_free=keep_free)
        if placement is None:
            return None
        self._waiting.popleft()
        sequence.placement = placement
        sequence.prefill_target = sequence.num_tokens
        self._running.append(sequence)
        return sequence

    def _may_grow(self, sequence: Sequence) -> bool:
        """Whether the sequence may need more pages than it holds before it ends."""
        longest = self.max_model_len
        if sequence.request.sampling.max_tokens is not None:
            limit = sequence.num_prompt_tokens + sequence.request.sampling.max_tokens
            longest = min(longest, limit)
        return any(self.budget.missing(e, sequence.id, longest) for e in sequence.placement)

    def _grow(self, sequence: Sequence) -> bool:
        """Reserve the page for the sequence's next row; False if it had to be preempted itself."""
        while not all(
            self.budget.fits(e, sequence.id, sequence.num_tokens) for e in sequence.placement
        ):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        for executor in sequence.placement:
            self.budget.reserve(executor, sequence.id, sequence.num_tokens)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release_all(sequence)
        self._running.remove(sequence)
        sequence.placement = ()
        sequence.num_computed = 0
        sequence.prefill_target = 0
        self.num_preemptions += 1
        self._waiting.appendleft(sequence)

    def _remove(self, sequence: Sequence) -> None:
        if sequence.placement:
            self._release_all(sequence)
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        del self._sequences[sequence.id]
        del self._ids[sequence.request.request_id]

    def _release_all(self, sequence: Sequence) -> None:
        for executor in {LOCAL, *sequence.placement}:
            self._release(executor, sequence)

    def _release(self, executor: int, sequence: Sequence) -> None:
        if self.budget.release(executor, sequence.id):
            self._releases.append((executor, sequence.id))
