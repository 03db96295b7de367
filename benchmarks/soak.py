"""Load three processes on few cores for minutes, and check that nobody starves.

The engine and its attention workers (two by default) serve concurrent streams through the front
end's client; a stream that ends is followed by the next at once. Fails (exit code 1) if a request
ends in an error (a missed deadline, a lost worker), or if the slowest 1 % of the times between
tokens begins above 3 times the median.

    python benchmarks/soak.py --minutes 10 --json soak.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lamina import AsyncEngine, SamplingParams
from lamina.bench.options import parse_options, with_options
from lamina.bench.shapes import SHAPES, write_shape
from lamina.config import AttentionWorkerConfig, EngineConfig
from lamina.errors import LaminaError
from lamina.types import FinishReason

MOST_TIMES_MEDIAN = 3.0
"""p99 of the times between tokens over their median."""
_POLL_S = 0.5


@dataclass
class StreamLog:
    """What one stream of requests saw."""

    gaps_s: list[float] = field(default_factory=list)
    """Times between tokens of the same request, after the warm-up."""
    num_tokens: int = 0
    num_requests: int = 0
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Times between tokens of one stream, or of all."""

    stream: str
    num_requests: int
    num_tokens: int
    median_ms: float
    p99_ms: float
    max_ms: float

    @property
    def ratio(self) -> float:
        return self.p99_ms / self.median_ms


@dataclass(frozen=True, kw_only=True)
class Load:
    """How the engine is loaded."""

    num_streams: int
    prompt_tokens: int
    output_tokens: int
    """Most tokens of an answer; each has between half of it and all."""
    duration_s: float
    warmup_s: float


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summarise(name: str, logs: list[StreamLog]) -> Summary:
    gaps = [gap for log in logs for gap in log.gaps_s]
    if not gaps:
        raise SystemExit(f"soak: {name} measured no token; load for more --minutes")
    return Summary(
        stream=name,
        num_requests=sum(log.num_requests for log in logs),
        num_tokens=sum(log.num_tokens for log in logs),
        median_ms=1e3 * statistics.median(gaps),
        p99_ms=1e3 * percentile(gaps, 0.99),
        max_ms=1e3 * max(gaps),
    )


async def run_stream(engine: AsyncEngine, load: Load, log: StreamLog, seed: int) -> None:
    """One request after the other until it is cancelled or one fails."""
    generator = random.Random(seed)
    measure_from = time.perf_counter() + load.warmup_s
    while not log.errors:
        prompt = generator.choices(range(engine.model.vocab_size), k=load.prompt_tokens)
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=generator.randint((load.output_tokens + 1) // 2, load.output_tokens),
            ignore_eos=True,
        )
        before: float | None = None
        async for chunk in engine.generate(prompt, sampling):
            now = time.perf_counter()
            if chunk.finish_reason is FinishReason.ERROR:
                log.errors.append(chunk.error or "error without a message")
            if before is not None and before >= measure_from and chunk.token_ids:
                log.gaps_s.append(now - before)
            before = now
            log.num_tokens += len(chunk.token_ids)
        log.num_requests += 1


async def soak(config: EngineConfig, load: Load) -> list[StreamLog]:
    """Load the engine; its logs, with an error where one ended early."""
    logs = [StreamLog() for _ in range(load.num_streams)]
    engine = await AsyncEngine.start(config)
    print(f"engine: {engine.model.attention}", file=sys.stderr, flush=True)
    try:
        streams = [
            asyncio.create_task(run_stream(engine, load, log, seed))
            for seed, log in enumerate(logs)
        ]
        until = time.perf_counter() + load.duration_s
        while time.perf_counter() < until and not any(stream.done() for stream in streams):
            await asyncio.sleep(_POLL_S)
        health = engine.health()
        for stream in streams:
            stream.cancel()
        for log, outcome in zip(
            logs, await asyncio.gather(*streams, return_exceptions=True), strict=True
        ):
            if isinstance(outcome, LaminaError):
                log.errors.append(f"{type(outcome).__name__}: {outcome}")
            elif isinstance(outcome, Exception):
                raise outcome
        if not health.ok:
            logs[0].errors.append(f"unhealthy: {health.reason}")
    finally:
        await engine.shutdown()
    return logs


def print_summaries(summaries: list[Summary]) -> None:
    table = Table(title=f"Times between tokens, {os.cpu_count()} cores")
    for column in ("stream", "requests", "tokens", "median ms", "p99 ms", "max ms", "p99/median"):
        table.add_column(column, justify="right")
    for each in summaries:
        table.add_row(
            each.stream,
            str(each.num_requests),
            str(each.num_tokens),
            f"{each.median_ms:.1f}",
            f"{each.p99_ms:.1f}",
            f"{each.max_ms:.1f}",
            f"{each.ratio:.2f}",
        )
    Console().print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="of load (default: 10)")
    add("--warmup", type=float, default=20.0, help="seconds not measured at the start")
    add("--streams", type=int, default=8, help="concurrent requests (default: 8)")
    add("--workers", type=int, default=2, help="attention workers (default: 2)")
    add("--prompt-tokens", type=int, default=256)
    add("--output-tokens", type=int, default=512)
    add("--prefill-rows", type=int, default=32, help="prompt tokens beside a decode step")
    add("--deadline", type=float, default=5.0, help="step_deadline_s of the engine")
    add("--shape", default="qwen3-0.5b", choices=sorted(SHAPES), help="with random weights")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="of EngineConfig")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def make_config(arguments: argparse.Namespace, folder: Path) -> EngineConfig:
    config = EngineConfig(
        model=str(write_shape(arguments.shape, folder)),
        load_format="dummy",
        dtype="bfloat16",
        attention="remote",
        attention_workers=tuple(AttentionWorkerConfig() for _ in range(arguments.workers)),
        max_model_len=arguments.prompt_tokens + arguments.output_tokens + 64,
        max_num_seqs=arguments.streams,
        max_num_batched_tokens=arguments.streams + arguments.prefill_rows,
        step_deadline_s=arguments.deadline,
    )
    return with_options(config, parse_options(arguments.option, "--option"))


def main() -> None:
    arguments = parse_arguments()
    load = Load(
        num_streams=arguments.streams,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        duration_s=60 * arguments.minutes,
        warmup_s=arguments.warmup,
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            logs = asyncio.run(soak(make_config(arguments, Path(folder)), load))
    except LaminaError as error:
        raise SystemExit(f"soak: {error}") from None
    errors = [error for log in logs for error in log.errors]
    for error in errors:
        print(f"FAILED: {error}", file=sys.stderr)
    summaries = [summarise(str(index), [log]) for index, log in enumerate(logs) if log.gaps_s]
    total = summarise("all", logs)
    print_summaries([*summaries, total])
    if total.ratio > MOST_TIMES_MEDIAN:
        errors.append(f"p99 is {total.ratio:.2f} times the median, at most {MOST_TIMES_MEDIAN}")
        print(f"FAILED: {errors[-1]}", file=sys.stderr)
    if arguments.json:
        content = {
            "command": sys.argv,
            "errors": errors,
            "summaries": [asdict(summary) for summary in [*summaries, total]],
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
