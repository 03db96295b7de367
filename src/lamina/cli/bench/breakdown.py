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


def tables(title: str, figures: Sequence[Breakdown]) -> list[Table]:
    """For people: the parts of a step, and what the workers did."""
    from lamina.engine.breakdown import PARTS

    parts, workers = Table(title=f"Parts of a step, {title}, ms"), Table(title=f"Workers, {title}")
    for out in (parts, workers):
        out.add_column("batch x context", no_wrap=True)
        out.add_column("deployment", no_wrap=True)
    for column in ("step", *PARTS):
        parts.add_column(column, justify="right")
    for column in ("t_m ms", "t_a ms", "tok/s", "bound", "of it"):
        workers.add_column(column, justify="right")
    workers.add_column("bubbles")
    for f in figures:
        name = (f"{f.batch} x {f.context}", f.subject)
        parts.add_row(*name, f"{f.step_ms:.2f}", *(f"{f.parts_ms[part]:.2f}" for part in PARTS))
        workers.add_row(
            *name,
            f"{f.model_ms:.2f}",
            f"{f.attention_ms:.2f}",
            f"{f.tokens_per_s:.1f}",
            f"{f.bound_tokens_per_s:.1f}",
            f"{f.share_of_bound:.0%}",
            ", ".join(f"{worker} {1 - share:.0%}" for worker, share in f.busy.items()),
        )
    return [parts, workers]


def draw(figures: Sequence[Breakdown], axes: Axes) -> None:
    """Stacked bars, one per deployment and case, from top to bottom."""
    from lamina.engine.breakdown import PARTS

    names = [f"{f.subject}\n{f.batch} x {f.context}" for f in figures]
    left = [0.0] * len(figures)
    for part in PARTS:
        widths = [f.parts_ms[part] for f in figures]
        axes.barh(names, widths, 0.6, left=left, label=part, color=_COLORS[part])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("step, ms")
    axes.legend(ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False,
                fontsize=8)  # fmt: skip
