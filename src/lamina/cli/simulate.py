"""`lamina simulate`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lamina.cli.bench.output import JsonOption, write_json
from lamina.errors import ConfigError

if TYPE_CHECKING:  # numpy takes a while to import, which no other command should wait for
    from lamina.plan.results import Percentiles, Result


def simulate(
    model: Annotated[
        str | None, typer.Argument(help="Folder with a config.json, or a known model's name.")
    ] = None,
    deployments: Annotated[
        list[str] | None,
        typer.Argument(
            help="Such as mono:4xH100, dop:2xH100/4xH20,depth=2 or pd:1xH100/1xH100,offload=auto."
        ),
    ] = None,
    workload: Annotated[
        str,
        typer.Option(help="A trace (CSV, JSONL), or synthetic:rate=4,prompt=512,output=128."),
    ] = "synthetic:",
    rate: Annotated[
        float | None, typer.Option(help="Change the workload's rate to this many requests/s.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="The workload's first so many requests.", min=1)
    ] = None,
    at_once: Annotated[
        bool, typer.Option("--at-once", help="All requests are there from the beginning.")
    ] = False,
    decode_only: Annotated[
        bool, typer.Option("--decode-only", help="Prompts cost nothing; their KV is there.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of arithmetic: bf16, fp16, fp32, fp8.")] = "bf16",
    max_num_seqs: Annotated[int, typer.Option(help="Most running sequences.", min=1)] = 1024,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Most rows per step.", min=1)] = 2048,
    block_size: Annotated[int, typer.Option(help="Tokens per KV page.", min=1)] = 16,
    instances: Annotated[
        int | None,
        typer.Option(help="So many equal instances behind a router, simulated fast.", min=1),
    ] = None,
    routing: Annotated[
        Literal["turns", "two-choices"],
        typer.Option(help="Of instances: in turns, or the less loaded of two drawn at random."),
    ] = "turns",
    hardware: Annotated[
        Path | None, typer.Option(help="TOML file with devices of your own.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Measured times, from lamina calibrate.")
    ] = None,
    transport: Annotated[
        str | None, typer.Option(help="Whose measured hops to use; default: the profile's first.")
    ] = None,
    tbt_objective: Annotated[
        float | None,
        typer.Option(help="Seconds between tokens that the offloading policy keeps to.", min=0),
    ] = None,
    paper: Annotated[
        Literal["lamina", "adrenaline"] | None,
        typer.Option(help="Instead: the evaluation of one of the two papers."),
    ] = None,
    traces: Annotated[Path, typer.Option(help="Folder of the papers' traces.")] = Path("traces"),
    json: JsonOption = None,
) -> None:
    """What deployments deliver for a workload: simulated time, the engine's own scheduler."""
    console = Console(stderr=str(json) == "-", width=150)
    if paper is not None:
        from lamina.cli.papers import print_adrenaline, print_lamina

        if paper == "lamina":
            print_lamina(traces, requests, json, console)
        else:
            print_adrenaline(requests, json, console)
        return
    if model is None or not deployments:
        raise ConfigError(
            "give a model and at least one deployment, such as: "
            "lamina simulate LLaMA3-70B mono:4xH100 dop:2xH100/4xH20"
        )
    from lamina.plan.build import Settings
    from lamina.plan.deployment import parse_deployment
    from lamina.plan.hardware import load_devices
    from lamina.plan.model import load_model
    from lamina.plan.profile import read_profile
    from lamina.plan.replicated import simulate_replicated
    from lamina.plan.scaling import scaled
    from lamina.plan.simulate import simulate as simulate_one
    from lamina.plan.workload import open_workload

    devices = load_devices(hardware)
    cost = load_model(model)
    measured = None if profile is None else scaled(read_profile(profile), cost)
    if measured is not None:
        devices = measured.with_devices(devices)
    parsed = [parse_deployment(text, devices) for text in deployments]
    run: Callable[..., Result] = simulate_one
    if instances is not None:
        run = partial(simulate_replicated, instances=instances, routing=routing)
    work = open_workload(workload)
    work = work if requests is None else work.first(requests)
    work = work if rate is None else work.at_rate(rate)
    settings = Settings(
        dtype=dtype,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        decode_only=decode_only,
        at_once=at_once,
        profile=measured,
        transport=transport,
        tbt_objective_s=tbt_objective,
    )
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        for deployment in parsed:
            task = bar.add_task(str(deployment), total=1.0)
            results.append(
                run(
                    cost,
                    deployment,
                    work,
                    settings,
                    progress=lambda share, task=task: bar.update(task, completed=share),
                )
            )
            bar.update(task, completed=1.0)
    if json:
        write_json(results, json)
    title = f"{cost.name}, {work.name}: {len(work.arrivals)} requests"
    console.print(_rates(title, results))
    console.print(_pools(results))


def _rates(title: str, results: list[Result]) -> Table:
    table = Table(title=title)
    table.add_column(
        "deployment", overflow="fold", min_width=max(len(r.deployment) for r in results)
    )
    for column in ("tokens/s", "batch", "TTFT s p50", "p99", "TBT ms p50", "p99", "queue s p50",
                   "preempted", "$/h", "$/Mtoken", "J/token"):  # fmt: skip
        table.add_column(column, justify="right")
    for r in results:
        steady = r.saturated
        rate = r.tokens_per_s_while_arriving
        if rate is None:
            rate = r.tokens_per_s if steady is None else steady.tokens_per_s
        table.add_row(
            r.deployment,
            f"{rate:.0f}",
            f"{r.mean_batch:.1f}",
            _seconds(r.ttft_s, "p50"),
            _seconds(r.ttft_s, "p99"),
            _seconds(r.tbt_s, "p50", 1e3),
            _seconds(r.tbt_s, "p99", 1e3),
            _seconds(r.queue_s, "p50"),
            str(r.num_preemptions),
            _number(r.price_per_hour, 2),
            _number(r.price_per_million_tokens, 2),
            _number(r.energy_j_per_token, 2),
        )
    return table


def _pools(results: list[Result]) -> Table:
    table = Table(title="Use of devices, % of peak")
    for column in ("deployment", "role", "devices"):
        table.add_column(column)
    for column in ("compute", "bandwidth", "memory", "network"):
        table.add_column(column, justify="right")
    for r in results:
        for pool in r.pools:
            shares = (pool.compute, pool.bandwidth, pool.memory, pool.network)
            table.add_row(
                r.deployment,
                pool.role,
                f"{pool.count}x{pool.device}",
                *(f"{100 * share:.1f}" for share in shares),
            )
    return table


def _seconds(of: Percentiles | None, which: str, scale: float = 1.0) -> str:
    return "-" if of is None else f"{scale * getattr(of, which):.3g}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
