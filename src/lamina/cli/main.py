"""The `lamina` command."""

from __future__ import annotations

import sys

import typer

from lamina import __version__
from lamina.cli.bench import app as bench_app
from lamina.cli.calibrate import calibrate
from lamina.cli.convert import convert
from lamina.cli.demo import demo
from lamina.cli.generate import generate
from lamina.cli.plan import plan
from lamina.cli.serve import serve
from lamina.cli.simulate import simulate
from lamina.errors import LaminaError

app = typer.Typer(
    name="lamina",
    help="Serve language models with attention and KV cache in other processes than the rest.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(generate)
app.command()(convert)
app.command()(demo)
app.command()(plan)
app.command()(simulate)
app.command()(calibrate)
app.add_typer(bench_app, name="bench")


@app.command()
def version() -> None:
    """Print Lamina's version."""
    print(__version__)


def main() -> None:
    """Run a command; errors that Lamina raises on purpose end in one line and exit code 1."""
    try:
        app()
    except LaminaError as error:
        sys.exit(f"lamina: {type(error).__name__}: {error}")
