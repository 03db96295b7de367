"""What several modules of end-to-end tests share, because starting it takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.servers import Server, save_served_model, serving

SERVED_OPTIONS = (
    "--served-model-name", "tiny",
    "--block-size", "8",
    "--max-num-seqs", "16",
    "--max-num-batched-tokens", "32",
    "--max-model-len", "96",
    "--num-threads", "1",
    "--worker-num-threads", "1",
)  # fmt: skip


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer and a chat template."""
    return save_served_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def served_options() -> tuple[str, ...]:
    """Model `tiny`, 96 tokens of context in pages of 8, steps of at most 16 requests."""
    return SERVED_OPTIONS


@pytest.fixture(scope="session")
def api_key() -> str:
    return "sesame"


@pytest.fixture(scope="session")
def monolith(served_folder: Path, api_key: str) -> Iterator[Server]:
    """A server that computes attention in its engine's own process, and asks for a key."""
    with serving(
        str(served_folder), *SERVED_OPTIONS, "--attention", "local", "--api-key", api_key
    ) as server:
        yield server
