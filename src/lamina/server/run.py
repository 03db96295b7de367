"""`serve`: socket, engine and HTTP server from start to stop in one process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Generator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from lamina.config import EngineConfig
from lamina.errors import ConfigError
from lamina.server.app import create_app
from lamina.server.contract import ServingEngine
from lamina.server.serving import Serving
from lamina.server.settings import ServerConfig

StartEngine = Callable[[EngineConfig], Coroutine[Any, Any, ServingEngine]]

_CLOSE_TIMEOUT_S = 5
"""After all answers have ended: how long connections may take to close."""


async def serve(
    config: EngineConfig, server: ServerConfig, *, start_engine: StartEngine | None = None
) -> int:
    """Serve until SIGINT or SIGTERM; the process's exit code.

    The port is taken first, so that a conflict costs no start of an engine. When the engine fails
    later, the server stays and tells clients why. A second signal ends the grace of the first.

    Args:
        start_engine: starts an engine and returns it ready; default `AsyncEngine.start`.

    Returns:
        0 if the engine was sound to the end (or its start was interrupted), else 1.

    Raises:
        ConfigError: the address cannot be listened on.
        LaminaError: the engine cannot start; everything is closed again.
    """
    with contextlib.closing(listen(server.host, server.port)) as listener, _signals() as stop:
        engine = await _started((start_engine or _start_engine)(config), stop)
        if engine is None:
            return 0
        name = server.served_model_name or Path(config.model).name
        app = create_app(
            engine,
            served_model_name=name,
            api_key=server.api_key,
            max_body_bytes=server.max_body_bytes,
            vllm_metrics=server.vllm_metrics,
        )
        try:
            await _run_http(app, listener, server, stop, name)
        finally:
            sound = engine.health().ok
            exit_code = await engine.shutdown()
    return 0 if sound and exit_code == 0 else 1


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on `host`:`port`; the caller closes it.

    Listening, not only binding, is what keeps a second server from the same port.

    Raises:
        ConfigError: unknown host, port in use or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(
            f"host {host!r} is not an address of this machine: {error.strerror}"
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"port {port} on {host} cannot be used: {error.strerror}; "
            "choose another port, or 0 for any free one"
        ) from error
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket, host: str) -> str:
    """`http://HOST:PORT` with the port that the system gave."""
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _start_engine(config: EngineConfig) -> ServingEngine:
    from lamina.engine.client import AsyncEngine

    return await AsyncEngine.start(config)


class _Stop:
    """What signals ask for: `now` after the first, `hurry` after the second."""

    def __init__(self) -> None:
        self.now = asyncio.Event()
        self.hurry = asyncio.Event()

    def on_signal(self) -> None:
        if self.now.is_set():
            self.hurry.set()
        self.now.set()


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """Turns SIGINT and SIGTERM into `_Stop` for the duration of the block."""
    stop = _Stop()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stop.on_signal)
    try:
        yield stop
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _started(start: Coroutine[Any, Any, ServingEngine], stop: _Stop) -> ServingEngine | None:
    """The engine once it is ready; None if a signal came first and cancelled the start."""
    starting = asyncio.create_task(start)
    stopped = asyncio.create_task(stop.now.wait())
    try:
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return starting.result() if starting.done() else None
    finally:
        starting.cancel()
        stopped.cancel()
        await asyncio.gather(starting, stopped, return_exceptions=True)


class _HttpServer(uvicorn.Server):
    """uvicorn's server without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def _run_http(
    app: FastAPI, listener: socket.socket, server: ServerConfig, stop: _Stop, name: str
) -> None:
    """Answer requests until a signal, then end in three steps: no new connections, answers in
    progress get `shutdown_grace_s`, what is left ends with an error.
    """
    serving: Serving = app.state.serving
    http = _HttpServer(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            access_log=False,
            server_header=False,
            log_config=None,
            log_level=server.log_level,
            timeout_graceful_shutdown=int(server.shutdown_grace_s) + _CLOSE_TIMEOUT_S,
        )
    )
    running = asyncio.create_task(http.serve(sockets=[listener]))
    stopped = asyncio.create_task(stop.now.wait())
    print(f"lamina: serving {name} at {url_of(listener, server.host)}", file=sys.stderr, flush=True)
    await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    http.should_exit = True
    hurried = asyncio.create_task(stop.hurry.wait())
    await asyncio.wait(
        {running, hurried},
        timeout=server.shutdown_grace_s,
        return_when=asyncio.FIRST_COMPLETED,
    )
    hurried.cancel()
    serving.interrupt("the server is stopping")
    await running
