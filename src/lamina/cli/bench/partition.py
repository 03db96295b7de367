"""`lamina bench partition`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lamina.bench.shapes import SHAPES, write_shape
from lamina.cli.bench.output import JsonOption, write_json
from lamina.config import parse_attention_workers, parse_cores
from lamina.errors import ConfigError
from lamina.types import ceil_div

if TYPE_CHECKING:
    from lamina.bench.partition import PartitionFigure


def partition(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "qwen3-0.5b",
    batch: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 16,
    context: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 1024,
    attention_workers: Annotated[
        str, typer.Option(help="Device, memory and threads of each, as for `lamina serve`.")
    ] = "cpu::1,cpu::1",
    attention_partition: Annotated[str, typer.Option(help="heads, requests or tokens.")] = "heads",
    pipeline_depth: Annotated[int, typer.Option(help="Micro-batches in flight.", min=1)] = 1,
    model_cores: Annotated[str | None, typer.Option(help="Cores of the model worker.")] = None,
    worker_cores: Annotated[
        str | None, typer.Option(help="Cores of the attention workers, dealt out in order.")
    ] = None,
    busy_core: Annotated[
        int | None, typer.Option(help="A core that another process keeps busy meanwhile.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Of the model worker, without cores.", min=1)] = 1,
    replaced: Annotated[
        int | None, typer.Option(help="Sequences that end before each turn; default: a quarter.")
    ] = None,
    turns: Annotated[int, typer.Option(help="Turns of each subject.", min=1)] = 9,
    warm_up: Annotated[int, typer.Option(help="Turns before those.", min=0)] = 8,
    steps: Annotated[int, typer.Option(help="Decode steps in a turn.", min=1)] = 8,
    json: JsonOption = None,
) -> None:
    """Attention workers of unequal speed: weights found while running beside equal shares.

    Both deployments are alive together and take turns; sequences come and go.
    """
    from lamina.bench.decode import lamina_config, num_tokens_needed
    from lamina.bench.options import with_options
    from lamina.bench.partition import busy_core as keep_busy
    from lamina.bench.partition import measure
    from lamina.bench.subjects import lamina_subject

    if shape not in SHAPES:
        raise ConfigError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    workers = parse_attention_workers(attention_workers)
    num_replaced = ceil_div(batch, 4) if replaced is None else replaced
    if not 1 <= num_replaced <= batch:
        raise ConfigError(f"replaced must be between 1 and batch ({batch}), got {num_replaced}")
    num_turns = turns + warm_up
    with tempfile.TemporaryDirectory() as folder:
        config = lamina_config(
            write_shape(shape, Path(folder)),
            num_workers=len(workers),
            batch=batch,
            # Prompts are a token longer every turn, and others decode while they are computed.
            length=context + 3 * num_turns
            + num_tokens_needed(batch, context, num_turns, steps)
            + num_turns * num_tokens_needed(num_replaced, context, 0, 0),
            num_threads=threads,
            model_cores=parse_cores(model_cores, "model_cores") if model_cores else (),
            worker_cores=parse_cores(worker_cores, "worker_cores") if worker_cores else (),
            attention_partition=attention_partition,
            pipeline_depth=pipeline_depth,
        )  # fmt: skip
        config = with_options(config, {"attention_workers": workers})
        equal = with_options(config, {"attention_weights": (1.0,) * len(workers)})
        subjects = []
        try:
            for name, settings in (("weights as observed", config), ("equal shares", equal)):
                subjects.append(lamina_subject(name, settings))
            with keep_busy(busy_core):
                figures = measure(
                    subjects,
                    batch=batch,
                    context=context,
                    num_replaced=num_replaced,
                    turns=turns,
                    warm_up_turns=warm_up,
                    steps_per_turn=steps,
                    vocab_size=int(str(SHAPES[shape]["vocab_size"])),
                )
        finally:
            for subject in subjects:
                subject.close()
    if json:
        write_json(figures, json)
    title = f"{attention_workers} by {attention_partition}, {shape}, {batch} x {context}"
    Console(stderr=str(json) == "-", width=150).print(_table(title, figures))


def _table(title: str, figures: list[PartitionFigure]) -> Table:
    from lamina.bench.partition import settled_after

    table = Table(title=title)
    table.add_column("subject")
    for column in ("tok/s", "low-high", "ratio", "settled after"):
        table.add_column(column, justify="right")
    table.add_column("shares, after so many steps")
    for f in figures:
        shown = f.weights[:: max(1, len(f.weights) // 8)]
        table.add_row(
            f.subject,
            f"{f.tokens_per_s:.1f}",
            f"{f.tokens_per_s_low:.1f}-{f.tokens_per_s_high:.1f}",
            f"{f.ratio:.2f} ({f.ratio_low:.2f}-{f.ratio_high:.2f})",
            f"{settled_after(f.weights)} steps",
            ", ".join(f"{w.num_steps}: {'/'.join(f'{s:.2f}' for s in w.shares)}" for w in shown),
        )
    return table
