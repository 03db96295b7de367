"""What a worker needs to join an engine: one line of text, in a file that only its owner reads."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

import msgspec

from lamina.errors import ConfigError

_LINE = re.compile(r"lamina-join-1 (\S{40}) ([0-9a-f]{64})")


class JoinToken(msgspec.Struct, frozen=True):
    """Proves the engine to a worker, and to the engine that the worker was invited."""

    server_public_key: str
    """CURVE key of the engine's control socket, z85, 40 characters; new at every start."""
    secret: str
    """32 random bytes, hexadecimal."""

    @classmethod
    def create(cls, server_public_key: str) -> JoinToken:
        """A token with a new secret."""
        return cls(server_public_key, secrets.token_hex(32))

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """The inverse of `line`; ConfigError for any other text."""
        match = _LINE.fullmatch(text.strip())
        if match is None:
            raise ConfigError(
                "not a join token: it is one line that starts with lamina-join-1; copy the token "
                "file that the engine wrote"
            )
        return cls(match.group(1), match.group(2))

    @property
    def line(self) -> str:
        """The token as one line of text, without a newline. Whoever has it can join."""
        return f"lamina-join-1 {self.server_public_key} {self.secret}"

    def save(self, path: str | Path) -> None:
        """Write the token to a file of mode 0600; ConfigError when that is not possible."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                os.fchmod(descriptor, 0o600)  # the file may have been there before
                file.write(self.line + "\n")
        except OSError as error:
            raise ConfigError(
                f"cannot write the join token to {path}: {error.strerror}; choose another file"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> JoinToken:
        """Read a token that `save` wrote; ConfigError names the file and what is wrong with it."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read the join token from {path}: {error}; copy the token file that the "
                "engine wrote"
            ) from error
        try:
            return cls.parse(text)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def __repr__(self) -> str:
        return "JoinToken(...)"
