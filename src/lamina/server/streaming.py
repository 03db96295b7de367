"""Answers that take a while: they end when the client goes away, and may come as events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lamina.errors import LaminaError
from lamina.server.errors import to_api_error

T = TypeVar("T")

_DONE = b"data: [DONE]\n\n"


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects first.

    The request's body must have been read. Blocks until `work` has ended either way.

    Raises:
        ClientDisconnect: the client went away; else whatever `work` raises.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def event_stream(request: Request, bodies: AsyncGenerator[object, None]) -> Response:
    """Server-sent events, one JSON body each, closed by `[DONE]`.

    Waits for the first body, so that an error before it gets a status of its own. A later error is
    an event of its shape and the last one. `bodies` is closed when the response has ended, however
    it does.
    """
    try:
        first = await while_connected(request, _next(bodies))
    except BaseException:
        await bodies.aclose()
        raise
    return _EventStream(first, bodies)


class _EventStream(StreamingResponse):
    media_type = "text/event-stream"

    def __init__(self, first: object, bodies: AsyncGenerator[object, None]) -> None:
        self._bodies = bodies
        self._events = _events(first, bodies)
        super().__init__(
            self._events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._bodies.aclose()


async def _events(
    first: object, bodies: AsyncGenerator[object, None]
) -> AsyncGenerator[bytes, None]:
    try:
        yield _event(first)
        async for body in bodies:
            yield _event(body)
    except LaminaError as error:
        yield _event(to_api_error(error).body)
    else:
        yield _DONE


def _event(body: object) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def _next(bodies: AsyncGenerator[object, None]) -> object:
    return await anext(bodies)


async def _disconnected(request: Request) -> None:
    with contextlib.suppress(ClientDisconnect):
        while (await request.receive())["type"] != "http.disconnect":
            pass
