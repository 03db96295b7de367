"""Time of a model's slices per step, attention left out: plain torch, native and Inductor.

    python tools/bench_slices.py --batch 1,16 --modes native,plain

Prints medians and the best step in milliseconds, and bytes of weights over the best time, which is
at most what the memory gives.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lamina._native import ThreadPool
from lamina.bench.shapes import SHAPES, write_shape
from lamina.convert import SlicedModel, convert

MODES = ("plain", "native", "compiled")


@torch.inference_mode()
def run_step(model: SlicedModel, num_rows: int, num_logits: int) -> float:
    """Seconds of one step of `num_rows` rows, the last `num_logits` of which yield logits."""
    spec = model.attention_specs[0]
    output = torch.zeros(num_rows, spec.num_query_heads, spec.head_dim_v, dtype=model.dtype)
    rows = torch.arange(num_rows)
    begin = time.perf_counter()
    state = model.begin(rows + 5, rows, rows[num_rows - num_logits :])
    for layer in range(model.num_layers):
        model.run_q(layer, state)
        model.run_kv(layer, state)
        model.run_deferred(layer, state)
        state.attention_output = output
    model.run_last(state)
    return time.perf_counter() - begin


def make_model(folder: Path, mode: str, pool: ThreadPool) -> SlicedModel:
    """The shape with random weights, optimized as `mode` says."""
    model = convert(folder, load_format="dummy")
    if mode != "plain":
        model.optimize(pool, compile=mode == "compiled")
    return model


def main() -> None:
    """Measure the modes interleaved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="qwen3-0.5b", choices=sorted(SHAPES))
    parser.add_argument("--batch", default="1,4,16", help="rows per step")
    parser.add_argument("--modes", default="plain,native", help=f"of {', '.join(MODES)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--one-logit", action="store_true", help="as in prefill: one row's logits")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pool = ThreadPool(arguments.threads)
    modes = arguments.modes.split(",")
    with tempfile.TemporaryDirectory() as folder:
        path = write_shape(arguments.shape, Path(folder))
        models = {mode: make_model(path, mode, pool) for mode in modes}
    for batch in map(int, arguments.batch.split(",")):
        num_logits = 1 if arguments.one_logit else batch
        times: dict[str, list[float]] = {mode: [] for mode in modes}
        for step in range(arguments.steps + 2):
            for mode, model in models.items():
                seconds = run_step(model, batch, num_logits)
                if step >= 2:
                    times[mode].append(seconds)
        for mode, seconds_of in times.items():
            passes = models[mode].passes
            best = min(seconds_of)
            rate = f", {passes.num_packed_bytes / best / 1e9:.1f} GB/s" if passes else ""
            print(
                f"batch {batch:4d} {mode:9s} median {1e3 * statistics.median(seconds_of):7.1f} ms, "
                f"best {1e3 * best:7.1f} ms{rate}",
                flush=True,
            )


if __name__ == "__main__":
    main()
