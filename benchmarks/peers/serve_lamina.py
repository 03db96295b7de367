"""Lamina as a subject: a deployment of the engine of this environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving import serve

import lamina
from lamina.bench.decode import lamina_config
from lamina.bench.options import with_options
from lamina.bench.subjects import LaminaSubject
from lamina.config import EngineConfig


def make_config(settings: dict[str, Any]) -> EngineConfig:
    """The benchmark's engine with the given options on top; ConfigError for unknown ones."""
    config = lamina_config(
        Path(settings["folder"]),
        num_workers=settings["workers"],
        batch=settings["batch"],
        length=settings["max_length"],
        num_threads=settings["threads"],
    )
    options = {
        "attention_memory_bytes": settings["kv_bytes"],
        # This process is stopped between its turns, which must not look like a lost worker.
        "heartbeat_timeout_s": 1e6,
        **settings["options"],
    }
    return with_options(config, options)


def make(settings: dict[str, Any]) -> LaminaSubject:
    return LaminaSubject(make_config(settings))


if __name__ == "__main__":
    serve(make, lamina.__version__)
