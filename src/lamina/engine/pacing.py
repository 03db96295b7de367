"""What steps took, for the policies that follow it: the workers' weights and the pipeline's depth.

Shapes: L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lamina.engine.events import AttentionMark, ModelMark, StepRecord, Times
from lamina.sched.depth import DepthPolicy, StepSample
from lamina.sched.weights import WorkerWeights, kv_unit_tokens
from lamina.types import LOCAL, StepPlan

_WEIGHTS_PERIOD = 8
"""Steps between two looks at the weights."""


class Pacing:
    """Feeds records of steps to the policies. One thread uses it.

    Attributes:
        round_trip_s: of each remote executor, the shortest seen so far: what lay between q and the
            output besides the executor's own work.
    """

    def __init__(
        self,
        weights: WorkerWeights,
        depth: DepthPolicy,
        executors: Mapping[str, int],
        unit_token_bytes: float,
    ) -> None:
        """
        Args:
            executors: all of them by the names that records have.
            unit_token_bytes: KV of one token for one head unit, in all layers.
        """
        self.round_trip_s: dict[int, float] = {}
        self._weights = weights
        self._depth = depth
        self._executors = executors
        self._unit_token_bytes = unit_token_bytes
        self._num_steps = 0

    @property
    def depth(self) -> int:
        """Micro-batches to have in flight."""
        return self._depth.depth

    def observe(
        self, record: StepRecord, plan: StepPlan, num_decoding: int
    ) -> dict[int, float] | None:
        """Take note of a step that is through.

        Args:
            plan: of the record.
            num_decoding: sequences that decode now, in all micro-batches.

        Returns:
            The remote executors' weights from now on; None: as they were.
        """
        decoding = [span for span in plan.spans if span.attend_on == span.store_on]
        num_prompt_rows = plan.num_rows - len(decoding)
        slices = _combined([worker.times for worker in record.model])
        times = {self._executors[worker.worker]: worker.times for worker in record.attention}
        self._note_round_trips(slices, {e: t for e, t in times.items() if e != LOCAL})
        self._depth.observe(
            StepSample(
                now_s=record.end_s,
                num_rows=len(decoding),
                num_prompt_rows=num_prompt_rows,
                num_tokens=sum(span.context_tokens for span in decoding),
                slice_s=_slice_s(slices),
                attention_s=self._attention_s(slices, times),
                num_decoding=num_decoding,
            )
        )
        # Of a prompt the workers only store tokens.
        if num_prompt_rows:
            return None
        for executor, unit_tokens in kv_unit_tokens(plan).items():
            if executor != LOCAL and executor in times:
                kv_bytes = unit_tokens * self._unit_token_bytes
                self._weights.observe(executor, kv_bytes, float(_busy(times[executor]).sum()))
        self._num_steps += 1
        return self._weights.weights if self._num_steps % _WEIGHTS_PERIOD == 0 else None

    def _note_round_trips(self, slices: Times, times: Mapping[int, Times]) -> None:
        """Where the model worker waited for the outputs, all between q and them was the way to and
        from the last executor, and its work."""
        if not times:
            return
        here, turned = slices[1:, ModelMark.BEGIN], slices[1:, ModelMark.WAIT]
        executors = list(times)
        ends = np.stack([times[e][:, AttentionMark.FINISH_END] for e in executors])
        last = ends.argmax(axis=0)
        for index, executor in enumerate(executors):
            begin = times[executor][:, AttentionMark.ATTEND_BEGIN]
            counts = (last == index) & (here > turned) & (begin > 0)
            if not counts.any():
                continue
            between = here - slices[:-1, ModelMark.Q_DONE] - (ends[index] - begin)
            shortest = max(0.0, float(between[counts].min()))
            if shortest < self.round_trip_s.get(executor, math.inf):
                self.round_trip_s[executor] = shortest
                self._weights.note_round_trip(executor, shortest)

    def _attention_s(self, slices: Times, times: Mapping[int, Times]) -> float:
        """Mean seconds from the end of a slice to the output if no other micro-batch were there."""
        after_q = slices[:-1, ModelMark.DONE] - slices[:-1, ModelMark.Q_DONE]
        latest = np.zeros_like(after_q)
        for executor, times_L4 in times.items():
            way = self.round_trip_s.get(executor, 0.0)
            finish = times_L4[:, AttentionMark.FINISH_END] - times_L4[:, AttentionMark.FINISH_BEGIN]
            # Attention over cached tokens goes on while the rest of the slice is computed, but for
            # the local executor, which has to wait for it.
            hidden = 0.0 if executor == LOCAL else after_q
            latest = np.maximum(
                latest, np.maximum(way + _busy(times_L4) - hidden, way / 2 + finish)
            )
        return float(latest.mean()) if len(latest) else 0.0


def _combined(workers: list[Times]) -> Times:
    """All slices, wherever they ran; of ranks that ran the same one the last readings."""
    combined: Times = np.maximum.reduce(workers)
    return combined


def _slice_s(slices: Times) -> float:
    computing = (
        slices[:, ModelMark.Q_DONE]
        - slices[:, ModelMark.BEGIN]
        + slices[:, ModelMark.KV_DONE]
        - slices[:, ModelMark.Q_SENT]
        + slices[:, ModelMark.DONE]
        - slices[:, ModelMark.KV_SENT]
    )
    return float(computing.mean())


def _busy(times_L4: Times) -> Times:
    """Seconds that the executor computed, per layer."""
    busy: Times = (
        times_L4[:, AttentionMark.ATTEND_END]
        - times_L4[:, AttentionMark.ATTEND_BEGIN]
        + times_L4[:, AttentionMark.FINISH_END]
        - times_L4[:, AttentionMark.FINISH_BEGIN]
    )
    return busy
