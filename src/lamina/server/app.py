"""The HTTP application: routes, keys and errors. `create_app` is all that others need."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from lamina import __version__
from lamina.errors import LaminaError
from lamina.server.body import BodyTooLarge, too_large_response
from lamina.server.chat import create_chat_completion
from lamina.server.completions import create_completion
from lamina.server.contract import ServingEngine
from lamina.server.errors import ApiError, error_response, http_error, json_response
from lamina.server.metrics import Metrics
from lamina.server.responses import ModelCard, ModelList
from lamina.server.serving import Serving
from lamina.server.settings import MAX_BODY_BYTES
from lamina.server.tokens import detokenize, tokenize

OPEN_PATHS = frozenset({"/health", "/metrics", "/version"})
"""Need no API key: monitors ask them."""

CLIENT_CLOSED_REQUEST = 499

_Endpoint = Callable[[Serving, Request], Awaitable[Response]]


def create_app(
    engine: ServingEngine,
    *,
    served_model_name: str,
    api_key: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    vllm_metrics: bool = False,
) -> FastAPI:
    """OpenAI's API over `engine`, which must have started and is not shut down here.

    `app.state.serving` is the `Serving` object, whose `interrupt` ends what is running.
    """
    metrics = Metrics(engine, served_model_name if vllm_metrics else None)
    serving = Serving(
        engine, model_name=served_model_name, metrics=metrics, max_body_bytes=max_body_bytes
    )
    # Bodies are read and checked by `server.body`, so a schema made from signatures would be empty.
    app = FastAPI(title="Lamina", version=__version__, openapi_url=None, redirect_slashes=False)
    app.state.serving = serving
    if api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=api_key)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(LaminaError, _on_lamina_error)
    app.add_exception_handler(Exception, _on_unknown_error)
    for path, endpoint in _POST.items():
        app.add_api_route(path, _handler(serving, endpoint), methods=["POST"])
    for path, endpoint in _GET.items():
        app.add_api_route(path, _handler(serving, endpoint), methods=["GET"])
    return app


class ApiKeyMiddleware:
    """Answers 401 unless the request carries `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._api_key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._allows(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1:
            return False
        scheme, _, key = values[0].partition(b" ")
        return hmac.compare_digest(key.strip(), self._api_key) and scheme.lower() == b"bearer"


async def _models(serving: Serving, request: Request) -> Response:
    return json_response(ModelList(data=[_card(serving)]))


async def _model(serving: Serving, request: Request) -> Response:
    serving.check_model(request.path_params["model_id"])
    return json_response(_card(serving))


def _card(serving: Serving) -> ModelCard:
    return ModelCard(
        id=serving.model_name,
        created=serving.created,
        max_model_len=serving.engine.model.max_model_len,
    )


async def _health(serving: Serving, request: Request) -> Response:
    health = serving.engine.health()
    if health.ok:
        return json_response({"status": "ok"})
    return json_response({"status": "unhealthy", "reason": health.reason}, 503)


async def _metrics(serving: Serving, request: Request) -> Response:
    return Response(serving.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})


async def _version(serving: Serving, request: Request) -> Response:
    return json_response({"version": __version__})


_POST: dict[str, _Endpoint] = {
    "/v1/completions": create_completion,
    "/v1/chat/completions": create_chat_completion,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
}
_GET: dict[str, _Endpoint] = {
    "/v1/models": _models,
    "/v1/models/{model_id:path}": _model,
    "/health": _health,
    "/metrics": _metrics,
    "/version": _version,
}


def _handler(serving: Serving, endpoint: _Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        try:
            return await endpoint(serving, request)
        except BodyTooLarge as error:
            return too_large_response(error)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    return handle


async def _on_lamina_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LaminaError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = f"{request.method} {request.url.path}: {str(error.detail).lower()}"
    return error_response(http_error(error.status_code, detail, error.headers))


async def _on_unknown_error(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "internal error; the server's log has the details"))
