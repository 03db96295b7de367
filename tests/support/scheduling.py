"""Executors that only keep books, and check the plans that they follow."""

from __future__ import annotations

from collections.abc import Mapping

from lamina.sched.batcher import Batcher
from lamina.sched.budget import PageBudget
from lamina.sched.placement import Mode, Placer
from lamina.types import LOCAL, EngineRequest, SamplingParams, StepPlan, ceil_div

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
    """What every executor would hold, told of the plans in the order in which they were made."""

    def __init__(self, batcher: Batcher) -> None:
        self._budget = batcher.budget
        # Tokens of each lane, (sequence, first unit), of each executor.
        self._lengths: dict[int, dict[tuple[int, int], int]] = {
            e: {} for e in batcher.budget.capacity_pages
        }
        self._in_flight: dict[int, StepPlan] = {}

    def follow(self, plan: StepPlan) -> None:
        """Do what executors do when a plan arrives; steps in flight must not notice."""
        for executor, lengths in self._lengths.items():
            part = plan.for_executor(executor)
            busy = {
                span.sequence
                for other in self._in_flight.values()
                for span in other.spans
                if any(share.executor == executor for share in span.store_on)
            }
            touched = set(part.releases) | {span.sequence for span in part.spans}
            assert not touched & busy, "pages of a sequence in flight are touched"
            for lane in [lane for lane in lengths if lane[0] in part.releases]:
                del lengths[lane]
            for span in part.spans:
                for unit in range(
                    span.unit_start, span.unit_stop, self._budget.page_units[executor]
                ):
                    lane = span.sequence, unit
                    assert lengths.get(lane, 0) >= span.context_tokens, (
                        "rows must follow what the executor holds"
                    )
                    lengths[lane] = span.context_tokens + span.num_stored
            assert self.num_used(executor) <= self._budget.capacity_pages[executor], (
                f"executor {executor} has no page left"
            )
        if plan.spans:
            self._in_flight[plan.micro_batch] = plan

    def done(self, plan: StepPlan) -> None:
        """The plan's step is through."""
        self._in_flight.pop(plan.micro_batch, None)

    def num_used(self, executor: int) -> int:
        """Pages that the executor has handed out."""
        return sum(self.held(executor, s) for s in {s for s, _ in self._lengths[executor]})

    def held(self, executor: int, sequence: int) -> int:
        """Pages that the executor has for a sequence."""
        return sum(
            ceil_div(length, PAGE)
            for (s, _), length in self._lengths[executor].items()
            if s == sequence
        )

    def sequences(self, executor: int) -> set[int]:
        return {s for s, _ in self._lengths[executor]}

    @property
    def is_empty(self) -> bool:
        return not any(self._lengths.values())
