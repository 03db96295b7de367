"""Request bodies: bounded in size, strict in type, with errors that name the field."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from lamina.errors import RequestError
from lamina.server.errors import ApiError

BODY_TIMEOUT_S = 60.0
"""How long a client may take to send its body."""
LINGER_S = 2.0
"""How long the rest of a refused body is thrown away, so that the client can read the answer."""

T = TypeVar("T", bound=msgspec.Struct)


class BodyTooLarge(ApiError):
    """The body is over the limit; raised before, or as soon as, more than that has arrived."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            413,
            f"the request body is larger than this server's limit of {limit_bytes} bytes",
            code="request_too_large",
            headers={"connection": "close"},
        )


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body of at most `limit_bytes`.

    Raises:
        BodyTooLarge: the announced or the received length is over the limit.
        ApiError: (408) the body did not arrive within `BODY_TIMEOUT_S`.
        ClientDisconnect: the client went away.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit_bytes:
        raise BodyTooLarge(limit_bytes)
    body = bytearray()
    try:
        async with (
            asyncio.timeout(BODY_TIMEOUT_S),
            contextlib.aclosing(request.stream()) as pieces,
        ):
            async for piece in pieces:
                body += piece
                if len(body) > limit_bytes:
                    raise BodyTooLarge(limit_bytes)
    except TimeoutError:
        raise ApiError(
            408,
            f"the request body did not arrive within {BODY_TIMEOUT_S:g} s",
            code="request_timeout",
            headers={"connection": "close"},
        ) from None
    return bytes(body)


def decode(body: bytes, kind: type[T]) -> T:
    """`body` as a `kind`; nothing is coerced but whole numbers where any number is meant.

    Raises:
        RequestError: not JSON, not an object, a missing field or a wrong type; `field` names it.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _type_error(str(error)) from None
    except UnicodeDecodeError:
        raise RequestError("the request body is not valid UTF-8") from None
    except RecursionError:
        raise RequestError("the request body is nested too deeply") from None
    except msgspec.DecodeError as error:
        _refuse_non_finite(body)
        raise RequestError(f"the request body is not valid JSON: {error}") from None


def _type_error(message: str) -> RequestError:
    """`Expected `int`, got `str` - at `$.stop[0]`` -> an error that starts with the field."""
    if missing := re.fullmatch(
        r"Object missing required field `(\w+)`(?: - at `\$\.(.+)`)?", message
    ):
        field, parent = missing.groups()
        if parent is None:
            return RequestError(f"{field} is missing", field)
        return RequestError(f"{parent}.{field} is missing", _top_level(parent))
    reason, _, path = message.partition(" - at `$")
    path = path.rstrip("`").removeprefix(".")
    if not path:
        return RequestError(f"the request body is wrong: {_lower_first(reason)}")
    return RequestError(f"{path} is wrong: {_lower_first(reason)}", _top_level(path))


def _top_level(path: str) -> str:
    return re.split(r"[.\[]", path, maxsplit=1)[0]


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _refuse_non_finite(body: bytes) -> None:
    """Python clients write NaN and Infinity, which are not JSON: name the field that holds one."""
    try:
        value = json.loads(body)
        fields = value.items() if isinstance(value, dict) else ()
        culprits = [field for field, content in fields if not _finite(content)]
    except (ValueError, RecursionError):
        return
    for field in culprits:
        raise RequestError(f"{field} must be a finite number; NaN and Infinity are not", field)


def _finite(value: Any) -> bool:
    match value:
        case float():
            return math.isfinite(value)
        case list():
            return all(map(_finite, value))
        case dict():
            return all(map(_finite, value.values()))
        case _:
            return True


class LingeringResponse(Response):
    """A response to a request whose body was not read to its end.

    Closing a connection with unread data resets it, and the client may lose the answer. So the
    answer is sent whole, then what still comes is thrown away for at most `LINGER_S`.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout(LINGER_S):
                while True:
                    message = await receive()
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        break
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def too_large_response(error: BodyTooLarge) -> Response:
    return LingeringResponse(
        msgspec.json.encode(error.body),
        error.status,
        error.headers,
        media_type="application/json",
    )
