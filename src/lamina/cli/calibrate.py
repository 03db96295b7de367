"""`lamina calibrate`."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lamina.bench.shapes import SHAPES
from lamina.config import parse_cores
from lamina.errors import ConfigError

if TYPE_CHECKING:
    from lamina.plan.profile import Profile


def calibrate(
    model: Annotated[
        str | None, typer.Argument(help="Folder with a config.json; the weights are not needed.")
    ] = None,
    shape: Annotated[
        str, typer.Option(help=f"Without a folder: one of {', '.join(SHAPES)}.")
    ] = "qwen3-0.5b",
    out: Annotated[Path, typer.Option(help="File for the profile.")] = Path("profile.json"),
    cores: Annotated[
        str | None, typer.Option(help="Cores to use, such as 0-3; default: all.")
    ] = None,
    passes: Annotated[int, typer.Option(help="How often everything is measured.", min=1)] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few sizes and repetitions: to try it out.")
    ] = False,
) -> None:
    """Measure this machine, for lamina plan and lamina simulate --profile FILE.

    Slices, attention, hops, what they do to each other, and what the engine itself takes.
    """
    from lamina.bench.calibrate import FULL, QUICK, Calibration
    from lamina.plan.profile import write_profile

    name, config = read_config(model, shape)
    started_s = time.monotonic()

    def progress(line: str) -> None:
        print(f"{time.monotonic() - started_s:4.0f} s  {line}", file=sys.stderr)

    with Calibration(
        config, name, cores=usable_cores(cores), grid=QUICK if quick else FULL, progress=progress
    ) as calibration:
        calibration.measure_engine()
        calibration.measure_hops()
        calibration.measure_prompts()
        for _ in range(passes):
            calibration.measure()
        profile = calibration.profile(measured_here())
    write_profile(profile, out)
    print_profile(profile, Console(width=150))
    print(f"wrote {out}", file=sys.stderr)


def read_config(model: str | None, shape: str) -> tuple[str, dict[str, Any]]:
    """Name and Hugging Face config of a folder or, without one, of a shape."""
    if model is None:
        if shape not in SHAPES:
            raise ConfigError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
        return shape, SHAPES[shape]
    file = Path(model) / "config.json"
    try:
        return Path(model).resolve().name, json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as a model's config: {error}") from None


def usable_cores(text: str | None) -> tuple[int, ...]:
    """The cores that a command line names, or all that this process may use."""
    own = sorted(os.sched_getaffinity(0))
    if text is None:
        return tuple(own)
    wanted = parse_cores(text, "cores")
    if missing := sorted(set(wanted) - set(own)):
        raise ConfigError(f"cores {missing} may not be used; this process may use {own}")
    return wanted


def measured_here() -> str:
    """Where and when something was measured."""
    return f"measured: {platform.machine()}, {time.strftime('%Y-%m-%d %H:%M')}"


def print_profile(profile: Profile, console: Console) -> None:
    """The profile's most important figures."""
    table = Table(title=f"{profile.model}: milliseconds per step")
    table.add_column("what")
    table.add_column("over")
    columns = 0
    rows: list[tuple[str, str, list[str]]] = []
    for entry in profile.slices:
        rows.append((f"slices, {entry.device}", "rows", _cells(entry.seconds.sizes)))
        rows.append(("", "", _cells(1e3 * value for value in entry.seconds.values)))
    for time_of in profile.attention:
        decode = time_of.decode
        name = f"attention, {time_of.workers}x{time_of.device}"
        rows.append((name, "context", _cells(decode.contexts)))
        for batch, seconds in zip(decode.sizes, decode.seconds, strict=True):
            rows.append(("", f"batch {batch:g}", _cells(1e3 * value for value in seconds)))
    for beside in profile.side_by_side:
        name = f"{beside.model} beside {beside.workers}x{beside.attention}"
        rows.append((name, "rows", _cells(beside.slices_slowdown.sizes)))
        rows.append(("", "slices slower by", _cells(beside.slices_slowdown.values)))
        rows.append(("", "attention slower by", _cells(beside.attention_slowdown.values)))
        rows.append(("", "bytes per layer", _cells(beside.hop_s.sizes)))
        rows.append(("", "hops per layer, us", _cells(1e6 * x for x in beside.hop_s.values)))
        rows.append(("", "busy of these, us", _cells(1e6 * x for x in beside.hop_busy_s.values)))
    for hop in profile.hops:
        figures = [1e6 * hop.latency_s, hop.bandwidth_bytes_per_s / 1e9]
        rows.append((f"hop over {hop.transport}", "us, then GB/s", _cells(figures)))
    overheads = [1e6 * profile.step_overhead_s, 1e6 * profile.row_overhead_s]
    rows.append(("engine", "us per step, per row", _cells(overheads)))
    columns = max(len(cells) for _, _, cells in rows)
    for _ in range(columns):
        table.add_column(justify="right")
    for what, over, cells in rows:
        table.add_row(what, over, *cells)
    console.print(table)


def _cells(values: Any) -> list[str]:
    return [f"{value:.4g}" for value in values]
