"""A shape small enough to be run in a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamina.bench.shapes import SHAPES
from support.families import save_tiny_model


@pytest.fixture
def tiny_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    save_tiny_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    monkeypatch.setitem(SHAPES, "tiny", config | {"dtype": "bfloat16"})
    return "tiny"
