"""What clients send: the request bodies of OpenAI's API with vLLM's extra sampling fields.

A field that is null counts as left out. Unknown fields are ignored, as OpenAI's servers do; known
fields that would change the answer but are not supported are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Protocol

import msgspec

from lamina.errors import RequestError
from lamina.types import SamplingParams

Int = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
"""Counts and token ids; the bounds keep them encodable, what they mean is checked elsewhere."""
Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]

_SAMPLING_FIELDS = (
    "n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "seed", "include_stop_str_in_output", "ignore_eos",
    "skip_special_tokens", "prompt_logprobs",
)  # fmt: skip


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True):
    """What completions and chat completions have in common."""

    model: str | None = None
    n: Int | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _sampling(self, **others: Any) -> SamplingParams:
        """Raises RequestError for values out of range."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream to be true", "stream_options")
        if self.logit_bias:
            raise RequestError("logit_bias is not supported", "logit_bias")
        values = {
            field: value
            for field in _SAMPLING_FIELDS
            if (value := getattr(self, field)) is not None
        }
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        ids = tuple(self.stop_token_ids or ())
        return SamplingParams(**(values | {"stop": stop, "stop_token_ids": ids} | others))


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | Int | list[Int]]
    echo: bool | None = None
    logprobs: Int | None = None
    best_of: Int | None = None
    suffix: str | None = None

    @property
    def only_echo(self) -> bool:
        """`max_tokens` 0 with `echo` asks for the prompt's own log-probabilities."""
        return bool(self.echo) and self.max_tokens == 0

    def sampling(self) -> SamplingParams:
        """Raises RequestError for values out of range or in conflict."""
        if self.suffix:
            raise RequestError("suffix is not supported", "suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of must be equal to n or left out", "best_of")
        others: dict[str, Any] = {"logprobs": self.logprobs}
        if self.echo and self.logprobs is not None:
            others["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        if self.only_echo:
            # The engine computes a prompt by generating after it; the token is not shown.
            others |= {"max_tokens": 1, "min_tokens": 0}
        return self._sampling(**others)


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: Annotated[str, msgspec.Meta(min_length=1)]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None

    def for_template(self, index: int) -> dict[str, str]:
        """What the chat template sees; raises RequestError for content that is not text."""
        where = f"messages[{index}]"
        if self.tool_calls:
            raise RequestError(f"{where}.tool_calls: tools are not supported", "messages")
        if self.content is None:
            raise RequestError(f"{where}.content is missing", "messages")
        message = {"role": self.role, "content": self._text(where)}
        return message if self.name is None else message | {"name": self.name}

    def _text(self, where: str) -> str:
        if isinstance(self.content, str):
            return self.content
        texts = []
        for i, part in enumerate(self.content or ()):
            if part.type != "text" or part.text is None:
                raise RequestError(
                    f'{where}.content[{i}] must be a part of type "text" with a text, '
                    f'got type "{part.type}"; other kinds are not supported',
                    "messages",
                )
            texts.append(part.text)
        return "\n".join(texts)


Messages = Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]


class TemplateFields(Protocol):
    """The fields beside the messages that decide how the chat template renders them."""

    @property
    def add_generation_prompt(self) -> bool | None: ...
    @property
    def continue_final_message(self) -> bool | None: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def chat_template_kwargs(self) -> dict[str, Any] | None: ...


class ResponseFormat(msgspec.Struct, frozen=True):
    type: str


class ChatRequest(SamplingFields, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: ResponseFormat | None = None

    def sampling(self) -> SamplingParams:
        """Raises RequestError for values out of range, in conflict or not supported."""
        for field in ("tools", "functions"):
            if getattr(self, field):
                raise RequestError(f"{field} are not supported; leave them out", field)
        if self.response_format is not None and self.response_format.type != "text":
            raise RequestError(
                f'response_format must be of type "text", got "{self.response_format.type}"; '
                "structured output is not supported",
                "response_format",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._sampling(
            max_tokens=most, logprobs=(self.top_logprobs or 0) if self.logprobs else None
        )

    @property
    def field_names(self) -> dict[str, str]:
        """How the client calls what SamplingParams and the engine name otherwise."""
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return names


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /tokenize: vLLM's, with either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[Int]
    model: str | None = None
