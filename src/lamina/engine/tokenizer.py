"""A model's tokenizer: text to ids, ids to text, chat templates, and the exact bytes of a token."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from lamina.errors import CheckpointError, RequestError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder; nothing is fetched from elsewhere.

    Raises:
        CheckpointError: the folder has no tokenizer, or one that cannot be read.
    """
    if not Path(path).is_dir():
        raise CheckpointError(f"there is no model folder {path}; give a Hugging Face checkpoint")
    # It takes seconds to import, and the engine's other half need not wait.
    from transformers import AutoTokenizer
    from transformers.utils import logging as log

    verbosity = log.get_verbosity()
    log.set_verbosity_error()  # of doubtful configs, which the engine's other half judges
    try:
        hf_tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the readers below raise whatever their file format suggests
        raise CheckpointError(
            f"cannot load a tokenizer from {path}: {_first_line(error)}; the folder needs "
            "tokenizer.json (or the model's own tokenizer files) and tokenizer_config.json"
        ) from error
    finally:
        log.set_verbosity(verbosity)
    return Tokenizer(hf_tokenizer)


class Tokenizer:
    """A transformers tokenizer with the few operations that serving needs.

    No method changes the tokenizer, so several threads may share it. `hf` is the transformers
    tokenizer itself.
    """

    def __init__(self, hf_tokenizer: Any) -> None:
        self.hf = hf_tokenizer
        self._special_ids = frozenset(
            token_id
            for token_id, token in hf_tokenizer.added_tokens_decoder.items()
            if token.special
        )
        backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        self._byte_level = "ByteLevel" in _decoder_types(decoder)
        self._bytes: dict[int, bytes] = {}
        self._anchor = self._find_anchor()

    def __len__(self) -> int:
        """Number of tokens; a model's vocabulary may be padded beyond it."""
        return len(self.hf)

    @property
    def has_chat_template(self) -> bool:
        return self.hf.chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that transformers would add.

        Raises:
            RequestError: the text cannot be tokenised (for example a lone surrogate).
        """
        try:
            ids: list[int] = self.hf.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeError) as error:
            raise RequestError(
                "prompt must be valid Unicode text without lone surrogates", "prompt"
            ) from error
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, by the tokenizer's own decoder and without clean-up of spaces."""
        text: str = self.hf.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_arguments: Any,
    ) -> list[int]:
        """Token ids of a conversation in the model's own format.

        Raises:
            RequestError: the model has no chat template, or the template refuses the messages.
        """
        if chat_template is None and not self.has_chat_template:
            raise RequestError(
                "this model has no chat template; use completions with a prompt, "
                "or a model whose folder has a chat template",
                "messages",
            )
        try:
            ids: list[int] = self.hf.apply_chat_template(
                [dict(message) for message in messages],
                tools=tools,
                chat_template=chat_template,
                tokenize=True,
                return_dict=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **template_arguments,
            )
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {_first_line(error)}",
                "messages",
            ) from error
        return ids

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves this token out."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int, *, at_start: bool = False) -> bytes:
        """The bytes that a token adds to the text; b"" for ids that the tokenizer does not know.

        Args:
            at_start: as the first token of the text, where some tokenizers drop a leading space.
        """
        if at_start and self._anchor:
            return self._first_token_bytes(token_id)
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._token_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """The text of one token; bytes that are no whole characters appear as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _token_bytes(self, token_id: int) -> bytes:
        token: str | None = self.hf.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if self._byte_level:
            byte_of = _byte_of_char()
            if all(char in byte_of for char in token):
                return bytes(byte_of[char] for char in token)
            return token.encode()  # an added token with other characters stands for itself
        if (byte := self._raw_byte(token)) is not None:
            return byte
        anchor_text = self.decode(self._anchor, skip_special_tokens=False)
        text = self.decode([*self._anchor, token_id], skip_special_tokens=False)
        return text.removeprefix(anchor_text).encode()

    def _first_token_bytes(self, token_id: int) -> bytes:
        token: str | None = self.hf.convert_ids_to_tokens(token_id)
        byte = self._raw_byte(token) if token is not None else None
        if byte is not None and byte >= b"\x80":
            return byte
        return self.decode([token_id], skip_special_tokens=False).encode()

    def _raw_byte(self, token: str) -> bytes | None:
        """The byte behind a token such as <0xE4>, if this tokenizer decodes it so."""
        match = _BYTE_TOKEN.fullmatch(token)
        if match is None or self.decode(self.hf.convert_tokens_to_ids([token])) == token:
            return None
        return bytes.fromhex(match.group(1))

    def _find_anchor(self) -> list[int]:
        """A token to decode others after, where the first token of a text is a special case."""
        if self._byte_level:
            return []
        for text in ("a", "e", "0", "."):
            for token_id in self.hf.encode(text, add_special_tokens=False)[-1:]:
                if self.decode([token_id]).endswith(text):
                    return [token_id]
        return []


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """The byte behind each printable character of a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}


def _decoder_types(decoder: Any) -> set[str]:
    """The names of a `tokenizers` decoder and of those in it."""
    if decoder is None:
        return set()
    found: set[str] = set()
    remaining: list[dict[str, Any]] = [json.loads(decoder.__getstate__())]
    while remaining:
        state = remaining.pop()
        found.add(state["type"])
        remaining.extend(state.get("decoders", ()))
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
