"""`lamina bench hop`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lamina.cli.bench.output import (
    JsonOption,
    PlotOption,
    numbers,
    write_json,
    write_plot,
)
from lamina.errors import ConfigError

if TYPE_CHECKING:  # torch takes seconds to import, which no other command should wait for
    from matplotlib.axes import Axes

    from lamina.bench.hop import HopFigure

_TRANSPORTS = "shm,tcp,inproc,bare,bare-blocking"


def hop(
    transport: Annotated[
        str, typer.Option(help=f"Of {_TRANSPORTS}; bare is a C ping-pong without mailboxes.")
    ] = _TRANSPORTS,
    size: Annotated[
        str, typer.Option(help="Payloads in bytes, comma-separated.")
    ] = "0,1024,16384,262144",
    messages: Annotated[
        int, typer.Option(help="Messages per transport and size, both ways together.", min=2)
    ] = 40_000,
    turns: Annotated[int, typer.Option(help="Turns that each transport takes.", min=1)] = 7,
    cores: Annotated[
        str, typer.Option(help="Core of either side, comma-separated; auto; none: do not pin.")
    ] = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="Verify number and bytes of every message.")
    ] = False,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Round trips between two processes per transport and payload size.

    All transports and a bare C ping-pong over TCP take turns.
    """
    from lamina.bench.hop import SUBJECTS, measure

    subjects = transport.split(",")
    if unknown := set(subjects) - set(SUBJECTS):
        raise ConfigError(f"transport must be of {_TRANSPORTS}, got {', '.join(sorted(unknown))}")
    sizes = numbers(size, "size")
    if min(sizes) < 0:
        raise ConfigError(f"size must not be negative, got {size!r}")
    pinned = _cores(cores)
    figures = measure(
        subjects,
        sizes,
        round_trips=messages // 2,
        turns=turns,
        cores=pinned,
        check=check,
        progress=lambda line: print(line, file=sys.stderr),
    )
    if json:
        write_json(figures, json)
    if plot:
        write_plot(plot, lambda axes: _draw(figures, axes), size=(7, 4))
    where = f"cores {pinned[0]} and {pinned[1]}" if pinned else "not pinned"
    title = f"Round trips, {where}" + (", every message verified" if check else "")
    Console(stderr=str(json) == "-", width=120).print(_table(title, figures))


def _cores(text: str) -> tuple[int, int] | None:
    """ConfigError: not two cores that this process may use."""
    if text == "none":
        return None
    usable = sorted(os.sched_getaffinity(0))
    chosen = [usable[0], usable[-1]] if text == "auto" else numbers(text, "cores")
    if len(chosen) != 2 or not set(chosen) <= set(usable):
        raise ConfigError(f"cores must be two of {usable}, auto or none, got {text!r}")
    return chosen[0], chosen[1]


def _table(title: str, figures: list[HopFigure]) -> Table:
    table = Table(title=title)
    for column in ("bytes", "transport"):
        table.add_column(column)
    for column in ("round trips", "median us", "low-high", "p99 us", "ratio to bare"):
        table.add_column(column, justify="right")
    for f in figures:
        table.add_row(
            str(f.num_bytes),
            f.subject,
            str(f.num_round_trips),
            f"{f.median_us:.2f}",
            f"{f.low_us:.2f}-{f.high_us:.2f}",
            f"{f.p99_us:.2f}",
            "" if f.ratio is None else f"{f.ratio:.2f} ({f.ratio_low:.2f}-{f.ratio_high:.2f})",
        )
    return table


def _draw(figures: list[HopFigure], axes: Axes) -> None:
    """Medians over payload size, one line per transport."""
    for subject in dict.fromkeys(f.subject for f in figures):
        own = [f for f in figures if f.subject == subject]
        axes.errorbar(
            [max(1, f.num_bytes) for f in own],
            [f.median_us for f in own],
            yerr=[
                [max(0.0, f.median_us - f.low_us) for f in own],
                [max(0.0, f.high_us - f.median_us) for f in own],
            ],
            marker="o",
            label=subject,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("payload bytes (0 is drawn at 1)")
    axes.set_ylabel("round trip, microseconds")
    axes.legend()
