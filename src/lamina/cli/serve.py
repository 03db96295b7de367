"""`lamina serve`: the OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import gc
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import lamina.demo
from lamina.cli.options import with_engine_options
from lamina.config import EngineConfig

_SERVER = "Server"
DEMO_MODEL_NAME = "lamina-demo"


@with_engine_options
def serve(
    config: EngineConfig,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_SERVER)] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int, typer.Option(help="Port; 0: the system chooses.", rich_help_panel=_SERVER)
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="LAMINA_API_KEY",
            help="Clients must send it as Bearer token.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="Model name in the API; default: the folder's.", rich_help_panel=_SERVER),
    ] = None,
    max_body_bytes: Annotated[
        int, typer.Option(help="Largest request body.", rich_help_panel=_SERVER)
    ] = 4 * 2**20,
    vllm_metrics: Annotated[
        bool,
        typer.Option(help="Also export metrics under vLLM's names.", rich_help_panel=_SERVER),
    ] = False,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(rich_help_panel=_SERVER)
    ] = "warning",
) -> None:
    """Serve a model over the OpenAI HTTP API, its attention in separate worker processes."""
    from lamina.server.run import serve as run_server
    from lamina.server.settings import ServerConfig

    demo_folder = Path(lamina.demo.__file__).parent
    if served_model_name is None and demo_folder in Path(config.model).parents:
        served_model_name = DEMO_MODEL_NAME
    server = ServerConfig(
        host=host,
        port=port,
        api_key=api_key,
        served_model_name=served_model_name,
        max_body_bytes=max_body_bytes,
        vllm_metrics=vllm_metrics,
        log_level=log_level,
    )
    exit_code = asyncio.run(run_server(config, server))
    gc.freeze()  # the collection at exit would take a second to find that modules refer to modules
    sys.exit(exit_code)
