"""`lamina generate`: one prompt, streamed to the terminal."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from lamina.cli.options import with_engine_options
from lamina.config import EngineConfig
from lamina.engine.client import AsyncEngine
from lamina.errors import EngineDead
from lamina.types import SamplingParams


@with_engine_options
def generate(
    config: EngineConfig,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Treat the prompt as a user's message.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option(help="0: off.")] = 0,
    sampling_seed: Annotated[int | None, typer.Option(help="Seed of the sampler.")] = None,
) -> None:
    """Continue one prompt and print the text as it comes."""
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=sampling_seed
    )
    asyncio.run(_stream(config, prompt, chat, sampling))


async def _stream(config: EngineConfig, prompt: str, chat: bool, sampling: SamplingParams) -> None:
    engine = await AsyncEngine.start(config)
    try:
        message = {"role": "user", "content": prompt}
        tokens = engine.chat_prompt([message]) if chat else prompt
        async for chunk in engine.generate(tokens, sampling):
            print(chunk.text, end="", flush=True)
            if chunk.error is not None:
                raise EngineDead(chunk.error)
        print()
    finally:
        await engine.shutdown()
