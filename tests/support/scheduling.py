"""Executors that are plain page allocators and check the plans that they follow."""

from __future__ import annotations

from collections.abc import Mapping

from lamina.kv.pages import PageAllocator
from lamina.sched.batcher import Batcher
from lamina.sched.budget import PageBudget
from lamina.sched.placement import Mode, Placer
from lamina.types import LOCAL, EngineRequest, SamplingParams, StepPlan

PAGE = 4
UNITS = 2


def make_batcher(
    capacity: Mapping[int, int],
    *,
    mode: Mode = "heads",
    spill: bool = False,
    depth: int = 1,
    num_replicas: int = 1,
    max_num_seqs: int = 4,
    max_num_rows: int = 16,
    max_model_len: int = 32,
) -> Batcher:
    """Over executors that share two head units; pages of one unit each where heads are shared."""
    page_units = {e: UNITS if e == LOCAL or mode != "heads" else 1 for e in capacity}
    budget = PageBudget(PAGE, capacity, page_units)
    return Batcher(
        budget,
        Placer(budget, UNITS, mode, spill=spill),
        num_micro_batches=depth,
        num_replicas=num_replicas,
        max_num_seqs=max_num_seqs,
        max_num_rows=max_num_rows,
        max_model_len=max_model_len,
    )


def make_request(name: str, num_prompt: int, **sampling: object) -> EngineRequest:
    return EngineRequest(
        request_id=name,
        prompt_token_ids=tuple(range(1, num_prompt + 1)),
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
        seed=0,
        eos_token_ids=(0,),
    )


class LaneExecutors:
    """Every executor's allocators, told of the plans in the order in which they were made.

    A lane is what an allocator calls a sequence.
    """

    def __init__(self, batcher: Batcher) -> None:
        self._budget = budget = batcher.budget
        self.allocators = {
            e: PageAllocator(pages, budget.page_tokens)
            for e, pages in budget.capacity_pages.items()
        }
        self._in_flight: dict[int, StepPlan] = {}

    def follow(self, plan: StepPlan) -> None:
        """Do what executors do when a plan arrives; steps in flight must not notice."""
        for executor, allocator in self.allocators.items():
            part = plan.for_executor(executor)
            busy = {
                span.sequence
                for other in self._in_flight.values()
                for span in other.spans
                if any(share.executor == executor for share in span.store_on)
            }
            touched = set(part.releases) | {span.sequence for span in part.spans}
            assert not touched & busy, "pages of a sequence in flight are touched"
            for lane in allocator.sequences:
                if lane // UNITS in part.releases:
                    allocator.release(lane)
            for span in part.spans:
                step = self._budget.page_units[executor]
                for unit in range(span.unit_start, span.unit_stop, step):
                    lane = span.sequence * UNITS + unit
                    assert allocator.length(lane) >= span.context_tokens, (
                        "rows must follow what the executor holds"
                    )
                    allocator.resize(lane, span.context_tokens)
                    allocator.resize(lane, span.context_tokens + span.num_stored)
        if plan.spans:
            self._in_flight[plan.micro_batch] = plan

    def done(self, plan: StepPlan) -> None:
        """The plan's step is through."""
        self._in_flight.pop(plan.micro_batch, None)

    def held(self, executor: int, sequence: int) -> int:
        """Pages that the executor has for a sequence."""
        allocator = self.allocators[executor]
        return sum(len(allocator.pages(sequence * UNITS + unit)) for unit in range(UNITS))

    def num_used(self) -> int:
        return sum(allocator.num_used for allocator in self.allocators.values())
