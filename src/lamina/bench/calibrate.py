"""Measures the parts of a model's steps on this machine, and makes a profile of them.

Measured are slices, attention, both while the other runs on the same machine, hops, and the engine
on a model of the same layers without its weights (`placements.hollow`): what its steps take beyond
slices and attention is the engine's own. Everything is measured again in every pass, medians over
all passes count; `bench predict` has its own measurements between them.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lamina.bench import hop
from lamina.bench.calibrated import Grid, Samples, make_profile
from lamina.bench.parts import (
    AttentionPart,
    Cores,
    EnginesPart,
    Interval,
    Part,
    PartProcess,
    Pass,
    SlicesPart,
)
from lamina.bench.placements import Placement, hollow, placed_config, placements
from lamina.plan.model import ModelCost, model_cost
from lamina.plan.profile import Profile

FULL = Grid(
    rows=(1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64),
    prompt_rows=(128, 512),
    batches=(1, 4, 16, 32),
    contexts=(64, 512, 2048),
    before=(0, 512, 2048),
    beside_rows=(1, 8, 16, 32, 64),
    beside=(8, 1024),
    engine_rows=(1, 8, 32),
    steps=3,
    engine_tokens=40,
    round_trips=2000,
)
QUICK = Grid(
    rows=(1, 8, 32),
    prompt_rows=(128,),
    batches=(1, 16),
    contexts=(64, 512),
    before=(0, 512),
    beside_rows=(1, 32),
    beside=(8, 512),
    engine_rows=(1, 8),
    steps=2,
    engine_tokens=8,
    round_trips=200,
)
_BESIDE_S = 0.3
"""Least time for which slices and attention run side by side."""
_CONTEXT = 16
"""Of the engine without weights."""


class Calibration:
    """The parts of a model, alive and ready to be measured. Close it to end their processes."""

    def __init__(
        self,
        config: dict[str, Any],
        name: str,
        *,
        cores: Sequence[int],
        grid: Grid = FULL,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Blocks until all parts are ready.

        Args:
            config: the Hugging Face config.
            cores: those to use.
            progress: is told of everything that is done.

        Raises:
            ConfigError: the model has no costs (`plan.configs`).
            EngineDead: a part ended; its error is printed.
        """
        self.model: ModelCost = model_cost(config, name=name)
        self.config = config
        self.grid = grid
        self.placements = placements(cores)
        self._cores = cores
        self._progress = progress
        self._samples = Samples()
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folders = {}
            for kind, content in (("full", config), ("hollow", hollow(config))):
                (folder / kind).mkdir()
                (folder / kind / "config.json").write_text(json.dumps(content))
                folders[kind] = str(folder / kind)
            self._hollow = Path(folders["hollow"])
            self._model_wheres = list(dict.fromkeys(_model(p) for p in self.placements.values()))

            def part(name: str, make: type[Part], *arguments: object) -> PartProcess:
                process = PartProcess(name, make, *arguments)
                stack.callback(process.close)
                return process

            num_workers = max(p.workers for p in self.placements.values())
            self._slices = part("slices", SlicesPart, folders, self._model_wheres)
            self._attention = [
                part(f"attention {index + 1}", AttentionPart, self.model)
                for index in range(num_workers)
            ]
            self._engines = part("engine", EnginesPart)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def measure(self) -> None:
        """One pass over slices, attention, and both side by side."""
        for where in self._model_wheres:
            self._measure_slices(where, self.grid.rows)
        attention: dict[tuple[int, int], Placement] = {}
        for placement in self.placements.values():
            attention[_executors(placement)] = placement
        for placement in attention.values():
            self._measure_attention(placement)
        for placement in self.placements.values():
            if placement.workers:
                self._measure_beside(placement)

    def measure_prompts(self) -> None:
        """Chunks of prompts, which attend where the model is, and the speed of memory."""
        passes = self.grid.steps
        for where in self._model_wheres:
            for rows in self.grid.prompt_rows:
                intervals = self._slices.call("run", "full", where, rows, 1, 1)
                self._samples.add(("slices", where[0], rows), _seconds(intervals))
                for before in self.grid.before:
                    self._attention[0].call("prepare", where, 1, 1, before, rows)
                    key = ("prompt", where[0], rows, before)
                    self._samples.add(key, [x[2] for x in self._attention[0].call("run", passes)])
            rates = self._attention[0].call("read_bytes_per_s", where, passes)
            self._samples.add(("read", where[0]), rates)
            self._progress(f"prompts, {where[0]} threads: done")

    def measure_hops(self) -> None:
        """Messages between two processes of this machine."""
        sizes = (0, 1 << 16, 1 << 20)
        cores = (self._cores[0], self._cores[1]) if len(self._cores) > 1 else None
        figures = hop.measure(
            ("shm", "tcp"), sizes, round_trips=self.grid.round_trips, turns=2, cores=cores,
            check=False,
        )  # fmt: skip
        for figure in figures:
            key = ("hop", figure.subject, figure.num_bytes)
            self._samples.add(key, [figure.median_us / 2e6])
        self._progress("hops: done")

    def measure_engine(self) -> None:
        """The engine without weights in every placement, with one and two micro-batches."""
        grid, samples = self.grid, self._samples
        for rows in grid.engine_rows:
            for where in self._model_wheres:
                seconds = self._run_slices("hollow", where, rows, rows, grid.engine_tokens)
                samples.add(("hollow", where[0], rows), seconds)
        for placement in self.placements.values():
            for depth in (1, 2) if placement.workers else (1,):
                most = depth * max(grid.engine_rows)
                config = placed_config(
                    self._hollow,
                    placement,
                    depth=depth,
                    batch=most,
                    length=_CONTEXT + 4 * grid.engine_tokens + most,
                    rows=max(512, most * _CONTEXT),
                )
                found = self._engines.call(
                    "gaps",
                    config,
                    [depth * rows for rows in grid.engine_rows],
                    _CONTEXT,
                    grid.engine_tokens,
                )
                for rows, gaps in zip(grid.engine_rows, found, strict=True):
                    samples.add(("engine", placement.name, depth, rows), gaps)
            self._progress(f"engine, {placement.name}: done")

    def profile(self, source: str) -> Profile:
        """What was measured so far; at least one pass, and the engine once.

        Args:
            source: where and when, for people.
        """
        return make_profile(
            self._samples,
            self.model,
            self.config,
            self.placements,
            self.grid,
            ram_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            source=source,
        )

    def _measure_slices(self, where: Cores, all_rows: Sequence[int]) -> None:
        for rows in all_rows:
            seconds = self._run_slices("full", where, rows, rows, self.grid.steps)
            self._samples.add(("slices", where[0], rows), seconds)
        self._progress(f"slices, {where[0]} threads: done")

    def _run_slices(
        self, model: str, where: Cores, rows: int, logit_rows: int, steps: int
    ) -> list[float]:
        """Seconds of steps after one that warms up."""
        intervals = self._slices.call("run", model, where, rows, logit_rows, steps + 1)
        return _seconds(intervals[1:])

    def _measure_attention(self, placement: Placement) -> None:
        where, workers = _worker(placement), max(1, placement.workers)
        for batch in self.grid.batches:
            for context in self.grid.contexts:
                self._prepare(placement, batch, context)
                passes = self._pass_together(workers)
                key = ("attention", where[0], workers, batch, context)
                self._samples.add(key, passes)
        self._progress(f"attention, {workers} x {where[0]} threads: done")

    def _prepare(self, placement: Placement, batch: int, context: int) -> None:
        where, workers = _worker(placement), max(1, placement.workers)
        for part in self._attention[:workers]:
            part.start("prepare", where, workers, batch, context)
        for part in self._attention[:workers]:
            part.finish()

    def _pass_together(self, workers: int) -> list[float]:
        """Seconds of a step while all workers pass over what they have prepared."""
        parts = self._attention[:workers]
        for part in parts:
            part.start("run", 2 + self.grid.steps * workers)
        found: list[list[Pass]] = [part.finish() for part in parts]
        return [x[2] for x in while_all_run(found)]

    def _measure_beside(self, placement: Placement) -> None:
        where, parts = _model(placement), self._attention[: placement.workers]
        self._prepare(placement, *self.grid.beside)
        attention_s = statistics.fmean(self._pass_together(placement.workers))
        for rows in self.grid.beside_rows:
            alone_s = statistics.fmean(self._run_slices("full", where, rows, rows, self.grid.steps))
            steps = self.grid.steps + 1
            least_s = _BESIDE_S + 2.5 * steps * alone_s
            for part in parts:
                part.start("loop", least_s)
            slices: list[Interval] = self._slices.call(
                "run", "full", where, rows, rows, steps, least_s
            )
            loops: list[list[Pass]] = [part.finish() for part in parts]
            begin_s, end_s = slices[0][0], slices[-1][1]
            beside_s = [x[2] for loop in loops for x in loop if x[0] > begin_s and x[1] < end_s]
            first_s, last_s = max(x[0][0] for x in loops), min(x[-1][1] for x in loops)
            slowed_s = _seconds(x for x in slices if x[0] > first_s and x[1] < last_s)
            for what, seconds, usual_s in (
                ("slices beside", slowed_s or _seconds(slices), alone_s),
                ("attention beside", beside_s or [x[2] for own in loops for x in own], attention_s),
            ):
                # Means: on shared cores the two take turns, so that single times say little.
                ratio = statistics.fmean(seconds) / usual_s
                self._samples.add((what, placement.name, rows), [ratio])
        self._progress(f"side by side, {placement.name}: done")


def while_all_run(passes: Sequence[Sequence[Pass]]) -> list[Pass]:
    """The passes of all workers that ran while every one of them did."""
    first_s = max(own[0][0] for own in passes)
    last_s = min(own[-1][1] for own in passes)
    found = [x for own in passes for x in own if x[0] >= first_s and x[1] <= last_s]
    return found or [x for own in passes for x in own]


def _seconds(intervals: Iterable[Interval]) -> list[float]:
    return [end - begin for begin, end in intervals]


def _model(placement: Placement) -> Cores:
    return placement.threads, placement.cores


def _worker(placement: Placement) -> Cores:
    """Where attention is computed."""
    if not placement.workers:
        return _model(placement)
    return placement.worker_threads, placement.worker_cores


def _executors(placement: Placement) -> tuple[int, int]:
    """Threads and number of them."""
    return _worker(placement)[0], max(1, placement.workers)
