"""From what clients send to token ids: plain prompts, lists of them, and chats.

Tokenizers and templates run in a thread, so that a long prompt does not stop the other streams.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2

from lamina.engine.messages import ModelInfo
from lamina.errors import RequestError
from lamina.server.protocol import ChatMessage, TemplateFields


class Prompt(NamedTuple):
    """One prompt; `text` is what `echo` repeats, None where only the token ids are known."""

    token_ids: tuple[int, ...]
    text: str | None = None


class PromptReader:
    """Makes prompts for one model. `tokenizer`: a fast tokenizer of transformers, or None."""

    def __init__(self, tokenizer: Any, model: ModelInfo) -> None:
        self._tokenizer = tokenizer
        self._model = model

    async def completion(
        self, prompt: str | Sequence[str | int | Sequence[int]], num_answers: int
    ) -> list[Prompt]:
        """Every prompt of a completion request for `num_answers` answers to each, in order.

        Raises:
            RequestError: empty, mixed, more than the engine can ever hold, a token id outside the
                vocabulary, or no tokenizer.
        """
        parts = _split(prompt)
        self._limit_count(len(parts), num_answers)
        return [await self._one(part) for part in parts]

    async def chat(self, messages: Sequence[ChatMessage], fields: TemplateFields) -> Prompt:
        """The chat as the model's own template writes it.

        Raises:
            RequestError: no template, content that is not text, or the template refuses the chat.
        """
        conversation = [message.for_template(i) for i, message in enumerate(messages)]
        text = await asyncio.to_thread(self._render, conversation, fields)
        return Prompt(await self._encode(text, "messages", add_special_tokens=False), text)

    async def text(self, prompt: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of `prompt`, which may be none."""
        encode = self._need_tokenizer("prompt").encode
        return tuple(await asyncio.to_thread(encode, prompt, add_special_tokens=add_special_tokens))

    async def decode(self, token_ids: Sequence[int], field: str, *, skip_special: bool) -> str:
        self._check_ids(token_ids, field)
        decode = self._need_tokenizer(field).decode
        text = await asyncio.to_thread(
            decode,
            list(token_ids),
            skip_special_tokens=skip_special,
            clean_up_tokenization_spaces=False,
        )
        return str(text)

    def token_strs(self, token_ids: Sequence[int]) -> list[str]:
        return list(self._need_tokenizer("prompt").convert_ids_to_tokens(token_ids))

    def token_text(self, token_id: int) -> str:
        """One token on its own as text; empty without a tokenizer."""
        return "" if self._tokenizer is None else str(self._tokenizer.decode([token_id]))

    def special_ids(self) -> frozenset[int]:
        """Tokens that `skip_special_tokens` leaves out of texts."""
        if self._tokenizer is None:
            return frozenset()
        added = self._tokenizer.added_tokens_decoder
        return frozenset(token_id for token_id, token in added.items() if token.special)

    async def _one(self, prompt: str | Sequence[int]) -> Prompt:
        if isinstance(prompt, str):
            return Prompt(await self._encode(prompt, "prompt", add_special_tokens=True), prompt)
        if not prompt:
            raise RequestError("prompt is empty: it needs at least one token", "prompt")
        self._check_ids(prompt, "prompt")
        return Prompt(tuple(prompt))

    async def _encode(self, text: str, field: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        encode = self._need_tokenizer(field).encode
        ids = await asyncio.to_thread(encode, text, add_special_tokens=add_special_tokens)
        if not ids:
            raise RequestError(f"{field} is empty: it needs at least one token", field)
        return tuple(ids)

    def _render(self, conversation: list[dict[str, str]], fields: TemplateFields) -> str:
        tokenizer = self._need_tokenizer("messages")
        if fields.chat_template is not None:
            raise RequestError(
                "chat_template is not accepted from clients; the model's own is used",
                "chat_template",
            )
        if not tokenizer.chat_template:
            raise RequestError(
                "messages: this model has no chat template; use /v1/completions", "messages"
            )
        proceed = bool(fields.continue_final_message)
        generate = (
            not proceed if fields.add_generation_prompt is None else fields.add_generation_prompt
        )
        if proceed and generate:
            raise RequestError(
                "continue_final_message and add_generation_prompt cannot both be true",
                "continue_final_message",
            )
        extra = fields.chat_template_kwargs or {}
        if taken := _reserved(tokenizer) & extra.keys():
            raise RequestError(
                f"chat_template_kwargs must not contain {', '.join(sorted(taken))}",
                "chat_template_kwargs",
            )
        try:
            text = tokenizer.apply_chat_template(
                conversation,
                tokenize=False,
                add_generation_prompt=generate,
                continue_final_message=proceed,
                **extra,
            )
        except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise RequestError(
                f"messages: the model's chat template refuses them: {error}", "messages"
            ) from error
        return str(text)

    def _need_tokenizer(self, field: str) -> Any:
        if self._tokenizer is None:
            raise RequestError(
                f"{field}: this model has no tokenizer; send token ids as the prompt of "
                "/v1/completions",
                field,
            )
        return self._tokenizer

    def _check_ids(self, token_ids: Sequence[int], field: str) -> None:
        size = self._model.vocab_size
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < size:
                raise RequestError(
                    f"{field} has token id {token_id}, but ids run from 0 to {size - 1}", field
                )

    def _limit_count(self, num_prompts: int, num_answers: int) -> None:
        """A request over the engine's bound would be refused as `try again later` for ever."""
        most = self._model.max_num_seqs + self._model.max_num_waiting
        if num_prompts > 1 and num_prompts * num_answers > most:
            raise RequestError(
                f"prompt holds {num_prompts} prompts, which with n = {num_answers} is more than "
                f"the {most} answers that this server takes at once; send several requests",
                "prompt",
            )


def _split(prompt: str | Sequence[str | int | Sequence[int]]) -> list[str | Sequence[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt is empty", "prompt")
    kinds = {type(part) for part in prompt}
    if kinds == {int}:
        return [[part for part in prompt if isinstance(part, int)]]
    if len(kinds) > 1:
        raise RequestError(
            "prompt must be a string, a list of strings, a list of token ids or a list of lists "
            "of token ids, not a mixture",
            "prompt",
        )
    return [part for part in prompt if not isinstance(part, int)]


def _reserved(tokenizer: Any) -> set[str]:
    """Arguments of the template renderer itself, which are not for clients to set."""
    parameters = inspect.signature(tokenizer.apply_chat_template).parameters.values()
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
