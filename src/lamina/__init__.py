"""Lamina serves language models with attention and KV cache on other devices than the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lamina.types import SamplingParams

if TYPE_CHECKING:
    from lamina.engine.client import AsyncEngine
    from lamina.engine.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncEngine", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # What needs torch is imported when it is used: the scheduler does without.
    if name == "LLM":
        from lamina.engine.llm import LLM

        return LLM
    if name == "AsyncEngine":
        from lamina.engine.client import AsyncEngine

        return AsyncEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
