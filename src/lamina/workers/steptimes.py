"""When a model worker did what in a step: one array per step, written slice by slice."""

from __future__ import annotations

from array import array
from typing import NamedTuple


class SliceTimes(NamedTuple):
    """Clock readings of one slice, `time.monotonic()`; they follow one another without gaps.

    In the last slice all after `q_end` are that; `q_end` is when the logits were there. Zeros: the
    slice ran elsewhere.
    """

    begin: float
    """The slice's turn came; from here on the worker waits for its inputs."""
    inputs_here: float
    q_end: float
    """q is computed."""
    q_sent: float
    """q is in the mailboxes (the same as `q_end` without early q)."""
    kv_end: float
    kv_sent: float
    """All that was not sent before is in the mailboxes."""
    end: float
    """The deferred region is through."""


NUM_TIMES = len(SliceTimes._fields)


def new_step_times(num_slices: int) -> array[float]:
    """Room for the `SliceTimes` of all slices, one after the other; zeros."""
    return array("d", bytes(8 * NUM_TIMES * num_slices))


def slice_times(times: array[float], index: int) -> SliceTimes:
    """What was written for slice `index`."""
    return SliceTimes(*times[index * NUM_TIMES : (index + 1) * NUM_TIMES])


class StepTimes:
    """Seconds that model workers spent, summed over steps and workers."""

    __slots__ = ("attention_s", "post_s", "slices_s", "steps_s")

    def __init__(self) -> None:
        self.slices_s = 0.0
        """In the model's slices."""
        self.post_s = 0.0
        """Handing q, k and v to mailboxes."""
        self.attention_s = 0.0
        """Waiting for outputs (with a local executor: computing them)."""
        self.steps_s = 0.0
        """Beginning steps and running them, all in all."""

    @property
    def other_s(self) -> float:
        """What the phases leave over: routes, plans, and the loop over slices."""
        return self.steps_s - self.slices_s - self.post_s - self.attention_s

    def add(self, times: array[float]) -> float:
        """Count a step's slices; returns how long they took, waits included."""
        begin, here, q_end, q_sent, kv_end, kv_sent, end = (
            sum(times[i::NUM_TIMES]) for i in range(NUM_TIMES)
        )
        self.attention_s += here - begin
        self.slices_s += q_end - here + kv_end - q_sent + end - kv_sent
        self.post_s += q_sent - q_end + kv_sent - kv_end
        return end - begin
