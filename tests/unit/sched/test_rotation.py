"""The timetable books nothing twice, and pipelines that follow it have no bubbles."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.sched.pipeline import SliceRun, pipeline_times, round_s
from lamina.sched.rotation import Turns, first_tick, replica_of, timetable, timetable_ticks

SIZES = {"n": st.integers(1, 9), "r": st.integers(1, 6), "num_slices": st.integers(1, 20)}


@given(**SIZES)
def test_nothing_is_booked_twice_and_slices_come_in_order(n: int, r: int, num_slices: int) -> None:
    cycle = timetable_ticks(n, r, num_slices)
    occupied: set[tuple[int, int]] = set()
    due: dict[int, list[tuple[int, int]]] = {j: [] for j in range(n)}
    for booking in timetable(n, r, num_slices):
        assert booking.replica == replica_of(booking.micro_batch, booking.slice_index, r)
        due[booking.micro_batch].append((booking.tick, booking.slice_index))
        for tick in range(booking.tick, booking.tick + r):
            assert (booking.replica, tick % cycle) not in occupied
            occupied.add((booking.replica, tick % cycle))
    for slices in due.values():
        assert [k for _, k in slices] == list(range(num_slices))
        # A slice takes r ticks, the attention op has the n - r until the next one.
        assert all(b - a == max(n, r) for (a, _), (b, _) in pairwise(slices))
        assert slices[-1][0] + max(n, r) <= slices[0][0] + cycle
    if num_slices % r == 0 and n >= r:
        assert len(occupied) == r * cycle, "every replica is booked all the time"


@given(r=st.integers(1, 6), num_slices=st.integers(1, 20))
def test_one_more_micro_batch_than_replicas_is_the_papers_rotation(r: int, num_slices: int) -> None:
    n = r + 1
    for booking in timetable(n, r, num_slices):
        assert (booking.micro_batch, booking.slice_index) == (booking.tick % n, booking.tick // n)
        assert booking.tick % r == booking.replica, "a replica starts a slice every r ticks"


def check_runs(runs: list[SliceRun], n: int, r: int, num_slices: int, num_steps: int) -> None:
    """Every slice ran once, in order, on its replica, and no replica ran two at once."""
    for j in range(n):
        mine = [run for run in runs if run.micro_batch == j]
        assert [(run.step, run.slice_index) for run in mine] == [
            (step, k) for step in range(num_steps) for k in range(num_slices)
        ]
        assert all(a.end_s <= b.start_s for a, b in pairwise(mine))
        assert all(run.replica == (j + run.slice_index) % r for run in mine)
    for replica in range(r):
        booked = [run for run in runs if run.replica == replica]
        assert all(a.end_s <= b.start_s for a, b in pairwise(booked))


@settings(max_examples=200, deadline=None)
@given(**SIZES, slice_s=st.integers(1, 40), attention_s=st.integers(0, 80), shared=st.booleans())
def test_slices_run_once_in_order_on_their_replicas(
    n: int, r: int, num_slices: int, slice_s: int, attention_s: int, shared: bool
) -> None:
    runs = pipeline_times(n, r, slice_s, attention_s, num_slices, 2, shared_attention=shared)
    check_runs(runs, n, r, num_slices, 2)


def seconds_per_step(runs: list[SliceRun], first: int, last: int) -> float:
    """Mean seconds per step, over all micro-batches, from step `first` to step `last`."""
    starts = {(run.micro_batch, run.step): run.start_s for run in runs if run.slice_index == 0}
    micro_batches = {j for j, _ in starts}
    return sum(starts[j, last] - starts[j, first] for j in micro_batches) / (
        len(micro_batches) * (last - first)
    )


@settings(max_examples=200, deadline=None)
@given(
    r=st.integers(1, 5),
    extra=st.integers(0, 4),
    num_slices=st.integers(1, 20),
    percent=st.integers(0, 100),
    shared=st.booleans(),
)
def test_no_bubble_while_attention_is_short_enough(
    r: int, extra: int, num_slices: int, percent: int, shared: bool
) -> None:
    """A slice takes 100 r, so that a tick takes 100."""
    n = r + extra
    # A shared attention worker serves n ops per round, so each must fit into one tick.
    attention_s = percent * (min(extra, 1) if shared else extra)
    runs = pipeline_times(n, r, 100 * r, attention_s, num_slices, 9, shared_attention=shared)
    per_step = seconds_per_step(runs, 4, 8)
    if num_slices % r == 0:
        assert per_step == num_slices * n * 100, "the replicas never idle"
        for replica in range(r):
            steady = [run for run in runs if run.replica == replica and 3 < run.step < 8]
            assert all(a.end_s == b.start_s for a, b in pairwise(steady))
    else:
        # The step's last slice is not on the replica before the first one's.
        assert per_step <= (num_slices + r - 1) * n * 100 * 1.001


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 8),
    r=st.integers(1, 4),
    slices_per_replica=st.integers(2, 5),
    slice_s=st.integers(1, 40),
    attention_s=st.integers(0, 80),
    shared=st.booleans(),
)
def test_a_round_is_as_long_as_its_narrowest_part(
    n: int, r: int, slices_per_replica: int, slice_s: int, attention_s: int, shared: bool
) -> None:
    num_slices = 12 * slices_per_replica
    runs = pipeline_times(n, r, slice_s, attention_s, num_slices, 5, shared_attention=shared)
    expected = round_s(n, r, slice_s, attention_s, shared_attention=shared) * num_slices
    # No attention op stands between a step's last slice and the next step's first.
    assert expected * (1 - 1.01 / num_slices) - attention_s * n <= seconds_per_step(runs, 2, 4)
    assert seconds_per_step(runs, 2, 4) <= expected * 1.001


@settings(max_examples=200, deadline=None)
@given(data=st.data(), n=st.integers(1, 6), r=st.integers(1, 4), num_slices=st.integers(1, 9))
def test_micro_batches_join_and_leave_at_any_time(
    data: st.DataObject, n: int, r: int, num_slices: int
) -> None:
    turns = [Turns(n, p, r) for p in range(r)]
    at: dict[int, int] = {}  # the slice that each micro-batch is at
    for _ in range(60):
        joining = [j for j in range(n) if j not in at and data.draw(st.booleans())]
        for j in joining:
            at[j] = 0
            for turn in turns:
                turn.begin(j, num_slices)
        if not at:
            assert all(turn.next(lambda j: True) is None for turn in turns)
            continue
        late = data.draw(st.sets(st.sampled_from(sorted(at))))
        turn = turns[data.draw(st.integers(0, r - 1))]
        ready = [j for j in turn.active if turn.slice_of(j) == at[j] and j not in late]
        chosen = turn.next(lambda j, ready=ready: j in ready)
        if not ready:
            assert chosen == (turn.active[0] if turn.active else None)
            continue
        assert chosen == ready[0], "the first in the timetable"
        turn.ran(ready[0])
        at[ready[0]] += 1
        if at[ready[0]] == num_slices:
            del at[ready[0]]
    # What was begun can be finished.
    while at:
        for turn in turns:
            j = turn.next(lambda j, turn=turn: turn.slice_of(j) == at[j])
            if j is not None and turn.slice_of(j) == at[j]:
                turn.ran(j)
                at[j] += 1
                if at[j] == num_slices:
                    del at[j]


def test_turns_alternate_and_late_ones_go_first() -> None:
    turn = Turns(3)
    for j in (0, 1, 2):
        turn.begin(j, 4)
    order = []
    for _ in range(6):
        j = turn.next(lambda j: j != 1)
        assert j is not None
        turn.ran(j)
        order.append(j)
    assert order == [0, 2, 0, 2, 0, 2]
    assert turn.active == (1, 0, 2), "late"
    turn.ran(1)
    assert turn.active == (0, 1, 2)
    assert turn.slice_of(1) == 1


def test_first_ticks_of_many_micro_batches() -> None:
    assert [first_tick(j, 3, 2) for j in range(3)] == [0, 1, 2]
    assert [first_tick(j, 2, 2) for j in range(2)] == [0, 0], "one on each replica"
    assert [first_tick(j, 4, 2) for j in range(4)] == [0, 0, 2, 2]
