"""How a worker's process shows itself: to the engine, and in `ps`."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

from lamina.transport.wire import Join

_SHORT_NAMES = {
    "attention-worker": "lamina-attn",
    "model-rank": "lamina-rank",
    "model-host": "lamina-host",
}


def describe_self(name: str, *, num_threads: int) -> Join:
    """What this process says of itself when it joins."""
    return Join(
        name=name,
        pid=os.getpid(),
        host=platform.node(),
        device="cpu",
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        num_threads=num_threads,
    )


def show_name(name: str) -> None:
    """Be `lamina-attn-1` and not just another `python` in `ps` and `top` (15 characters at most).

    Linux only; no other system has the file.
    """
    for long, short in _SHORT_NAMES.items():
        name = name.replace(long, short)
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)
