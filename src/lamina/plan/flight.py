"""A step that runs, and what is in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from lamina.plan.step import StepLoad, StepTimes
from lamina.sched.sequence import Sequence
from lamina.types import LOCAL, StepPlan

_NEVER = 2**62


@dataclass(slots=True)
class Flight:
    """A step in flight, and those after it that were let pass (`plan.steady`)."""

    plan: StepPlan
    load: StepLoad
    times: StepTimes
    tokens: dict[int, int]
    """What will have been sampled for each sequence; any token does."""
    first: list[Sequence]
    """Sequences whose prompts this step completes."""
    most_passed: int
    """Steps that may pass before a sequence ends."""
    left: float = 1.0
    """Part of the step that is still to run."""
    duration_s: float = math.inf
    """Of the whole step, as things are now."""
    num_passed: int = 0
    """Steps that ended since the batcher made the plan."""
    last_s: float = math.nan
    """When the last one did."""
    due: dict[int, list[Sequence]] = field(default_factory=dict)
    """Sequences that need a page for the step after so many have passed; see `has_due`."""
    checked: int = -1
    """When (by `Instance`'s count) it was found that nothing moves between micro-batches."""
    has_due: bool = False
    """Whether `due` was filled."""


@dataclass(slots=True)
class Contents:
    """What a plan holds, in terms of the cost model and of the requests."""

    load: StepLoad
    tokens: dict[int, int]
    first: list[Sequence]
    started: list[int]
    """Requests (their index) whose first rows these are."""
    most_passed: int


def contents(
    plan: StepPlan,
    sequence_of: Callable[[int], Sequence],
    units: int,
    *,
    own_executor: int,
    prompts_are_free: bool,
) -> Contents:
    """
    Args:
        sequence_of: the sequence of an id.
        units: head units of the model.
        own_executor: the one whose KV lies on the model worker's own devices.
        prompts_are_free: a prompt's last row alone is computed, as a decode row.
    """
    load = StepLoad()
    result = Contents(load, {}, [], [], _NEVER)
    tokens = result.tokens
    rows: dict[int, int] = {}  # whole rows by executor, and the tokens that they attend to
    attended: dict[int, int] = {}
    for span in plan.spans:
        sequence = sequence_of(span.sequence)
        total = span.context_tokens + span.num_rows
        shares = span.attend_on
        if sequence.num_computed < sequence.prefill_target:
            result.most_passed = 0
            if span.context_tokens == 0:
                result.started.append(sequence.request.seed)
            if total == sequence.num_tokens:
                tokens[span.sequence] = 0
                result.first.append(sequence)
            if not prompts_are_free:
                load.rows += span.num_rows
                load.prompts.append((span.num_rows, span.context_tokens))
                for share in span.store_on:
                    if share.executor not in (LOCAL, own_executor):
                        part = span.num_rows * share.num_units / units
                        load.stored[share.executor] = load.stored.get(share.executor, 0.0) + part
                continue
            shares = sequence.placement
        else:
            tokens[span.sequence] = 0
            limit = sequence.request.sampling.max_tokens
            if limit is not None:
                passed = limit - len(sequence.output_token_ids) - 1
                if passed < result.most_passed:
                    result.most_passed = passed
        load.rows += 1
        first = shares[0]
        if first.unit_stop - first.unit_start == units and first.token_start == 0:
            executor = first.executor
            rows[executor] = rows.get(executor, 0) + 1
            attended[executor] = attended.get(executor, 0) + total
            continue
        for share in shares:
            part = share.num_units / units
            load.attending[share.executor] = load.attending.get(share.executor, 0.0) + part
            load.attended[share.executor] = load.attended.get(
                share.executor, 0.0
            ) + part * share.num_tokens(total)
    for executor, count in rows.items():
        load.attending[executor] = load.attending.get(executor, 0.0) + count
        load.attended[executor] = load.attended.get(executor, 0.0) + attended[executor]
    if own_executor in load.attending and own_executor != LOCAL:
        load.attending[LOCAL] = load.attending.pop(own_executor)
        load.attended[LOCAL] = load.attended.pop(own_executor)
    load.logit_rows = len(tokens)
    return result


def fill_due(flight: Flight, sequence_of: Callable[[int], Sequence]) -> None:
    """Find out when each sequence of a step of decode rows needs its next page."""
    flight.has_due = True
    due = flight.due
    for span in flight.plan.spans:
        sequence = sequence_of(span.sequence)
        passed = sequence.reserved_tokens - sequence.num_tokens + 1
        due.setdefault(passed, []).append(sequence)
