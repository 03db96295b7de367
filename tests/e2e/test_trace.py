"""`--trace` and the phases in the metrics of a running server, over the real timeline."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lamina.engine.breakdown import PARTS
from support.servers import serving

NUM_TOKENS = 40
LAYERS = 3


def test_a_trace_of_a_server_that_is_interrupted(
    served_folder: Path, served_options: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "trace.json"
    with serving(
        str(served_folder), *served_options, "--attention-workers", "2", "--pipeline-depth", "2",
        "--trace", str(file),
    ) as server:  # fmt: skip
        with server.client() as client:
            body = {"model": "tiny", "prompt": [[5, 6, 7]] * 4, "max_tokens": NUM_TOKENS,
                    "temperature": 0, "ignore_eos": True}  # fmt: skip
            client.post("/v1/completions", json=body).raise_for_status()
        counts = server.metric("lamina_step_phase_seconds_count")
        assert len(counts) == len(PARTS)
        assert min(counts.values()) >= 16
        running = json.loads(file.read_text() + "]")  # readable while it is written
        server.interrupt()
        server.wait()
    events: list[dict[str, Any]] = json.loads(file.read_text())
    assert len(events) >= len(running)
    workers = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert workers >= {"engine", "attention-worker-1", "attention-worker-2"}
    phases = Counter(e["name"] for e in events if e["ph"] == "X")
    steps = {e["args"]["step"] for e in events if e["ph"] == "X"}
    assert len(steps) >= NUM_TOKENS
    assert phases["last slice 3"] == len(steps)
    for layer in range(LAYERS):
        assert phases[f"q {layer}"] == len(steps)
        assert phases[f"attend {layer}"] >= NUM_TOKENS
    kinds = Counter(e["ph"] for e in events)
    assert kinds["s"] == kinds["f"] > 0
    assert kinds["t"] == 2 * kinds["s"]
