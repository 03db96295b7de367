"""`lamina bench timeline`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamina.bench.shapes import SHAPES, write_shape
from lamina.cli.bench.output import write_plot
from lamina.config import parse_cores
from lamina.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lamina.bench.picture import Picture
    from lamina.engine.events import Event

_COLORS = ("#4c78a8", "#f2a057", "#6aa56e", "#b279a2", "#d5605e", "#9d755d", "#72b7b2", "#b8a13c")
"""Of the micro-batches, in turn."""
_HATCHES = {
    "q": "",
    "k, v": "//",
    "deferred": "||",
    "last slice": "",
    "attend": "",
    "append, merge": "xx",
}
_HEIGHT = 0.6


def timeline(
    file: Annotated[Path, typer.Argument(help="PNG or SVG file to write.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "qwen3-0.5b",
    batch: Annotated[int, typer.Option(help="Sequences.", min=1)] = 16,
    context: Annotated[int, typer.Option(help="Tokens of each.", min=1)] = 1024,
    attention_workers: Annotated[int, typer.Option(help="How many.", min=1)] = 1,
    pipeline_depth: Annotated[int, typer.Option(help="Micro-batches in flight.", min=1)] = 2,
    replicas: Annotated[int, typer.Option(help="Model replicas.", min=1)] = 1,
    model_cores: Annotated[str | None, typer.Option(help="Cores of the model worker.")] = None,
    worker_cores: Annotated[str | None, typer.Option(help="Of the attention workers.")] = None,
    threads: Annotated[int, typer.Option(help="Of each process without cores.", min=1)] = 1,
    layers: Annotated[int, typer.Option(help="Layers to draw.", min=1)] = 3,
) -> None:
    """Draw a few layers of a running pipeline: who worked on which micro-batch, and when."""
    from lamina.bench.decode import lamina_config, num_tokens_needed, random_prompts
    from lamina.bench.picture import choose
    from lamina.bench.subjects import lamina_subject

    if shape not in SHAPES:
        raise ConfigError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    num_layers = int(str(SHAPES[shape]["num_hidden_layers"]))
    if layers > num_layers:
        raise ConfigError(f"layers must be at most {num_layers}, got {layers}")
    num_steps = 12
    with tempfile.TemporaryDirectory() as folder:
        config = lamina_config(
            write_shape(shape, Path(folder)),
            num_workers=attention_workers,
            batch=batch,
            length=context + num_tokens_needed(batch, context, 1, num_steps),
            num_threads=threads,
            model_cores=parse_cores(model_cores, "model_cores") if model_cores else (),
            worker_cores=parse_cores(worker_cores, "worker_cores") if worker_cores else (),
            pipeline_depth=pipeline_depth,
            model_replicas=replicas,
        )
        subject = lamina_subject("lamina", config)
        try:
            subject.prefill(random_prompts(batch, context, int(str(SHAPES[shape]["vocab_size"]))))
            subject.decode(num_steps)
            (stretch,) = subject.stretches()
        finally:
            subject.close()
    picture = choose(stretch.records, layers)
    write_plot(file, lambda axes: draw(picture, axes), size=(11, 1.2 + 0.7 * len(picture.workers)))


def draw(picture: Picture, axes: Axes) -> None:
    """A row per worker, a colour per micro-batch, a hatch per phase; lines are hops."""
    from matplotlib.patches import Patch

    rows = {worker: -row for row, worker in enumerate(picture.workers)}

    def at(time_s: float) -> float:
        return 1e3 * (time_s - picture.begin_s)

    def is_long(event: Event) -> bool:
        return event.end_s - event.begin_s > 0.005 * (picture.end_s - picture.begin_s)

    for event in picture.events:
        sends = event.phase not in _HATCHES
        axes.broken_barh(
            [(at(event.begin_s), at(event.end_s) - at(event.begin_s))],
            (rows[event.worker] - _HEIGHT / 2, _HEIGHT),
            facecolor="#333333" if sends else _COLORS[event.micro_batch % len(_COLORS)],
            edgecolor="white",
            linewidth=0 if sends else 0.4,
            hatch=_HATCHES.get(event.phase),
        )
        if event.phase in ("q", "attend") and is_long(event):
            label = f"{chr(ord('A') + event.micro_batch)}{event.layer}"
            axes.text(at(event.begin_s), rows[event.worker] + _HEIGHT / 2, label,
                      fontsize=7, va="bottom", clip_on=True)  # fmt: skip
    for hop in picture.hops:
        down = rows[hop.sender] > rows[hop.receiver]
        ends = (-_HEIGHT / 2, _HEIGHT / 2) if down else (_HEIGHT / 2, -_HEIGHT / 2)
        axes.annotate(
            "",
            (at(hop.end_s), rows[hop.receiver] + ends[1]),
            (at(hop.begin_s), rows[hop.sender] + ends[0]),
            arrowprops={"arrowstyle": "-|>", "color": _COLORS[hop.micro_batch % len(_COLORS)],
                        "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=True,
        )  # fmt: skip
    axes.set_xlim(0.0, at(picture.end_s))
    axes.set_ylim(min(rows.values()) - 0.6, 0.7)
    axes.set_yticks([*rows.values()], [*rows])
    axes.set_xlabel("ms")
    micro_batches = sorted({event.micro_batch for event in picture.events})
    phases = [
        phase for phase in _HATCHES if any(e.phase == phase and is_long(e) for e in picture.events)
    ]
    handles = [
        Patch(facecolor=_COLORS[m % len(_COLORS)], label=f"micro-batch {chr(ord('A') + m)}")
        for m in micro_batches
    ]
    handles += [
        Patch(facecolor="#cccccc", edgecolor="white", hatch=_HATCHES[phase], label=phase)
        for phase in phases
    ]
    handles.append(Patch(facecolor="#333333", label="send"))
    axes.legend(handles=handles, ncols=len(handles), fontsize=7, loc="lower center",
                bbox_to_anchor=(0.5, 1.02), frameon=False)  # fmt: skip
