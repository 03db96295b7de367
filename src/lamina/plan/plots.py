"""Pictures of a report; needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from lamina.errors import ConfigError
from lamina.plan.report import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (8.0, 4.5)
"""Inches."""
_PARTS = {
    "slices_s": ("slices", "#4477aa"),
    "attention_s": ("attention", "#ee6677"),
    "hops_s": ("hops", "#ccbb44"),
    "waiting_s": ("other micro-batches", "#bbbbbb"),
    "prompts_s": ("prompts", "#228833"),
}
_MOST_LINES = 6


def draw_cost(axes: Axes, report: Report) -> None:
    """Price against throughput, with the Pareto front."""
    priced = [
        (number, row.price_per_hour, row)
        for number, row in enumerate(report.rows, 1)
        if row.price_per_hour is not None
    ]
    if not priced and not report.front:
        _empty(axes, "no prices are known")
    for disaggregated, marker, label in (
        (False, "o", "together"), (True, "^", "attention disaggregated"),
    ):  # fmt: skip
        rows = [(price, row) for _, price, row in priced if row.disaggregated == disaggregated]
        if rows:
            axes.plot(
                [price for price, _ in rows], [row.tokens_per_s for _, row in rows], marker,
                label=label,
            )  # fmt: skip
    for number, price, row in priced:
        axes.annotate(
            str(number), (price, row.tokens_per_s), xytext=(5, 4), textcoords="offset points"
        )
    if report.front:
        axes.step(
            [point.price_per_hour for point in report.front],
            [point.tokens_per_s for point in report.front],
            where="post", color="black", linewidth=0.8, label="Pareto front",
        )  # fmt: skip
    axes.set_xlabel("price, $/h")
    axes.set_ylabel("tokens/s")
    axes.margins(0.08, 0.12)
    if priced or report.front:
        axes.legend(loc="lower right")
    axes.set_title(f"{report.model}: cost and throughput (numbers: rows of the table)")


def draw_bandwidth(axes: Axes, report: Report) -> None:
    """Bandwidth that disaggregated deployments need against their batch, and what there is."""
    rows = list({row.main: row for row in report.rows if row.needed_link}.values())[:_MOST_LINES]
    if not rows:
        _empty(axes, "no plan disaggregates attention from the model")
    for row in rows:
        (line,) = axes.plot(
            [batch for batch, _ in row.needed_link],
            [needed / 1e9 for _, needed in row.needed_link],
            label=row.main,
        )
        if row.link_bytes_per_s is not None:
            axes.axhline(row.link_bytes_per_s / 1e9, color=line.get_color(), linestyle=":")
    axes.set_xlabel("batch")
    axes.set_ylabel("GB/s")
    axes.set_ylim(bottom=0)
    if rows:
        axes.legend(fontsize="small")
    axes.set_title("Least bandwidth for 20 % of latency (dotted: what there is)")


def draw_breakdown(axes: Axes, report: Report) -> None:
    """Where the time between two tokens goes."""
    rows = list(enumerate(report.rows, 1))[::-1]
    left = [0.0] * len(rows)
    for part, (label, color) in _PARTS.items():
        widths = [1e3 * getattr(row.breakdown, part) for _, row in rows]
        axes.barh(range(len(rows)), widths, left=left, label=label, color=color)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(
        range(len(rows)), [f"{number}  {_short(row)}" for number, row in rows], fontsize="small"
    )
    axes.set_xlabel("ms per token")
    axes.legend(fontsize="small")
    axes.set_title("Time between tokens (numbers: rows of the table)")


PLOTS: dict[str, Callable[[Axes, Report], None]] = {
    "cost": draw_cost,
    "bandwidth": draw_bandwidth,
    "breakdown": draw_breakdown,
}


def svg(draw: Callable[[Axes, Report], None], report: Report) -> str:
    """A picture as an SVG element.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "pictures need matplotlib; install it with: pip install 'lamina-serve[plot]'"
        ) from None
    # Identifiers within a page must differ between its pictures, and not between two runs.
    with matplotlib.rc_context({"svg.hashsalt": draw.__name__}):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.add_subplot(), report)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    # Without the XML prolog, and without the description that points to outside addresses.
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _empty(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)


def _short(row: Row) -> str:
    return row.main if len(row.main) <= 44 else row.main[:41] + "..."
