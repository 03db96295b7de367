"""Decode speed of one shape over batch and context, deployments side by side.

All subjects live at the same time and take turns of a few steps each, so that a slow minute of the
machine hits all of them; ratios are taken turn by turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from lamina.bench.breakdown import Breakdown, summarize
from lamina.bench.percentiles import percentile
from lamina.bench.subjects import PREFILL_ROWS, UNCOUNTED_STEPS, SubjectProcess
from lamina.config import AttentionWorkerConfig, EngineConfig
from lamina.types import ceil_div


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


class Measured(NamedTuple):
    """What one case gave."""

    figures: list[Figure]
    breakdowns: list[Breakdown]
    """Of the subjects that have a timeline."""


def measure(
    subjects: Sequence[SubjectProcess],
    *,
    batch: int,
    context: int,
    turns: int,
    steps_per_turn: int,
    vocab_size: int,
) -> Measured:
    """Prefill every subject, then let them decode in turns. The last subject is the baseline."""
    prompts = random_prompts(batch, context, vocab_size)
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
    num_steps = turns * (steps_per_turn + UNCOUNTED_STEPS)
    figures = []
    for index, (subject, values, prompt_s) in enumerate(
        zip(subjects, seconds, prefill_s, strict=True)
    ):
        intervals_ms = [1e3 * step for turn in steps[index] for step in turn]
        phases_ms = {
            phase: 1e3 * (total - before[index][phase]) / num_steps
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
    summaries = [
        summarize(subject.name, batch, context, subject.stretches()) for subject in subjects
    ]
    return Measured(figures, [summary for summary in summaries if summary])


def random_prompts(batch: int, context: int, vocab_size: int) -> list[list[int]]:
    """`batch` prompts of `context` tokens; the same ones for the same numbers."""
    generator = torch.Generator().manual_seed(batch * 1_000_003 + context)
    prompts: list[list[int]] = torch.randint(
        vocab_size, (batch, context), generator=generator
    ).tolist()
    return prompts


def num_tokens_needed(batch: int, context: int, turns: int, steps_per_turn: int) -> int:
    """Most tokens that a sequence generates in one case.

    While the last prompts are computed, the first sequences already decode, those in a micro-batch
    without prompts several times as fast; and every turn begins with a step that is not counted.
    """
    prefill_steps = 6 * ceil_div(batch * context, PREFILL_ROWS)
    return prefill_steps + (turns + 1) * (steps_per_turn + UNCOUNTED_STEPS + 1) + 2


def lamina_config(
    folder: Path,
    *,
    num_workers: int,
    batch: int,
    length: int,
    num_threads: int,
    model_cores: tuple[int, ...] = (),
    worker_cores: tuple[int, ...] = (),
    **settings: Any,
) -> EngineConfig:
    """The engine of one deployment; 0 workers is the monolithic one.

    Args:
        num_threads: of the model worker and of each attention worker, where no cores are given.
        model_cores, worker_cores: as in `EngineConfig`; a thread for each core.
        settings: further fields.
    """
    return EngineConfig(
        model=str(folder),
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=length,
        max_num_seqs=batch,
        max_num_batched_tokens=max(PREFILL_ROWS, batch),
        attention="remote" if num_workers else "local",
        attention_workers=tuple(AttentionWorkerConfig() for _ in range(num_workers or 1)),
        num_threads=len(model_cores) or num_threads,
        worker_num_threads=(
            max(1, len(worker_cores) // num_workers)
            if worker_cores and num_workers
            else num_threads
        ),
        model_cores=model_cores,
        worker_cores=worker_cores if num_workers else (),
        **settings,
    )
