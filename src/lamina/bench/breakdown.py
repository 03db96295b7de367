"""Where the time of decoding went, and how far it is from what the workers' own times allow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from lamina.bench.subjects import Stretch
from lamina.engine.breakdown import PARTS, occupancy, step_parts
from lamina.engine.events import ModelMark, Times


class Breakdown(msgspec.Struct, frozen=True, kw_only=True):
    """One deployment at one batch and context; means over all measured steps."""

    subject: str
    batch: int
    context: int
    num_steps: int
    """Steps of single micro-batches."""
    rows_per_step: float
    tokens_per_s: float
    step_ms: float
    """Latency of a step, from its plan to its tokens."""
    parts_ms: dict[str, float]
    """Its parts (`engine.breakdown.PARTS`), which add up to it."""
    busy: dict[str, float]
    """Per worker the share of the time in which it worked, 0 to 1; the rest is its bubble."""
    model_ms: float
    """t_m: how long a step keeps the busiest model worker busy."""
    attention_ms: float
    """t_a: how long a step keeps the busiest attention worker busy."""

    @property
    def bound_tokens_per_s(self) -> float:
        """With no bubble at all: rows / max(t_m, t_a)."""
        return 1e3 * self.rows_per_step / max(self.model_ms, self.attention_ms)

    @property
    def share_of_bound(self) -> float:
        return self.tokens_per_s / self.bound_tokens_per_s


def summarize(
    subject: str, batch: int, context: int, stretches: Sequence[Stretch]
) -> Breakdown | None:
    """The breakdown of what was measured; None if there is no timeline, or no whole step in it."""
    parts = [
        step
        for stretch in stretches
        for step in step_parts(stretch.records)
        if stretch.begin_s <= step.record.begin_s and step.record.end_s <= stretch.end_s
    ]
    if not parts:
        return None
    seconds = sum(s.end_s - s.begin_s for s in stretches)
    worked: dict[str, float] = {}
    for stretch in stretches:
        span = np.array(stretch.begin_s), np.array(stretch.end_s)
        for worker, busy in occupancy(stretch.records).items():
            worked[worker] = worked.get(worker, 0.0) + float(busy.between(*span))
    records = [step.record for step in parts]
    return Breakdown(
        subject=subject,
        batch=batch,
        context=context,
        num_steps=len(parts),
        rows_per_step=sum(record.num_rows for record in records) / len(records),
        tokens_per_s=sum(s.num_tokens for s in stretches) / seconds,
        step_ms=1e3 * sum(step.total_s for step in parts) / len(parts),
        parts_ms={
            part: 1e3 * sum(step.seconds[part] for step in parts) / len(parts) for part in PARTS
        },
        busy={worker: work / seconds for worker, work in worked.items()},
        model_ms=_busiest_ms(
            (worker, times[:, ModelMark.DONE] - times[:, ModelMark.BEGIN])
            for record in records
            for worker, times in record.model
        )
        / len(records),
        attention_ms=_busiest_ms(
            (worker, times[:, 1::2] - times[:, ::2])
            for record in records
            for worker, times in record.attention
        )
        / len(records),
    )


def _busiest_ms(work: Iterable[tuple[str, Times]]) -> float:
    """Milliseconds of the worker that has most."""
    seconds: dict[str, float] = defaultdict(float)
    for worker, pieces in work:
        seconds[worker] += float(pieces.sum())
    return 1e3 * max(seconds.values(), default=0.0)
