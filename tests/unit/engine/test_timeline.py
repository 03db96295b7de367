"""Records of steps from clock readings and reports, late and off by any offset."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch

from lamina.engine.events import StepRecord, step_events
from lamina.engine.timeline import ClockOffset, Timeline, _model_times
from lamina.types import Share, Span, StepPlan
from lamina.workers.pipeline import MODEL_WORKER, Finished
from lamina.workers.plans import Report
from lamina.workers.steptimes import NUM_TIMES, new_step_times

NUM_LAYERS = 2
NAMES = {1: "attention-worker-1", 2: "attention-worker-2"}
SHARES = (Share(1, 0, 1), Share(2, 1, 2))


def step_times(start: float) -> array[float]:
    """Slices of a second each, half a second apart; q is there after a tenth."""
    times = new_step_times(NUM_LAYERS + 1)
    for index in range(NUM_LAYERS + 1):
        at = start + 1.5 * index
        marks = (at, at + 0.5, at + 0.6, at + 0.61, at + 0.8, at + 0.81, at + 1.5)
        times[index * NUM_TIMES : (index + 1) * NUM_TIMES] = array("d", marks)
    return times


def report(executor: int, step: int, start: float, offset: float = 0.0) -> Report:
    """Attention right after q, and the rest right before the output is there."""
    rows = []
    for layer in range(NUM_LAYERS):
        at = start + 1.5 * layer - offset
        rows.append((at + 0.65, at + 0.75, at + 1.9, at + 1.95))
    return Report(executor, step, np.array(rows))


def finished(step: int, start: float, *reports: Report, executors: int = 2) -> Finished:
    plan = StepPlan(step, step % 2, (Span(1, 3, 0, SHARES, SHARES),))
    return Finished(
        plan, torch.empty(0), frozenset(range(1, executors + 1)),
        {MODEL_WORKER: step_times(start)}, tuple(reports),
    )  # fmt: skip


def add(timeline: Timeline, step: Finished, start: float) -> list[StepRecord]:
    return timeline.add(
        step, begin_s=start - 0.2, planned_s=start - 0.1, logits_s=start + 4.5, end_s=start + 5
    )


def test_a_record_has_what_every_worker_did() -> None:
    timeline = Timeline(NAMES.__getitem__)
    (record,) = add(timeline, finished(7, 100.0, report(1, 7, 100.0), report(2, 7, 100.0)), 100.0)
    assert timeline.records == (record,)
    assert (record.step, record.micro_batch, record.num_rows) == (7, 1, 3)
    assert (record.begin_s, record.planned_s, record.logits_s, record.end_s) == (
        99.8, 99.9, 104.5, 105,
    )  # fmt: skip
    assert [w.worker for w in record.model] == [MODEL_WORKER]
    assert record.model[0].times.shape == (NUM_LAYERS + 1, NUM_TIMES)
    assert [w.worker for w in record.attention] == list(NAMES.values())
    events = list(step_events(record))
    for event in events:
        assert 99.8 <= event.begin_s <= event.end_s <= 105
    assert {event.worker for event in events} == {"engine", MODEL_WORKER, *NAMES.values()}


def test_late_reports_are_waited_for_in_order() -> None:
    timeline = Timeline(NAMES.__getitem__)
    add(timeline, finished(1, 100.0, report(1, 1, 100.0)), 100.0)
    add(timeline, finished(2, 105.0, report(1, 2, 105.0), report(2, 2, 105.0)), 105.0)
    assert timeline.records == ()
    add(timeline, finished(3, 110.0, report(2, 1, 100.0)), 110.0)
    assert [record.step for record in timeline.records] == [1, 2]
    assert len(timeline.records[0].attention) == 2
    timeline.flush()
    assert [record.step for record in timeline.records] == [1, 2, 3]
    assert timeline.records[2].attention == ()


def test_a_report_that_never_comes_is_done_without() -> None:
    timeline = Timeline(NAMES.__getitem__, num_steps=8)
    for step in range(1, 31):
        add(timeline, finished(step, 100.0 + 5 * step, report(1, step, 100.0 + 5 * step)), 0.0)
    assert timeline.records[-1].step == 14
    assert len(timeline.records) == 8
    assert [w.worker for w in timeline.records[-1].attention] == [NAMES[1]]


def test_steps_without_rows_leave_nothing() -> None:
    timeline = Timeline(NAMES.__getitem__)
    add(
        timeline,
        Finished(StepPlan(1, 0, (), ((1, 5),)), torch.empty(0), frozenset(), {}, ()),
        1.0,
    )
    timeline.flush()
    assert timeline.records == ()


@pytest.mark.parametrize("offset", [0.0, 3600.0, -12345.678])
def test_clocks_of_other_machines_are_moved_onto_the_engines(offset: float) -> None:
    timeline = Timeline(NAMES.__getitem__)
    own, other = report(1, 1, 1e5), report(2, 1, 1e5, offset)
    add(timeline, finished(1, 1e5, own, other), 1e5)
    assert timeline.clock_offset(1) == 0.0
    # Bounds: q was computed 0.05 s before it was taken up, the output taken 0.1 s after k and v.
    assert timeline.clock_offset(2) == pytest.approx(offset, abs=0.1)
    times = timeline.records[0].attention[1].times
    np.testing.assert_allclose(times, own.times, atol=0.1)


def test_the_tightest_bounds_of_all_steps_count() -> None:
    clock = ClockOffset()
    model = _model_times({MODEL_WORKER: step_times(10.0)})
    for early in (0.04, 0.0, 0.02):
        times = report(1, 1, 10.0, 500.0).times
        times[:, 0] -= early
        clock.observe(model, times)
    assert clock.seconds == pytest.approx((500.0 - 0.01 + 500.0 + 0.1) / 2, abs=1e-6)


def test_layers_that_an_executor_did_not_attend_say_nothing() -> None:
    clock = ClockOffset()
    times = report(1, 1, 10.0, 500.0).times
    times[:, :2] = 0.0
    clock.observe(_model_times({MODEL_WORKER: step_times(10.0)}), times)
    assert clock.seconds == 0.0
