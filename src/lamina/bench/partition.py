"""Attention workers of unequal speed: equal shares beside weights that follow what is observed.

Sequences come and go: before every turn some of them end, and new ones take their place. Computing
the new prompts is not counted, it is the same for both.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from lamina.bench.decode import random_prompts
from lamina.bench.subjects import SubjectProcess, WorkerShares


class PartitionFigure(msgspec.Struct, frozen=True, kw_only=True):
    """One subject."""

    subject: str
    tokens_per_s: float
    """Median over the turns, as are the next."""
    tokens_per_s_low: float
    tokens_per_s_high: float
    ratio: float
    """Speed over that of the last subject, turn by turn."""
    ratio_low: float
    ratio_high: float
    weights: list[WorkerShares]
    """After each turn."""


def measure(
    subjects: Sequence[SubjectProcess],
    *,
    batch: int,
    context: int,
    num_replaced: int,
    turns: int,
    warm_up_turns: int,
    steps_per_turn: int,
    vocab_size: int,
) -> list[PartitionFigure]:
    """Let the subjects decode in turns. The last one is the baseline.

    Args:
        num_replaced: sequences that end before each turn.
        warm_up_turns: turns at the start that are not counted; weights settle in them.
    """
    for subject in subjects:
        subject.prefill(random_prompts(batch, context, vocab_size))
    seconds: list[list[float]] = [[] for _ in subjects]
    weights: list[list[WorkerShares]] = [[subject.weights()] for subject in subjects]
    for turn in range(warm_up_turns + turns):
        prompts = random_prompts(num_replaced, context + turn, vocab_size)
        for index, subject in enumerate(subjects):
            subject.replace(num_replaced, prompts)
            took_s = sum(subject.decode(steps_per_turn))
            weights[index].append(subject.weights())
            if turn >= warm_up_turns:
                seconds[index].append(took_s)
    figures = []
    for subject, values, shares in zip(subjects, seconds, weights, strict=True):
        speeds = [batch * steps_per_turn / value for value in values]
        ratios = [base / value for base, value in zip(seconds[-1], values, strict=True)]
        figures.append(
            PartitionFigure(
                subject=subject.name,
                tokens_per_s=statistics.median(speeds),
                tokens_per_s_low=min(speeds),
                tokens_per_s_high=max(speeds),
                ratio=statistics.median(ratios),
                ratio_low=min(ratios),
                ratio_high=max(ratios),
                weights=shares,
            )
        )
    return figures


def settled_after(weights: Sequence[WorkerShares], tolerance: float = 0.1) -> int:
    """Steps after which every worker's share stayed within `tolerance` (relative) of its last."""
    last = weights[-1].shares
    for index in range(len(weights) - 1, -1, -1):
        shares = zip(weights[index].shares, last, strict=True)
        if any(abs(share - final) > tolerance * final for share, final in shares):
            return weights[index + 1].num_steps
    return weights[0].num_steps


@contextmanager
def busy_core(core: int | None) -> Iterator[None]:
    """Keep a process busy on a core, so that whoever runs there has half of it; None: nothing."""
    if core is None:
        yield
        return
    process = multiprocessing.get_context("spawn").Process(target=_spin, args=(core,), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _spin(core: int) -> None:
    os.sched_setaffinity(0, {core})
    parent = os.getppid()
    while os.getppid() == parent:
        for _ in range(100_000):
            pass
