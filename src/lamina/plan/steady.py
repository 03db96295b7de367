"""Steps that are like the one before but for their contexts, without planning each of them.

While no request comes or ends, none can be admitted, and the pages suffice, the batcher's next plan
of a micro-batch is its last one with every context longer by one. The simulator then lets steps
pass and tells the batcher afterwards how many there were. Decisions are the same as step by step
(a test compares them), only sooner found.
"""

from __future__ import annotations

from collections.abc import Mapping

from lamina.sched.batcher import Batcher
from lamina.sched.placement import Placer
from lamina.sched.sequence import Sequence
from lamina.types import Share, Span, StepPlan, ceil_div


class WatchedPlacer(Placer):
    """Remembers that it found no room: until pages are given back or taken, it will not."""

    failed = False

    def place(
        self, num_tokens: int, longest: int, keep_free: Mapping[int, int]
    ) -> tuple[Share, ...] | None:
        placement = super().place(num_tokens, longest, keep_free)
        self.failed = placement is None
        return placement


class SteadyBatcher(Batcher):
    """A batcher that can be told of steps in which nothing was decided."""

    def is_settled(self, plan: StepPlan) -> bool:
        """Whether the next plan of a micro-batch has the same sequences: no decode row has moved to
        it or would move to another one, and none lacks a page."""
        if self.num_micro_batches == 1:
            return True
        counts = [0] * self.num_micro_batches
        for sequence in self._running:
            if sequence.starved:
                return False
            if not sequence.prefilling:
                counts[sequence.micro_batch] += 1
        return counts[plan.micro_batch] == len(plan.spans) and max(counts) - min(counts) < 2

    def grow_ahead(self, sequence: Sequence, num_steps: int) -> bool:
        """Reserve the pages that a sequence in flight needs `num_steps` steps after the last one
        that was planned; False (and no change) if they are not free."""
        num_tokens = sequence.num_tokens + num_steps
        missing = self.budget.missing(sequence.id, sequence.placement, num_tokens)
        if self.budget.lacking(missing):
            return False
        self.budget.reserve(sequence.id, missing)
        page = self.budget.page_tokens
        sequence.reserved_tokens = ceil_div(num_tokens, page) * page
        return True

    def skip(self, plan: StepPlan, num_steps: int) -> StepPlan:
        """As if the plan in flight, of decode rows alone, had been applied and planned again
        `num_steps` times; returns the plan that is in flight now. Pages are reserved already."""
        assert self._in_flight[plan.micro_batch] is plan, "the plan is the one in flight"
        tokens = [0] * num_steps
        spans = []
        for span in plan.spans:
            sequence = self._sequences[span.sequence]
            sequence.num_computed += num_steps
            sequence.output_token_ids += tokens
            context = span.context_tokens + num_steps
            spans.append(Span(span.sequence, 1, context, span.attend_on, span.store_on))
        self._next_step += num_steps
        now = StepPlan(self._next_step - 1, plan.micro_batch, tuple(spans), plan.releases)
        self._in_flight[plan.micro_batch] = now
        return now
