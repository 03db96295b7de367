"""`lamina bench decode --breakdown`: the papers' latency breakdown for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lamina.bench.breakdown import Breakdown

_COLORS = {
    "engine": "#8c8c8c",
    "model": "#3b6fb6",
    "send": "#8fb8de",
    "attention": "#d1783c",
    "network": "#e8c07d",
    "queue": "#c9c9c9",
    "bubble": "#f2dada",
}


def table(title: str, figures: Sequence[Breakdown]) -> Table:
    """For people: the parts in milliseconds, then what the workers did."""
    from lamina.engine.breakdown import PARTS

    out = Table(title=title)
    for column in ("batch", "context", "deployment"):
        out.add_column(column)
    for column in ("step ms", *PARTS, "t_m", "t_a", "tok/s", "bound", "of it"):
        out.add_column(column, justify="right")
    out.add_column("bubbles")
    for f in figures:
        out.add_row(
            str(f.batch),
            str(f.context),
            f.subject,
            f"{f.step_ms:.2f}",
            *(f"{f.parts_ms[part]:.2f}" for part in PARTS),
            f"{f.model_ms:.2f}",
            f"{f.attention_ms:.2f}",
            f"{f.tokens_per_s:.1f}",
            f"{f.bound_tokens_per_s:.1f}",
            f"{f.share_of_bound:.0%}",
            ", ".join(f"{worker} {1 - share:.0%}" for worker, share in f.busy.items()),
        )
    return out


def draw(figures: Sequence[Breakdown], axes: Axes) -> None:
    """Stacked bars, one per deployment and case."""
    from lamina.engine.breakdown import PARTS

    names = [f"{f.subject}\n{f.batch} x {f.context}" for f in figures]
    bottom = [0.0] * len(figures)
    for part in PARTS:
        heights = [f.parts_ms[part] for f in figures]
        axes.bar(names, heights, 0.6, bottom=bottom, label=part, color=_COLORS[part])
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylabel("step, ms")
    axes.legend()
