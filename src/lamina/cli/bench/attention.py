"""`lamina bench attention`: the speed of decode attention beside that of reading memory."""

from __future__ import annotations

import os
import platform
import sys
from itertools import product
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lamina.cli.bench.output import JsonOption, PlotOption, numbers, write_json, write_plot
from lamina.errors import ConfigError

if TYPE_CHECKING:  # torch takes seconds to import, which no other command should wait for
    from matplotlib.axes import Axes

    from lamina.bench.attention import Figure


def attention(
    cache_dtype: Annotated[
        str, typer.Option(help="Of float32, float16, bfloat16 and int8, comma-separated.")
    ] = "bfloat16,int8",
    group: Annotated[str, typer.Option(help="Query heads per KV head.")] = "1,2,4,8",
    context: Annotated[str, typer.Option(help="Context lengths.")] = "1024,4096",
    batch: Annotated[int, typer.Option(help="Sequences.", min=1)] = 64,
    kv_heads: Annotated[int, typer.Option(help="KV heads.", min=1)] = 8,
    head_dim: Annotated[int, typer.Option(help="Head size.", min=8, max=256)] = 128,
    block_size: Annotated[int, typer.Option(help="Tokens per page.", min=1)] = 64,
    threads: Annotated[str, typer.Option(help="Numbers of threads; default 1 and all.")] = "",
    turns: Annotated[int, typer.Option(help="Turns that each case takes.", min=1)] = 9,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Gigabytes per second of decode attention, pages at random places, beside plain reading."""
    from lamina.bench.attention import Case, measure

    num_cores = len(os.sched_getaffinity(0))
    all_threads = numbers(threads, "threads") if threads else sorted({1, num_cores})
    dtypes = cache_dtype.split(",")
    for name in dtypes:
        if name not in ("float32", "float16", "bfloat16", "int8"):
            raise ConfigError(
                f"cache_dtype must be of float32, float16, bfloat16 and int8, got {name!r}"
            )
    figures: list[Figure] = []
    groups, contexts = numbers(group, "group"), numbers(context, "context")
    try:
        for count, length, size in product(all_threads, contexts, groups):
            cases = [
                Case(
                    dtype="bfloat16" if name == "int8" else name,
                    cache_dtype=name,
                    group=size,
                    context=length,
                    batch=batch,
                    kv_heads=kv_heads,
                    head_dim=head_dim,
                    page_tokens=block_size,
                    threads=count,
                )
                for name in dtypes
            ]
            figures += measure(cases, turns)
            print(f"{count} threads, context {length}, G {size}: done", file=sys.stderr)
    finally:  # what was measured is not lost when a later case fails
        if figures:
            Console(stderr=str(json) == "-").print(_table(figures))
        if json is not None:
            write_json(figures, json)
    if plot is not None:
        write_plot(plot, lambda axes: _draw(figures, axes), size=(8, 4.5))


def _table(figures: list[Figure]) -> Table:
    case = figures[0].case
    table = Table(
        title=f"Decode attention, {case.batch} sequences, {case.kv_heads} KV heads of "
        f"{case.head_dim}, pages of {case.page_tokens} tokens, {platform.machine()}"
    )
    for column in ("threads", "context", "G", "cache", "GB/s", "low-high", "read GB/s"):
        table.add_column(column, justify="right")
    for column in ("ratio", "Mtokens/s", "layer us"):
        table.add_column(column, justify="right")
    for f in figures:
        table.add_row(
            str(f.case.threads),
            str(f.case.context),
            str(f.case.group),
            f.case.cache_dtype,
            f"{f.gb_per_s:.1f}",
            f"{f.gb_per_s_low:.1f}-{f.gb_per_s_high:.1f}",
            f"{f.read_gb_per_s:.1f}",
            f"{f.ratio:.2f} ({f.ratio_low:.2f}-{f.ratio_high:.2f})",
            f"{f.tokens_per_s / 1e6:.2f}",
            f"{f.layer_us:.0f}",
        )
    return table


def _draw(figures: list[Figure], axes: Axes) -> None:
    """The ratios as bars with their range."""
    labels = [
        f"{f.case.cache_dtype}\nG {f.case.group}, {f.case.context}\n{f.case.threads} thr."
        for f in figures
    ]
    axes.bar(range(len(figures)), [f.ratio for f in figures])
    low = [f.ratio - f.ratio_low for f in figures]
    high = [f.ratio_high - f.ratio for f in figures]
    axes.errorbar(
        range(len(figures)), [f.ratio for f in figures], [low, high], fmt="none", color="black"
    )
    axes.set_xticks(range(len(figures)), labels, fontsize=6)
    axes.set_ylabel("of plain reading")
