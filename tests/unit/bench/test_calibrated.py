"""From measurements to a profile: the arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from lamina.bench.calibrated import Grid, Samples, least_squares, make_profile
from lamina.bench.placements import hollow, placements
from lamina.plan.model import ModelCost, model_cost
from lamina.plan.profile import Profile

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}
MODEL: ModelCost = model_cost(CONFIG, name="small")
GRID = Grid(
    rows=(1, 8),
    prompt_rows=(64,),
    batches=(1, 4),
    contexts=(16, 64),
    before=(0, 32),
    beside_rows=(1, 8),
    beside=(1, 16),
    engine_rows=(1, 9),
    steps=1,
    engine_tokens=1,
    round_trips=1,
)


def measured() -> Samples:
    """A machine of two cores whose times are easy to tell apart."""
    samples = Samples()
    for threads in (1, 2):
        for rows in (1, 8, 64):
            samples.add(("slices", threads, rows), [rows / threads])
        for rows in (1, 9):
            samples.add(("hollow", threads, rows), [0.5])
        for before in (0, 32):
            samples.add(("prompt", threads, 64, before), [64.0 + before])
        samples.add(("read", threads), [1e9 * threads])
    for threads, workers in ((2, 1), (1, 2), (1, 1)):
        for batch in (1, 4):
            for context in (16, 64):
                seconds = batch * context / (threads * workers)
                samples.add(("attention", threads, workers, batch, context), [seconds])
    for rows in (1, 9):
        # Per step 0.1 s, per row 0.01 s beyond the slices; workers: 0.4 s more, half of it hidden.
        samples.add(("engine", "monolithic", 1, rows), [0.6 + 0.01 * rows])
        for name in ("shared", "pair", "apart"):
            samples.add(("engine", name, 1, rows), [1.0 + 0.01 * rows])
            samples.add(("engine", name, 2, rows), [2 * (0.8 + 0.01 * rows)])
    for name in ("shared", "pair", "apart"):
        samples.add(("slices beside", name, 1), [2.0])
        samples.add(("slices beside", name, 8), [0.9])
        samples.add(("attention beside", name, 1), [3.0])
    samples.add(("hop", "shm", 0), [1e-6])
    samples.add(("hop", "shm", 1000), [2e-6])
    return samples


def profile(samples: Samples | None = None) -> Profile:
    return make_profile(
        samples or measured(), MODEL, CONFIG, placements((4, 5)), GRID, ram_bytes=8_000, source="x"
    )


def test_parts_are_taken_as_measured() -> None:
    found = profile()
    two, one = found.slices_on("cpu-2", 1), found.slices_on("cpu-1", 1)
    assert two is not None
    assert one is not None
    assert (one.at(8), two.at(8), two.at(64)) == (8, 4, 32)
    pair = found.attention_on("cpu-1", 2)
    assert pair is not None
    assert pair.decode.at(4, 64) == 128
    assert pair.prompt is None, "prompts attend where the model is"
    alone = found.attention_on("cpu-2")
    assert alone is not None
    assert alone.prompt is not None
    assert alone.prompt.at(64, 32) == 96
    assert alone.prompt.at(32, 0) == 32, "half as many rows"
    (hop,) = found.hops
    assert (hop.latency_s, hop.bandwidth_bytes_per_s) == pytest.approx((1e-6, 1e9))


def test_medians_count() -> None:
    samples = measured()
    samples.add(("slices", 2, 8), [100.0, 4.0])
    curve = profile(samples).slices_on("cpu-2", 1)
    assert curve is not None
    assert curve.at(8) == 4


def test_what_the_engine_takes_beyond_its_parts() -> None:
    found = profile()
    assert found.step_overhead_s == pytest.approx(0.1)
    assert found.row_overhead_s == pytest.approx(0.01)
    beside = found.beside("cpu-2", 1, "cpu-1", 2)
    assert beside is not None
    bytes_per_row = MODEL.hop_bytes_per_row / 4
    assert beside.hop_s.sizes == (bytes_per_row, 9 * bytes_per_row)
    assert beside.hop_s.values == pytest.approx((0.1, 0.1)), "0.4 s over four layers"
    assert beside.hop_busy_s.values == pytest.approx((0.05, 0.05))
    assert beside.slices_slowdown.values == (2.0, 1.0), "nothing is faster side by side"
    assert beside.attention_slowdown.at(8) == 3.0


def test_devices_are_threads_of_the_machine() -> None:
    one, two = profile().devices
    assert (one.name, two.name) == ("cpu-1", "cpu-2")
    assert (one.memory_bytes, two.memory_bytes) == (4_000, 8_000)
    assert two.bandwidth_bytes_per_s == 2e9
    assert two.flops["bf16"] == pytest.approx(MODEL.slice_flops(64, 1) / 32)


def test_a_machine_of_one_core_has_no_cores_to_divide() -> None:
    assert list(placements((3,))) == ["monolithic", "shared"]
    found = placements((3, 4, 5))
    assert (found["apart"].cores, found["apart"].worker_cores) == ((3,), (4,))
    assert found["pair"].deployment(2) == "dop:cpu-3/2xcpu-1,depth=2"
    assert found["monolithic"].deployment() == "mono:cpu-3"


def test_lines_have_no_negative_parts() -> None:
    assert least_squares((1, 2, 3), (3, 5, 7)) == pytest.approx((1, 2))
    assert least_squares((1, 3), (2, 1)) == pytest.approx((1.5, 0))
    assert least_squares((1, 3), (0, 4)) == pytest.approx((0, 1))


def test_a_hollow_model_has_the_same_attention() -> None:
    small = model_cost(hollow(CONFIG), name="hollow")
    assert [layer.hop_elements_per_row for layer in small.layers] == [
        layer.hop_elements_per_row for layer in MODEL.layers
    ]
    assert sum(x.weight_params for x in small.layers) < 0.2 * sum(
        x.weight_params for x in MODEL.layers
    )
    nested = hollow({"model_type": "gemma3", "text_config": CONFIG})
    assert nested["text_config"]["intermediate_size"] == 64
