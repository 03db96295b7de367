"""`lamina bench`: measurements as commands."""

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

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from lamina.bench.shapes import SHAPES, write_shape
from lamina.cli.bench_attention import attention
from lamina.errors import ConfigError
from lamina.types import ceil_div

if TYPE_CHECKING:  # torch takes seconds to import, which no other command should wait for
    from lamina.bench.decode import Figure
    from lamina.bench.subjects import SubjectProcess

app = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.command()(attention)


@app.callback()
def bench() -> None:
    """Measure this machine."""


@app.command()
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
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Decode tokens per second of a shape with random bf16 weights, deployments side by side."""
    from lamina.bench.decode import measure
    from lamina.bench.subjects import PREFILL_ROWS

    if shape not in SHAPES:
        raise ConfigError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    batches, contexts = _numbers(batch, "batch"), _numbers(context, "context")
    deployments = _numbers(attention_workers, "attention_workers")
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
            print(msgspec.json.encode(figures).decode())
        elif figures:
            Console().print(_table(shape, threads, figures))


@contextmanager
def _subjects(
    folder: Path,
    deployments: list[int],
    transformers: bool,
    batch: int,
    length: int,
    threads: int,
) -> Iterator[list[SubjectProcess]]:
    from lamina.bench.decode import lamina_config
    from lamina.bench.subjects import lamina_subject, transformers_subject

    subjects: list[SubjectProcess] = []
    try:
        for count in deployments:
            name = f"lamina, {count} remote" if count else "lamina, monolithic"
            config = lamina_config(
                folder, num_workers=count, batch=batch, length=length, num_threads=threads
            )
            subjects.append(lamina_subject(name, config))
        if transformers:
            subjects.append(transformers_subject(str(folder), threads))
        yield subjects
    finally:
        for subject in subjects:
            subject.close()


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} must be numbers separated by commas, got {text!r}") from None


def _table(shape: str, threads: int, figures: list[Figure]) -> Table:
    import torch

    table = Table(
        title=f"Decode, {shape}, bf16, {threads} threads per process, {platform.machine()}, "
        f"torch {torch.__version__}"
    )
    for column in ("batch", "context", "subject"):
        table.add_column(column)
    for column in ("tok/s", "low-high", "step ms", "ratio", "prefill tok/s"):
        table.add_column(column, justify="right")
    for f in figures:
        table.add_row(
            str(f.batch),
            str(f.context),
            f.subject,
            f"{f.tokens_per_s:.1f}",
            f"{f.tokens_per_s_low:.1f}-{f.tokens_per_s_high:.1f}",
            f"{f.step_ms:.1f}",
            f"{f.ratio:.2f} ({f.ratio_low:.2f}-{f.ratio_high:.2f})",
            f"{f.prefill_tokens_per_s:.0f}",
        )
    return table
