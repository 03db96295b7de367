"""Errors as OpenAI's servers shape them: {"error": {message, type, param, code}}."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import Response

from lamina.errors import CapacityError, EngineDead, LaminaError, QueueFull, RequestError

RETRY_AFTER_S = 1


class ApiError(LaminaError):
    """An answer other than 200. `param` is the field as the client sent it, `code` OpenAI's."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _kind(self.status),
                "param": self.param,
                "code": self.code,
            }
        }


class GenerationFailed(LaminaError):
    """The engine gave up on an accepted request; the message names the worker at fault."""


def to_api_error(error: LaminaError) -> ApiError:
    """The status and shape that a client gets to see for `error`."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=error.field)
        case QueueFull():
            return ApiError(
                429,
                str(error),
                code="rate_limit_exceeded",
                headers={"retry-after": str(RETRY_AFTER_S)},
            )
        case EngineDead():
            return ApiError(503, str(error), code="engine_dead")
        case CapacityError():
            return ApiError(503, str(error), code="out_of_capacity")
        case _:
            return ApiError(500, str(error), code="engine_error")


def json_response(
    body: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """`body` (structs, dicts, lists) as a JSON response."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def error_response(error: LaminaError) -> Response:
    answer = to_api_error(error)
    return json_response(answer.body, answer.status, answer.headers)


def http_error(status: int, detail: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """For statuses that the routing layer finds: unknown paths, wrong methods."""
    code = HTTPStatus(status).phrase.lower().replace(" ", "_")
    return ApiError(status, detail, code=code, headers=headers)


def _kind(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return "service_unavailable_error"
    return "server_error" if status >= 500 else "invalid_request_error"
