"""Decode speed of one shape over batch and context, deployments side by side.

All subjects live at the same time and take turns of a few steps each, so that a slow minute of the
machine hits all of them; ratios are taken turn by turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from lamina.bench.percentiles import percentile
from lamina.bench.subjects import PREFILL_ROWS, SubjectProcess
from lamina.config import AttentionWorkerConfig, EngineConfig


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One subject at one batch and context."""

    subject: str
    batch: int
    context: int
    tokens_per_s: float
    """Median over the turns."""
    tokens_per_s_low: float
    tokens_per_s_high: float
    tbt_ms: float
    """Time between tokens, median over all steps."""
    tbt_p99_ms: float
    phases_ms: dict[str, float]
    """Where the time of a step went, for deployments of ours (mean)."""
    ratio: float
    """Median of the ratio of its speed to the last subject's, turn by turn."""
    ratio_low: float
    ratio_high: float
    prefill_tokens_per_s: float


def measure(
    subjects: Sequence[SubjectProcess],
    *,
    batch: int,
    context: int,
    turns: int,
    steps_per_turn: int,
    vocab_size: int,
) -> list[Figure]:
    """Prefill every subject, then let them decode in turns. The last subject is the baseline."""
    generator = torch.Generator().manual_seed(batch * 1_000_003 + context)
    prompts = torch.randint(vocab_size, (batch, context), generator=generator).tolist()
    prefill_s = [subject.prefill(prompts) for subject in subjects]
    for subject in subjects:
        subject.decode(1)
    before = [subject.phases() for subject in subjects]
    steps: list[list[list[float]]] = [[] for _ in subjects]
    for _ in range(turns):
        for subject, rounds in zip(subjects, steps, strict=True):
            rounds.append(subject.decode(steps_per_turn))
    seconds = [[sum(turn) for turn in rounds] for rounds in steps]
    tokens = batch * steps_per_turn
    figures = []
    for index, (subject, values, prompt_s) in enumerate(
        zip(subjects, seconds, prefill_s, strict=True)
    ):
        intervals_ms = [1e3 * step for turn in steps[index] for step in turn]
        phases_ms = {
            phase: 1e3 * (total - before[index][phase]) / (turns * steps_per_turn)
            for phase, total in subject.phases().items()
        }
        speeds = [tokens / value for value in values]
        ratios = [base / value for base, value in zip(seconds[-1], values, strict=True)]
        figures.append(
            Figure(
                subject=subject.name,
                batch=batch,
                context=context,
                tokens_per_s=statistics.median(speeds),
                tokens_per_s_low=min(speeds),
                tokens_per_s_high=max(speeds),
                tbt_ms=statistics.median(intervals_ms),
                tbt_p99_ms=percentile(intervals_ms, 0.99),
                phases_ms=phases_ms,
                ratio=statistics.median(ratios),
                ratio_low=min(ratios),
                ratio_high=max(ratios),
                prefill_tokens_per_s=batch * context / prompt_s,
            )
        )
    return figures


def lamina_config(
    folder: Path,
    *,
    num_workers: int,
    batch: int,
    length: int,
    num_threads: int,
    **settings: Any,
) -> EngineConfig:
    """The engine of one deployment; 0 workers is the monolithic one. `settings`: further fields."""
    return EngineConfig(
        model=str(folder),
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=length,
        max_num_seqs=batch,
        max_num_batched_tokens=max(PREFILL_ROWS, batch),
        attention="remote" if num_workers else "local",
        attention_workers=tuple(AttentionWorkerConfig() for _ in range(num_workers or 1)),
        num_threads=num_threads,
        worker_num_threads=num_threads,
        **settings,
    )
