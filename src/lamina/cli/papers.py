"""`lamina simulate --paper`: tables beside the papers' own figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lamina.cli.bench.output import write_json
from lamina.plan import adrenaline, paper, paper_figures


def print_lamina(
    traces: Path, num_requests: int | None, json: Path | None, console: Console
) -> None:
    """Section 6 of the Lamina paper, decode only, and what it computes besides."""

    def progress(line: str) -> None:
        Console(stderr=True).print(line, style="dim")

    cells = paper.cells(traces, num_requests=num_requests, progress=progress)
    (azure,) = [w for w in paper.workloads(traces, num_requests or 3000) if w.name == "Azure-Conv"]
    dops = paper_figures.dop_sweep(azure, progress=progress)
    used = paper_figures.utilisation()
    needed = paper_figures.bandwidths()
    saturation = paper_figures.saturation()
    if json:
        figures = {
            "cells": cells,
            "mean_batch_ratio": paper.mean_batch_ratio(cells),
            "dops": dops,
            "utilisation": used,
            "bandwidths": needed,
            "saturation": saturation,
        }
        write_json(figures, json)
    low, high = paper.GAIN_RANGE
    rows: list[tuple[Any, ...]] = [
        (
            c.model,
            c.workload,
            c.num_requests,
            c.num_left_out,
            f"{c.baseline.tokens_per_s:.0f}",
            f"{c.lamina.tokens_per_s:.0f}",
            f"{100 * c.gain:+.1f} %",
            f"{c.baseline.mean_batch:.1f}",
            f"{c.lamina.mean_batch:.1f}",
            f"{c.batch_ratio:.2f}",
            f"{100 * c.lamina.model_compute:.0f} %",
            f"{100 * c.lamina.attention_bandwidth:.0f} %",
        )
        for c in cells
    ]
    title = (
        f"Decode only, equal cost. The paper: gains {100 * low:.1f} to {100 * high:.1f} %, mean batch "
        f"{paper.BATCH_RATIO} times; here the mean ratio is {paper.mean_batch_ratio(cells):.2f}"
    )
    columns = ("model", "trace", "requests", "left out", "vLLM tok/s", "Lamina tok/s", "gain",
               "vLLM batch", "Lamina batch", "ratio", "model MFU", "KV bandwidth")  # fmt: skip
    _print(console, title, columns, rows, num_text=2)
    _print(
        console,
        "Use of one device by batch, LLaMA3-70B, context 4096 (figures 2 and 3)",
        ("batch", "slices ms", "H100 compute", "H100 bandwidth", "attention ms", "H20 compute",
         "H20 bandwidth"),
        [
            (
                u.batch,
                f"{1e3 * u.slices_s:.1f}",
                f"{100 * u.slices_compute:.0f} %",
                f"{100 * u.slices_bandwidth:.0f} %",
                f"{1e3 * u.attention_s:.1f}",
                f"{100 * u.attention_compute:.0f} %",
                f"{100 * u.attention_bandwidth:.0f} %",
            )
            for u in used
        ],
    )  # fmt: skip
    settings = list(dict.fromkeys((b.dop, b.context) for b in needed))
    by_key = {(b.dop, b.context, b.batch): b.bytes_per_s / 1e9 for b in needed}
    _print(
        console,
        f"Least bandwidth in GB/s for {paper_figures.ALPHA:.0%} more time (figure 4)",
        ("batch", *(f"DOP {dop}, l {context}" for dop, context in settings)),
        [
            (batch, *(f"{by_key[dop, context, batch]:.1f}" for dop, context in settings))
            for batch in dict.fromkeys(b.batch for b in needed)
        ],
    )
    _print(
        console,
        f"Degrees of parallelism, {azure.name}, at saturation (figure 11)",
        ("DOP", "$/h", "tokens/s", "batch", "tokens/$", "model MFU", "KV bandwidth"),
        [
            (
                str(d.dop),
                f"{d.price_per_hour:.2f}",
                f"{d.tokens_per_s:.0f}",
                f"{d.mean_batch:.0f}",
                f"{d.tokens_per_dollar:.0f}",
                f"{100 * d.model_compute:.0f} %",
                f"{100 * d.attention_bandwidth:.0f} %",
            )
            for d in dops
        ],
    )
    _print(
        console,
        "LLaMA3-70B at DOP (2, 4), context 1227: where the model workers are saturated",
        ("batch", "step ms", "tokens/s", "MFU", "of what is reachable"),
        [
            (
                s.batch,
                f"{1e3 * s.step_s:.1f}",
                f"{s.tokens_per_s:.0f}",
                f"{100 * s.compute:.0f} %",
                f"{100 * s.compute_reachable:.0f} %",
            )
            for s in saturation
        ],
    )


def print_adrenaline(num_requests: int | None, json: Path | None, console: Console) -> None:
    """Adrenaline's figure and the best share to offload."""

    def progress(line: str) -> None:
        Console(stderr=True).print(line, style="dim")

    points = adrenaline.rate_sweep(num_requests or 1000, progress)
    sweeps = [
        adrenaline.ratio_sweep(dataset, num_requests or 500, progress)
        for dataset in (adrenaline.SHAREGPT, adrenaline.OPENTHOUGHTS)
    ]
    if json:
        write_json({"rates": points, "ratios": sweeps}, json)
    _print(
        console,
        "1 prefill, 1 decode instance, Llama-2-7B, A100 80GB: paper / simulated",
        ("requests/s", "TTFT s without", "offloading", "TPOT ms without", "offloading",
         "tokens/s without", "offloading", "offloaded"),
        [
            (
                p.paper.requests_per_s,
                f"{p.paper.ttft_s[0]:.1f} / {p.without.ttft_s:.1f}",
                f"{p.paper.ttft_s[1]:.1f} / {p.offloading.ttft_s:.1f}",
                f"{p.paper.tpot_ms[0]:.1f} / {p.without.tpot_ms:.1f}",
                f"{p.paper.tpot_ms[1]:.1f} / {p.offloading.tpot_ms:.1f}",
                f"{p.paper.tokens_per_s[0]:.0f} / {p.without.tokens_per_s:.0f}",
                f"{p.paper.tokens_per_s[1]:.0f} / {p.offloading.tokens_per_s:.0f}",
                f"{100 * p.offloading.offloaded_share:.0f} %",
            )
            for p in points
        ],
    )  # fmt: skip
    for sweep in sweeps:
        _print(
            console,
            f"{sweep.workload} at saturation: OB_mem {sweep.bounds.memory:.2f}, OB_comp "
            f"{sweep.bounds.compute:.2f}; best ratio {sweep.best.ratio}, "
            f"{sweep.best.outcome.tokens_per_s / sweep.without.tokens_per_s:.2f} times without",
            ("offloaded / local", "tokens/s", "TPOT ms", "batch", "offloaded", "decode compute",
             "prefill bandwidth", "prefill memory"),
            [
                (
                    ratio,
                    f"{o.tokens_per_s:.0f}",
                    f"{o.tpot_ms:.1f}",
                    f"{o.mean_batch:.0f}",
                    f"{100 * o.offloaded_share:.0f} %",
                    f"{100 * o.decode_compute:.1f} %",
                    f"{100 * o.prefill_bandwidth:.0f} %",
                    f"{100 * o.prefill_memory:.0f} %",
                )
                for ratio, o in (
                    (0.0, sweep.without),
                    *((p.ratio, p.outcome) for p in sweep.points),
                )
            ],
        )  # fmt: skip


def _print(
    console: Console,
    title: str,
    columns: tuple[str, ...],
    rows: list[tuple[Any, ...]],
    *,
    num_text: int = 0,
) -> None:
    """The first `num_text` columns hold text, the others numbers."""
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < num_text else "right")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)
