"""`lamina bench serve`."""

from __future__ import annotations

import asyncio
import math
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from lamina.cli.bench.output import JsonOption, write_json

if TYPE_CHECKING:
    from lamina.bench.percentiles import Spread
    from lamina.bench.serve import Progress, ServeFigures


def serve(
    workload: Annotated[
        str,
        typer.Option(
            help="A file of requests (CSV or JSONL, .gz or not: Azure's, Mooncake's or our own "
            "format), or synthetic:rate=4,requests=100,prompt=512,output=exponential:128."
        ),
    ],
    url: Annotated[str, typer.Option(help="The server's address.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Model name; default: the first that the server lists.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LAMINA_API_KEY", help="Sent as Bearer token.")
    ] = None,
    rate_scale: Annotated[
        float, typer.Option(help="Send at so many times the workload's rate.")
    ] = 1.0,
    start_s: Annotated[
        float, typer.Option(help="Leave out what arrives before this time of the workload.")
    ] = 0.0,
    stop_s: Annotated[
        float | None, typer.Option(help="Leave out what arrives from this time on.")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Send no more than the first so many.", min=1)
    ] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Requests under way at once; default: no limit.", min=1)
    ] = None,
    timeout_s: Annotated[
        float, typer.Option(help="Longest silence of the server within an answer.", min=0.001)
    ] = 600.0,
    json: JsonOption = None,
) -> None:
    """Replay a workload against a running server, streaming: TTFT, TBT and throughput.

    Requests leave at the workload's times. Failed requests are counted.
    """
    from lamina.bench.serve import replay
    from lamina.plan.workload import open_workload

    requests = open_workload(workload)
    if start_s or stop_s is not None:
        requests = requests.between(start_s, math.inf if stop_s is None else stop_s)
    if max_requests is not None:
        requests = requests.first(max_requests)
    requests = requests.faster(rate_scale)
    bar = ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed, {task.fields[tokens]} tokens"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("requests", total=len(requests.arrivals), failed=0, tokens=0)

        def show(now: Progress) -> None:
            bar.update(
                task, completed=now.num_done, failed=now.num_failed, tokens=now.output_tokens
            )

        figures = asyncio.run(
            replay(
                requests,
                url=url,
                model=model,
                api_key=api_key,
                max_concurrency=max_concurrency,
                timeout_s=timeout_s,
                progress=show,
            )
        )
    if json:
        write_json(figures, json)
    console = Console(stderr=str(json) == "-", width=120, highlight=False)
    console.print(_table(figures))
    for kind, count in figures.errors.items():
        console.print(f"{count} x {kind}: {figures.error_examples[kind]}", markup=False)
    if not figures.num_completed:
        sys.exit(1)


def _table(figures: ServeFigures) -> Table:
    table = Table(
        title=f"{figures.workload} on {figures.model}: {figures.num_completed} of "
        f"{figures.num_requests} requests in {figures.duration_s:.1f} s, "
        f"{figures.requests_per_s:.2f} requests/s, {figures.prompt_tokens_per_s:.0f} prompt and "
        f"{figures.output_tokens_per_s:.0f} output tokens/s"
        + (f"; {figures.num_short} answers shorter than asked" if figures.num_short else "")
    )
    table.add_column("ms")
    for column in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(column, justify="right")
    for name, spread in (
        ("time to first token", figures.ttft_s),
        ("time between tokens", figures.tbt_s),
        ("time per token after the first, by request", figures.tpot_s),
        ("whole answer", figures.latency_s),
        ("left later than due", figures.lateness_s),
    ):
        table.add_row(name, *_milliseconds(spread))
    return table


def _milliseconds(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["-"] * 5
    values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
    return [f"{1e3 * value:.1f}" for value in values]
