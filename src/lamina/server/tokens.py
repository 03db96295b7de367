"""POST /tokenize and POST /detokenize, in vLLM's shapes."""

from __future__ import annotations

from fastapi import Request, Response

from lamina.errors import RequestError
from lamina.server.body import decode, read_body
from lamina.server.errors import json_response
from lamina.server.protocol import DetokenizeRequest, TokenizeRequest
from lamina.server.responses import Detokenized, Tokens
from lamina.server.serving import Serving


async def tokenize(serving: Serving, request: Request) -> Response:
    """Raises LaminaError for every refusal."""
    asked = decode(await read_body(request, serving.max_body_bytes), TokenizeRequest)
    serving.check_model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise RequestError("prompt or messages must be given, and not both", "prompt")
    if asked.messages is not None:
        ids = (await serving.prompts.chat(asked.messages, asked)).token_ids
    else:
        special = asked.add_special_tokens is not False
        ids = await serving.prompts.text(asked.prompt or "", add_special_tokens=special)
    return json_response(
        Tokens(
            count=len(ids),
            max_model_len=serving.engine.model.max_model_len,
            tokens=list(ids),
            token_strs=serving.prompts.token_strs(ids) if asked.return_token_strs else None,
        )
    )


async def detokenize(serving: Serving, request: Request) -> Response:
    """Raises LaminaError for every refusal."""
    asked = decode(await read_body(request, serving.max_body_bytes), DetokenizeRequest)
    serving.check_model(asked.model)
    text = await serving.prompts.decode(asked.tokens, "tokens", skip_special=False)
    return json_response(Detokenized(prompt=text))
