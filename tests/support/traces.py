"""Where the public request traces lie; they are not part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).parents[3] / "shared" / "traces"


def trace_file(name: str) -> Path:
    """A trace's file; skips the test where the traces are absent."""
    folder = Path(os.environ.get("LAMINA_TRACES", _BESIDE))
    if not folder.is_dir():
        pytest.skip(f"no traces at {folder}; set LAMINA_TRACES to the folder that has them")
    return folder / name
