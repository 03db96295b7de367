"""What the server needs of an engine; `lamina.engine.client.AsyncEngine` has it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from lamina.engine.messages import EngineStats, ModelInfo
from lamina.engine.outputs import GenerationChunk
from lamina.types import SamplingParams


class HealthView(Protocol):
    """Whether the engine can serve, and if not why."""

    @property
    def ok(self) -> bool: ...
    @property
    def reason(self) -> str: ...


class ServingEngine(Protocol):
    """An engine that has started. Used from one event loop only."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Any:
        """A fast tokenizer of transformers, or None."""

    @property
    def stats(self) -> EngineStats:
        """The engine's last report; does not block."""

    def health(self) -> HealthView:
        """Does not block."""

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str | None = None,
    ) -> AsyncGenerator[GenerationChunk, None]:
        """Chunks of the `n` answers, interleaved; closing the iteration frees the pages.

        Raises, at the first iteration:
            RequestError: the request cannot be served, for instance a prompt that is too long.
            QueueFull: too many requests wait.
            EngineDead: the engine no longer serves (also later).
        """

    async def shutdown(self, grace_s: float = 5.0) -> int:
        """Stop the engine and its workers; its exit code, 0 if it was sound to the end."""
