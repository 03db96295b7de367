"""What measurements have in common: `--json`, `--plot`, lists of numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from lamina.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the figures as JSON to this file; -: print.")
]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", help="Write a plot to this PNG or SVG file.")
]


def numbers(text: str, option: str) -> list[int]:
    """`1,16` -> [1, 16]; ConfigError names the option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} must be numbers separated by commas, got {text!r}") from None


def write_json(figures: Any, file: Path) -> None:
    """Write what msgspec can encode, indented; to standard output if the file is `-`."""
    text = msgspec.json.format(msgspec.json.encode(figures), indent=2).decode()
    if str(file) == "-":
        print(text)
    else:
        file.write_text(text + "\n")


def write_plot(file: Path, draw: Callable[[Axes], None], *, size: tuple[float, float]) -> None:
    """Draw on fresh axes and write the picture.

    Args:
        size: width and height in inches.

    Raises:
        ConfigError: matplotlib is not installed, or the file's ending is unknown to it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib; install it with: pip install 'lamina-serve[plot]'"
        ) from None
    figure = Figure(figsize=size, layout="constrained")
    draw(figure.add_subplot())
    try:
        figure.savefig(file)
    except ValueError as error:
        raise ConfigError(f"--plot cannot write {file}: {error}") from None
