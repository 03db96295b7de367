"""From seconds per turn to figures, a table, JSON and a plot."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rows import Row

OURS = "lamina-"
"""Prefix of our deployments' names; everything else is a peer."""
MONOLITH = "lamina-local"
DISTURBED_CORES = 0.1
"""Other processes that use more than this make a figure worthless: peers' threads spin."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Speed over another subject's, turn by turn."""

    to: str
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One subject in one row."""

    row: str
    subject: str
    tokens_per_s: float
    """Median over the turns."""
    low: float
    high: float
    turns: tuple[float, ...]
    """Tokens per second of every turn."""
    foreign_cores: float
    """Cores that other processes (or the hypervisor) used during its turns, on average."""
    to_best_peer: Ratio | None
    """To the peer with the highest median in this row; None without peers."""
    to_monolith: Ratio | None
    """Of our other deployments to the monolithic one."""


def record(
    row: Row,
    tokens: int,
    seconds: Mapping[str, Sequence[float]],
    foreign_cores: Mapping[str, Sequence[float]],
) -> list[Result]:
    """The figures of one row.

    Args:
        tokens: that every subject computed in one turn.
        seconds: of every turn, by subject; equally many for all.
        foreign_cores: busy with something else in every turn, by subject.
    """
    speeds = {name: [tokens / value for value in values] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    peers = {name: value for name, value in medians.items() if not name.startswith(OURS)}
    best = max(peers, key=peers.__getitem__) if peers else None

    def ratio(name: str, other: str) -> Ratio:
        values = [ours / its for ours, its in zip(speeds[name], speeds[other], strict=True)]
        return Ratio(to=other, median=statistics.median(values), low=min(values), high=max(values))

    return [
        Result(
            row=str(row),
            subject=name,
            tokens_per_s=medians[name],
            low=min(values),
            high=max(values),
            turns=tuple(values),
            foreign_cores=statistics.mean(foreign_cores[name]),
            to_best_peer=ratio(name, best) if best else None,
            to_monolith=ratio(name, MONOLITH)
            if MONOLITH in speeds and name.startswith(OURS) and name != MONOLITH
            else None,
        )
        for name, values in speeds.items()
    ]


def print_table(results: Sequence[Result], versions: Mapping[str, str], threads: int) -> None:
    """One line per row and subject, in whole."""
    table = Table(title=f"{threads} threads per process, {machine()}")
    for column in ("row", "subject"):
        table.add_column(column, no_wrap=True)
    for column in ("tok/s", "low-high", "to best peer", "to monolithic"):
        table.add_column(column, justify="right", no_wrap=True)
    before = ""
    for result in results:
        if before and before != result.row:
            table.add_section()
        before = result.row
        is_best = result.to_best_peer is not None and result.to_best_peer.to == result.subject
        table.add_row(
            result.row,
            result.subject,
            f"{result.tokens_per_s:.1f}",
            f"{result.low:.1f}-{result.high:.1f}",
            "best peer" if is_best else str(result.to_best_peer or ""),
            str(result.to_monolith or ""),
        )
    console = Console()
    console = Console(width=max(console.width, 110))
    console.print(table)
    disturbed = [result for result in results if result.foreign_cores > DISTURBED_CORES]
    if disturbed:
        worst = max(disturbed, key=lambda result: result.foreign_cores)
        console.print(
            f"DISTURBED: {len(disturbed)} of {len(results)} figures; other processes used up to "
            f"{worst.foreign_cores:.1f} cores ({worst.row}, {worst.subject}). Measure again on an "
            "idle machine."
        )
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()))


def write_json(
    path: Path, results: Sequence[Result], versions: Mapping[str, str], command: Sequence[str]
) -> None:
    """All figures with every turn, and what they were measured on."""
    content = {
        "command": list(command),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": dict(versions),
        "results": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_plot(path: Path, results: Sequence[Result]) -> None:
    """One panel per row, one bar per subject, lines from the slowest to the fastest turn."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(dict.fromkeys(result.row for result in results))
    subjects = list(dict.fromkeys(result.subject for result in results))
    num_columns = min(4, len(rows))
    num_lines = -(-len(rows) // num_columns)
    figure, axes = pyplot.subplots(
        num_lines, num_columns, figsize=(3.4 * num_columns, 2.6 * num_lines), squeeze=False
    )
    for axis in axes.flat[len(rows) :]:
        axis.set_visible(False)
    for axis, row in zip(axes.flat, rows, strict=False):
        for result in (result for result in results if result.row == row):
            place = subjects.index(result.subject)
            reach = [[result.tokens_per_s - result.low], [result.high - result.tokens_per_s]]
            colour = "tab:blue" if result.subject.startswith(OURS) else "tab:gray"
            axis.barh(place, result.tokens_per_s, xerr=reach, color=colour, capsize=3)
        axis.set_title(row, fontsize=10)
        axis.set_yticks(range(len(subjects)), subjects if axis in axes[:, 0] else [])
        axis.set_ylim(len(subjects) - 0.5, -0.5)
        axis.tick_params(labelsize=8)
    figure.supxlabel("tokens/s, median; lines: slowest and fastest turn", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def machine() -> str:
    """The processor's name and the number of cores, as far as Linux says."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores"
