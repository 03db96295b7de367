"""Records of steps: complete, in order, and on one clock."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch

from lamina.engine.events import StepRecord
from lamina.engine.timeline import Timeline, clock_offset
from lamina.types import Share, Span, StepPlan
from lamina.workers.pipeline import Finished
from lamina.workers.plans import Report
from support.timelines import Durations, pipeline

RECORDS = pipeline(Durations(), num_micro_batches=2, num_steps=3)
NAMES = {1: "attention-worker-1", 2: "attention-worker-2"}
SHARE = (Share(1, 0, 1),)


def finished(record: StepRecord, reports: tuple[Report, ...]) -> Finished:
    plan = StepPlan(record.step, record.micro_batch, (Span(7, record.num_rows, 5, SHARE, SHARE),))
    times = {worker: array("d", times.tobytes()) for worker, times in record.model}
    return Finished(plan, torch.empty(0), times, reports)


def report(record: StepRecord, offset_s: float = 0.0, executor: int = 1) -> Report:
    return Report(executor, record.step, torch.tensor(record.attention[0].times + offset_s))


def timeline() -> tuple[Timeline, list[StepRecord]]:
    seen: list[StepRecord] = []
    made = Timeline(NAMES)
    made.observers.append(seen.append)
    return made, seen


def add(to: Timeline, record: StepRecord, *reports: Report) -> None:
    to.add(
        finished(record, reports),
        begin_s=record.begin_s,
        planned_s=record.planned_s,
        logits_s=record.logits_s,
        end_s=record.end_s,
    )


def assert_equal(seen: StepRecord, expected: StepRecord) -> None:
    assert seen[:7] == expected[:7]
    for mine, theirs in zip(
        (*seen.model, *seen.attention), (*expected.model, *expected.attention), strict=True
    ):
        assert mine.worker == theirs.worker
        np.testing.assert_allclose(mine.times, theirs.times, atol=1e-9)


def test_a_step_is_passed_on_when_the_next_of_its_micro_batch_is_through() -> None:
    made, seen = timeline()
    for count, record in enumerate(RECORDS):
        add(made, record, report(record))
        assert len(seen) == max(0, count - 1)
    made.flush()
    assert len(seen) == len(RECORDS)
    for mine, expected in zip(seen, RECORDS, strict=True):
        assert_equal(mine, expected)


def test_reports_may_come_with_later_steps() -> None:
    made, seen = timeline()
    first, second, third, *_ = RECORDS
    add(made, first)
    add(made, second, report(first))
    add(made, third, report(second))
    made.flush()
    assert [len(record.attention) for record in seen] == [1, 1, 0]
    assert_equal(seen[0], first)


def test_a_report_that_is_too_late_is_left_out() -> None:
    made, seen = timeline()
    first, second, third, fourth, *_ = RECORDS
    for record in (first, second, third):
        add(made, record)
    add(made, fourth, report(first))
    assert [record.attention for record in seen] == [(), ()]


def test_several_executors_are_in_order() -> None:
    made, seen = timeline()
    add(made, RECORDS[0], report(RECORDS[0], executor=2), report(RECORDS[0]))
    made.flush()
    assert [worker for worker, _ in seen[0].attention] == list(NAMES.values())


def test_plans_without_rows_leave_no_record() -> None:
    made, seen = timeline()
    plan = StepPlan(1, 0, (), ((1, 3),))
    made.add(Finished(plan, torch.empty(0), {}, ()),
             begin_s=1.0, planned_s=1.0, logits_s=1.0, end_s=1.0)  # fmt: skip
    made.flush()
    assert seen == []


@pytest.mark.parametrize("offset_s", [-900.0, -0.5, 0.25, 1e6])
def test_another_machines_clock_is_corrected(offset_s: float) -> None:
    made, seen = timeline()
    for record in RECORDS:
        add(made, record, report(record, offset_s))
    made.flush()
    for mine, expected in zip(seen, RECORDS, strict=True):
        # Known to half of what a message waits at least, its way and the queues.
        difference = mine.attention[0].times - expected.attention[0].times
        assert np.abs(difference).max() <= (Durations().hop + Durations().attend) / 2


def test_the_same_clock_is_left_alone() -> None:
    assert clock_offset(RECORDS[0], RECORDS[0].attention[0].times) == 0.0


def test_layers_that_only_stored_bound_the_offset_from_one_side() -> None:
    times = RECORDS[0].attention[0].times.copy()
    times[:, :2] = 0.0
    assert clock_offset(RECORDS[0], times) == 0.0
    shifted = np.where(times > 0.0, times - 3.0, 0.0)
    assert clock_offset(RECORDS[0], shifted) == pytest.approx(3.0, abs=2e-2)
