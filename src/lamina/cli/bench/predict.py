"""`lamina bench predict`."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lamina.bench.shapes import SHAPES, write_shape
from lamina.cli.bench.output import JsonOption, write_json
from lamina.cli.calibrate import measured_here, print_profile, read_config, usable_cores
from lamina.errors import ConfigError

if TYPE_CHECKING:
    from lamina.bench.predict import Errors, Figure


def predict(
    shape: Annotated[
        str, typer.Option(help=f"What is served: one of {', '.join(SHAPES)}.")
    ] = "qwen3-0.5b",
    calibrate: Annotated[
        str, typer.Option(help="What the parts are measured on: another of them.")
    ] = "llama-0.3b",
    cores: Annotated[
        str | None, typer.Option(help="Cores to use, such as 0-3; default: all.")
    ] = None,
    turns: Annotated[int, typer.Option(help="Turns that each deployment takes.", min=1)] = 5,
    tokens: Annotated[int, typer.Option(help="Tokens per sequence in a turn.", min=1)] = 6,
    passes: Annotated[
        int, typer.Option(help="Passes of calibration, between the deployments.", min=1)
    ] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few and small measurements: to try it out.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit code 1 if the errors are above their limits.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Predicted against measured throughput and time between tokens of real deployments.

    Calibrated on another model, at other batches and contexts, in the same minutes.
    """
    from lamina.bench.calibrate import FULL, QUICK, Calibration
    from lamina.bench.predict import CASES, Case, Deployments, errors
    from lamina.plan.model import model_cost
    from lamina.plan.profile import Profile

    for name in (shape, calibrate):
        if name not in SHAPES:
            raise ConfigError(f"shapes are {', '.join(SHAPES)}, got {name!r}")
    served = dict(SHAPES[shape])
    model = model_cost(served, name=shape)
    _, config = read_config(None, calibrate)
    used = usable_cores(cores)
    started_s = time.monotonic()

    def progress(line: str) -> None:
        print(f"{time.monotonic() - started_s:4.0f} s  {line}", file=sys.stderr)

    cases: Sequence[Case] = CASES
    if quick:  # the same deployments, few tokens
        cases = tuple(
            Case(placement=case.placement, depth=case.depth, batch=2, context=24 + index)
            for index, case in enumerate(CASES)
        )
    with (
        tempfile.TemporaryDirectory() as folder,
        Calibration(
            config, calibrate, cores=used, grid=QUICK if quick else FULL, progress=progress
        ) as calibration,
    ):
        calibration.measure_engine()
        calibration.measure_prompts()
        deployments = Deployments(
            write_shape(shape, Path(folder)),
            cases,
            calibration.placements,
            vocab_size=model.vocab_size,
            turns=turns,
            tokens=tokens,
            progress=progress,
        )
        try:
            calibration.measure()
            num_passes = 1
            while deployments.measure_next():
                if num_passes < passes:
                    calibration.measure()
                    num_passes += 1
        finally:
            deployments.close()
        profile: Profile = calibration.profile(measured_here())
        figures = deployments.figures(model, profile)
    found = errors(figures)
    console = Console(stderr=str(json) == "-", width=150)
    print_profile(profile, console)
    console.print(_table(f"{shape}, calibrated on {calibrate}", figures))
    console.print(_summary(found))
    if json:
        write_json({"figures": figures, "errors": found, "profile": profile}, json)
    if check and not found.within_limits:
        raise typer.Exit(1)


def _table(title: str, figures: list[Figure]) -> Table:
    table = Table(title=title)
    for column in ("deployment", "cores"):
        table.add_column(column)
    for column in ("batch", "context", "tok/s measured", "(low-high)", "predicted", "error",
                   "TBT ms measured", "predicted", "error"):  # fmt: skip
        table.add_column(column, justify="right")
    for f in figures:
        table.add_row(
            f.deployment,
            f.placement,
            str(f.batch),
            str(f.context),
            f"{f.measured_tokens_per_s:.1f}",
            f"{f.measured_low:.1f}-{f.measured_high:.1f}",
            f"{f.predicted_tokens_per_s:.1f}",
            f"{100 * f.throughput_error:+.1f} %",
            f"{f.measured_tbt_ms:.1f}",
            f"{f.predicted_tbt_ms:.1f}",
            f"{100 * f.tbt_error:+.1f} %",
        )
    return table


def _summary(found: Errors) -> str:
    verdict = "within" if found.within_limits else "beyond"
    return (
        f"errors, median (worst): throughput {100 * found.median_throughput:.1f} % "
        f"({100 * found.worst_throughput:.1f} %), median TBT {100 * found.median_tbt:.1f} % "
        f"({100 * found.worst_tbt:.1f} %): {verdict} the limits of 15 % (30 %)"
    )
