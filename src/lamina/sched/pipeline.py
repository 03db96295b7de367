"""When the slices of a pipeline run, given how long slices and attention take. Pure.

The replicas take turns as they do in the engine (`rotation.Turns`); the clock is simulated.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

from lamina.sched.rotation import Turns, replica_of, ticks_per_round


class SliceRun(NamedTuple):
    """A slice that ran from `start_s` to `end_s`."""

    start_s: float
    end_s: float
    replica: int
    micro_batch: int
    step: int
    slice_index: int


def pipeline_times(
    num_micro_batches: int,
    num_replicas: int,
    slice_s: float,
    attention_s: float,
    num_slices: int,
    num_steps: int,
    *,
    shared_attention: bool = True,
) -> list[SliceRun]:
    """Run `num_steps` steps of every micro-batch; all of them start at 0, none drains between
    steps.

    Args:
        slice_s: seconds of one slice on one replica, above 0.
        attention_s: seconds from the end of a slice to the attention output, without queueing.
        shared_attention: one attention worker (or several that share each op) serves the ops one by
            one, in the order in which they come; otherwise they do not wait for each other.

    Returns:
        The slices in the order of their starts.
    """
    assert slice_s > 0, "a slice takes time"
    turns = [Turns(num_micro_batches, p, num_replicas) for p in range(num_replicas)]
    steps = [0] * num_micro_batches
    ready = [0] * num_micro_batches  # the slice that may run; -1 while one runs or attention does
    busy = [False] * num_replicas
    attention_free_s = 0.0
    runs: list[SliceRun] = []
    # (time, kind, micro-batch): what is known to happen; 0: its slice ends, 1: its output is there.
    events: list[tuple[float, int, int]] = []
    slices = [0] * num_micro_batches
    now = 0.0

    def begin(micro_batch: int) -> None:
        for turn in turns:
            turn.begin(micro_batch, num_slices)

    def dispatch(replica: int) -> None:
        turn = turns[replica]
        j = turn.next(lambda j: ready[j] == turn.slice_of(j))
        if j is None or ready[j] != turn.slice_of(j):
            return
        turn.ran(j)
        busy[replica] = True
        slices[j] = ready[j]
        ready[j] = -1
        runs.append(SliceRun(now, now + slice_s, replica, j, steps[j], slices[j]))
        heapq.heappush(events, (now + slice_s, 0, j))

    for j in range(num_micro_batches):
        begin(j)
    while True:
        for replica in range(num_replicas):
            if not busy[replica]:
                dispatch(replica)
        if not events:
            return runs
        now = events[0][0]
        while events and events[0][0] == now:
            _, kind, j = heapq.heappop(events)
            if kind == 1:
                ready[j] = slices[j] + 1
                continue
            busy[replica_of(j, slices[j], num_replicas)] = False
            if slices[j] + 1 < num_slices:
                start = max(now, attention_free_s) if shared_attention else now
                attention_free_s = start + attention_s
                heapq.heappush(events, (start + attention_s, 1, j))
            elif steps[j] + 1 < num_steps:
                steps[j] += 1
                ready[j] = 0
                begin(j)


def round_s(
    num_micro_batches: int,
    num_replicas: int,
    slice_s: float,
    attention_s: float,
    *,
    shared_attention: bool = True,
) -> float:
    """Seconds from one slice of a micro-batch to its next once the pipeline runs steadily.

    The replicas are the bound, or the attention workers, or one micro-batch's own way there and
    back.
    """
    bounds = [
        ticks_per_round(num_micro_batches, num_replicas) * slice_s / num_replicas,
        slice_s + attention_s,
    ]
    if shared_attention:
        bounds.append(num_micro_batches * attention_s)
    return max(bounds)
