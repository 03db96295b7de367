"""`lamina plan`: which deployment for a model, a workload and the hardware at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lamina.cli.bench.output import JsonOption, write_json, write_plot
from lamina.plan.build import Settings
from lamina.plan.confirm import Simulations
from lamina.plan.demand import Demand
from lamina.plan.estimate import Estimator, Objectives
from lamina.plan.hardware import load_devices
from lamina.plan.inventory import open_inventory
from lamina.plan.model import load_model
from lamina.plan.page import cells, html
from lamina.plan.plots import PLOTS, SIZE
from lamina.plan.profile import read_profile
from lamina.plan.report import Report, report
from lamina.plan.search import search
from lamina.plan.workload import open_workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADER = (
    "", "tok/s", "simulated", "TTFT ms", "TBT ms", "batch", "$/h", "$/Mtok", "link GB/s",
)  # fmt: skip


def plan(
    model: Annotated[
        str, typer.Argument(help="A known model's name, a model folder, or a config.json.")
    ],
    inventory: Annotated[
        str,
        typer.Option(
            help="What there is: '2 x RTX 4090, 3 x RTX 3090 at $0.20, 1 CPU box with 512 GB, "
            "25 GbE', or a TOML or JSON file."
        ),
    ],
    workload: Annotated[
        str,
        typer.Option(
            help="A file of requests, or synthetic:rate=4,prompt=lognormal:1024:1,output=200."
        ),
    ],
    ttft_s: Annotated[
        float | None,
        typer.Option(help="Longest mean time to first token, from when a request has its place."),
    ] = None,
    tbt_s: Annotated[float | None, typer.Option(help="Longest mean time between tokens.")] = None,
    rank: Annotated[
        Literal["throughput", "cost"], typer.Option(help="What makes a plan the best.")
    ] = "throughput",
    budget: Annotated[
        float | None, typer.Option(help="Most dollars per hour that a plan may cost.")
    ] = None,
    decode_only: Annotated[
        bool, typer.Option("--decode-only", help="Prompts are computed elsewhere, for nothing.")
    ] = False,
    max_num_seqs: Annotated[
        int, typer.Option(help="Most sequences of one engine that run at once.", min=1)
    ] = 1024,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Most tokens in one step.", min=1)
    ] = 2048,
    hardware: Annotated[Path | None, typer.Option(help="TOML file of devices of your own.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Measured times to use instead of the roofline.")
    ] = None,
    confirm_s: Annotated[
        float,
        typer.Option(help="Time for simulating the best plans; 0: none are simulated.", min=0.0),
    ] = 5.0,
    top: Annotated[int, typer.Option(help="Plans to show.", min=1)] = 8,
    json: JsonOption = None,
    html_file: Annotated[
        Path | None,
        typer.Option("--html", help="Write a report to this file."),
    ] = None,
    plot_cost: Annotated[
        Path | None,
        typer.Option(help="Draw cost against throughput to this PNG or SVG file."),
    ] = None,
    plot_bandwidth: Annotated[
        Path | None,
        typer.Option(help="Draw the bandwidth needed against the batch to this PNG or SVG file."),
    ] = None,
    plot_breakdown: Annotated[
        Path | None,
        typer.Option(help="Draw where the time between tokens goes to this PNG or SVG file."),
    ] = None,
) -> None:
    """Which deployment for this model, workload and hardware, and whether disaggregation pays.

    Throughput is at saturation, within the objectives, from the cost model; the best plans and
    those that the verdict compares are simulated with the real scheduler as far as time allows.
    """
    cost = load_model(model)
    requests = open_workload(workload)
    demand = Demand(requests)
    there = open_inventory(inventory, load_devices(hardware))
    objectives = Objectives(ttft_s=ttft_s, tbt_s=tbt_s)
    settings = Settings(
        dtype="fp32" if cost.bytes_per_param == 4 else "bf16",
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        decode_only=decode_only,
        profile=None if profile is None else read_profile(profile),
    )
    bar = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("estimating deployments", total=None)
        found = search(
            cost,
            there,
            demand,
            settings,
            objectives=objectives,
            rank=rank,
            budget_per_hour=budget,
            num_plans=top,
        )
        bar.update(task, description="simulating the best plans")
        simulations = Simulations(cost, requests, settings, limit_s=confirm_s)
        made = report(
            found,
            Estimator(cost, demand, settings, objectives),
            there,
            rank=rank,
            simulations=simulations if confirm_s else None,
            progress=lambda: bar.advance(task),
        )
    if json:
        write_json(made, json)
    for name, file in (
        ("cost", plot_cost), ("bandwidth", plot_bandwidth), ("breakdown", plot_breakdown),
    ):  # fmt: skip
        if file is not None:
            write_plot(file, _drawing(name, made), size=SIZE)
    if html_file is not None:
        html_file.write_text(html(made))
    if str(json) != "-":
        _print(made)


def _drawing(name: str, made: Report) -> Callable[[Axes], None]:
    return lambda axes: PLOTS[name](axes, made)


def _print(made: Report) -> None:
    console = Console(highlight=False)
    table = Table(
        title=f"{made.model} on {made.inventory}: best by {made.rank} of {made.num_estimated} "
        "deployments",
        title_justify="left",
        box=box.SIMPLE,
    )
    for column in _HEADER:
        table.add_column(column, justify="right")
    for number, row in enumerate(made.rows, 1):
        table.add_row(str(number), *cells(row)[1:-1])
    console.print(table)
    for number, row in enumerate(made.rows, 1):
        console.print(f"{number:>3}  {row.plan}\n     limited by {row.limit}", markup=False)
    console.print(f"\n{made.verdict}", markup=False)
    for text in made.warnings:
        console.print(f"warning: {text}", markup=False, style="yellow")
    for text in made.notes:
        console.print(f"note: {text}", markup=False)
