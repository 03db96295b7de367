"""`lamina bench`: measurements as commands, one file each."""

from __future__ import annotations

import typer

from lamina.cli.bench import attention, decode, hop, serve

app = typer.Typer(help="Measure this machine.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure this machine."""


app.command()(attention.attention)
app.command()(decode.decode)
app.command()(hop.hop)
app.command()(serve.serve)
