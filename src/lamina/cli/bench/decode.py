"""`lamina bench decode`."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lamina.bench.shapes import SHAPES, write_shape
from lamina.cli.bench.output import (
    JsonOption,
    PlotOption,
    numbers,
    write_json,
    write_plot,
)
from lamina.errors import ConfigError
from lamina.types import ceil_div

if TYPE_CHECKING:  # torch takes seconds to import, which no other command should wait for
    from matplotlib.axes import Axes

    from lamina.bench.decode import Figure
    from lamina.bench.subjects import SubjectProcess


def decode(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "qwen3-0.5b",
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,16",
    context: Annotated[str, typer.Option(help="Context lengths, comma-separated.")] = "256,1024",
    attention_workers: Annotated[
        str, typer.Option(help="Deployments: numbers of workers, 0 is monolithic.")
    ] = "0,1",
    transformers: Annotated[
        bool, typer.Option(help="Measure transformers in the same run, as the baseline.")
    ] = True,
    turns: Annotated[int, typer.Option(help="Turns that each subject takes.", min=1)] = 7,
    steps: Annotated[int, typer.Option(help="Decode steps in a turn.", min=1)] = 8,
    threads: Annotated[int | None, typer.Option(help="Threads of each process.")] = None,
    transport: Annotated[
        str, typer.Option(help="shm or tcp, or both, comma-separated: one deployment each.")
    ] = "shm",
    kv_cache_dtype: Annotated[str, typer.Option(help="auto or int8.")] = "auto",
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Tokens per second and time between tokens of a shape with random bf16 weights.

    Deployments side by side, in turns.
    """
    from lamina.bench.decode import measure
    from lamina.bench.subjects import PREFILL_ROWS

    if shape not in SHAPES:
        raise ConfigError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    batches, contexts = numbers(batch, "batch"), numbers(context, "context")
    deployments = [
        (count, name)
        for count in numbers(attention_workers, "attention_workers")
        for name in (transport.split(",") if count else ("auto",))
    ]
    threads = threads or len(os.sched_getaffinity(0))
    # While the last prompts are computed, the first sequences already decode.
    prefill_steps = 2 * ceil_div(max(batches) * max(contexts), PREFILL_ROWS)
    length = max(contexts) + prefill_steps + turns * steps + 2
    figures: list[Figure] = []
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            _subjects(
                write_shape(shape, Path(folder)),
                deployments,
                transformers,
                max(batches),
                length,
                threads,
                kv_cache_dtype,
            ) as subjects,
        ):
            for size, tokens in product(batches, contexts):
                figures += measure(
                    subjects,
                    batch=size,
                    context=tokens,
                    turns=turns,
                    steps_per_turn=steps,
                    vocab_size=int(str(SHAPES[shape]["vocab_size"])),
                )
                print(f"batch {size}, context {tokens}: done", file=sys.stderr)
    finally:  # what was measured is not lost when a later case fails
        if json:
            write_json(figures, json)
        if plot and figures:
            write_plot(plot, lambda axes: _draw(figures, axes), size=(8, 4))
        if figures:
            Console(stderr=str(json) == "-", width=150).print(_table(shape, threads, figures))


@contextmanager
def _subjects(
    folder: Path,
    deployments: list[tuple[int, str]],
    transformers: bool,
    batch: int,
    length: int,
    threads: int,
    kv_cache_dtype: str,
) -> Iterator[list[SubjectProcess]]:
    from lamina.bench.decode import lamina_config
    from lamina.bench.subjects import lamina_subject, transformers_subject

    subjects: list[SubjectProcess] = []
    try:
        for count, transport in deployments:
            name = f"lamina, {count} remote over {transport}" if count else "lamina, monolithic"
            config = lamina_config(
                folder, num_workers=count, batch=batch, length=length, num_threads=threads,
                transport=transport, kv_cache_dtype=kv_cache_dtype,
            )  # fmt: skip
            subjects.append(lamina_subject(name, config))
        if transformers:
            subjects.append(transformers_subject(str(folder), threads))
        yield subjects
    finally:
        for subject in subjects:
            subject.close()


def _table(shape: str, threads: int, figures: list[Figure]) -> Table:
    import torch

    table = Table(
        title=f"Decode, {shape}, bf16, {threads} threads per process, {platform.machine()}, "
        f"torch {torch.__version__}"
    )
    for column in ("batch", "context", "subject"):
        table.add_column(column)
    for column in ("tok/s", "low-high", "TBT ms", "p99", "ratio", "prefill tok/s"):
        table.add_column(column, justify="right")
    table.add_column("where a step goes, ms")
    for f in figures:
        table.add_row(
            str(f.batch),
            str(f.context),
            f.subject,
            f"{f.tokens_per_s:.1f}",
            f"{f.tokens_per_s_low:.1f}-{f.tokens_per_s_high:.1f}",
            f"{f.tbt_ms:.1f}",
            f"{f.tbt_p99_ms:.1f}",
            f"{f.ratio:.2f} ({f.ratio_low:.2f}-{f.ratio_high:.2f})",
            f"{f.prefill_tokens_per_s:.0f}",
            ", ".join(f"{phase} {ms:.2f}" for phase, ms in f.phases_ms.items()),
        )
    return table


def _draw(figures: list[Figure], axes: Axes) -> None:
    """Bars of tokens per second, grouped by batch and context."""
    cases = list(dict.fromkeys((f.batch, f.context) for f in figures))
    subjects = list(dict.fromkeys(f.subject for f in figures))
    width = 0.8 / len(subjects)
    for index, subject in enumerate(subjects):
        own = [f for f in figures if f.subject == subject]
        axes.bar(
            [cases.index((f.batch, f.context)) + index * width for f in own],
            [f.tokens_per_s for f in own],
            width,
            yerr=[
                [f.tokens_per_s - f.tokens_per_s_low for f in own],
                [f.tokens_per_s_high - f.tokens_per_s for f in own],
            ],
            label=subject,
        )
    axes.set_xticks(
        [i + 0.4 - width / 2 for i in range(len(cases))], [f"{b} x {c}" for b, c in cases]
    )
    axes.set_xlabel("batch x context")
    axes.set_ylabel("tokens per second")
    axes.legend()
