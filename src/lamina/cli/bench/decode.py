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
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from lamina.bench.shapes import SHAPES, write_shape
from lamina.cli.bench.breakdown import draw as draw_breakdown
from lamina.cli.bench.breakdown import tables as breakdown_tables
from lamina.cli.bench.deployments import deployments
from lamina.cli.bench.output import (
    JsonOption,
    PlotOption,
    numbers,
    write_json,
    write_plot,
)
from lamina.config import parse_cores
from lamina.errors import ConfigError

if TYPE_CHECKING:  # torch takes seconds to import, which no other command should wait for
    from matplotlib.axes import Axes

    from lamina.bench.breakdown import Breakdown
    from lamina.bench.decode import Figure
    from lamina.bench.subjects import SubjectProcess

Switch = Literal["on", "off", "both"]
_SWITCHES = {"on": [True], "off": [False], "both": [True, False]}


def decode(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "qwen3-0.5b",
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,16",
    context: Annotated[str, typer.Option(help="Context lengths, comma-separated.")] = "256,1024",
    attention_workers: Annotated[
        str, typer.Option(help="Deployments: numbers of workers, 0 is monolithic.")
    ] = "0,1",
    transport: Annotated[
        str, typer.Option(help="shm or tcp, or both, comma-separated: one deployment each.")
    ] = "shm",
    pipeline_depths: Annotated[
        str, typer.Option(help="Micro-batches in flight, comma-separated: one deployment each.")
    ] = "1",
    replicas: Annotated[str, typer.Option(help="Model replicas: one deployment each.")] = "1",
    tensor_parallel: Annotated[str, typer.Option(help="Ranks: one deployment each.")] = "1",
    early_q: Annotated[Switch, typer.Option(help="Send q before k and v are computed.")] = "on",
    deferred: Annotated[
        Switch, typer.Option(help="Send k and v before the rest of the slice is computed.")
    ] = "on",
    transformers: Annotated[
        bool, typer.Option(help="Measure transformers in the same run, as the baseline.")
    ] = True,
    turns: Annotated[int, typer.Option(help="Turns that each subject takes.", min=1)] = 7,
    steps: Annotated[int, typer.Option(help="Decode steps in a turn.", min=1)] = 8,
    threads: Annotated[int | None, typer.Option(help="Threads of each process.")] = None,
    model_cores: Annotated[
        str | None, typer.Option(help="Cores of the model worker, a thread each.")
    ] = None,
    worker_cores: Annotated[
        str | None, typer.Option(help="Cores of the attention workers, a thread each.")
    ] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto or int8.")] = "auto",
    breakdown: Annotated[
        bool, typer.Option("--breakdown", help="Where the time of a step goes; --plot draws that.")
    ] = False,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Tokens per second and time between tokens of a shape with random bf16 weights.

    Deployments side by side, in turns. Ratios are to the last one.
    """
    from lamina.bench.decode import measure, num_tokens_needed

    if shape not in SHAPES:
        raise ConfigError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    batches, contexts = numbers(batch, "batch"), numbers(context, "context")
    names = deployments(
        numbers(attention_workers, "attention_workers"),
        {
            "transport": transport.split(","),
            "pipeline_depth": numbers(pipeline_depths, "pipeline_depths"),
            "model_replicas": numbers(replicas, "replicas"),
            "tensor_parallel_size": numbers(tensor_parallel, "tensor_parallel"),
            "early_q": _SWITCHES[early_q],
            "defer": _SWITCHES[deferred],
        },
    )
    common: dict[str, Any] = {
        "batch": max(batches),
        "length": max(contexts) + num_tokens_needed(max(batches), max(contexts), turns, steps),
        "num_threads": threads or len(os.sched_getaffinity(0)),
        "model_cores": parse_cores(model_cores, "model_cores") if model_cores else (),
        "worker_cores": parse_cores(worker_cores, "worker_cores") if worker_cores else (),
        "kv_cache_dtype": kv_cache_dtype,
    }
    figures: list[Figure] = []
    breakdowns: list[Breakdown] = []
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            _subjects(write_shape(shape, Path(folder)), names, common, transformers) as subjects,
        ):
            for size, tokens in product(batches, contexts):
                measured = measure(
                    subjects,
                    batch=size,
                    context=tokens,
                    turns=turns,
                    steps_per_turn=steps,
                    vocab_size=int(str(SHAPES[shape]["vocab_size"])),
                )
                figures += measured.figures
                breakdowns += measured.breakdowns
                print(f"batch {size}, context {tokens}: done", file=sys.stderr)
    finally:  # what was measured is not lost when a later case fails
        if figures:
            _show(
                shape, common["num_threads"], figures, breakdowns if breakdown else [], json, plot
            )


def _show(
    shape: str,
    threads: int,
    figures: list[Figure],
    breakdowns: list[Breakdown],
    json: Path | None,
    plot: Path | None,
) -> None:
    """`breakdowns`: empty unless they were asked for."""
    if json and breakdowns:
        write_json({"figures": figures, "breakdowns": breakdowns}, json)
    elif json:
        write_json(figures, json)
    if plot and breakdowns:
        height = 1.2 + 0.7 * len(breakdowns)
        write_plot(plot, lambda axes: draw_breakdown(breakdowns, axes), size=(9, height))
    elif plot:
        write_plot(plot, lambda axes: _draw(figures, axes), size=(8, 4))
    console = Console(stderr=str(json) == "-", width=150)
    console.print(_table(shape, threads, figures))
    if breakdowns:
        console.print(*breakdown_tables(shape, breakdowns), sep="\n")


@contextmanager
def _subjects(
    folder: Path,
    names: dict[str, dict[str, Any]],
    common: dict[str, Any],
    transformers: bool,
) -> Iterator[list[SubjectProcess]]:
    from lamina.bench.decode import lamina_config
    from lamina.bench.subjects import lamina_subject, transformers_subject

    subjects: list[SubjectProcess] = []
    try:
        for name, settings in names.items():
            subjects.append(lamina_subject(name, lamina_config(folder, **common, **settings)))
        if transformers:
            subjects.append(transformers_subject(str(folder), common["num_threads"]))
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
