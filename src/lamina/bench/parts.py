"""The parts of a deployment, each measured by itself in a process of its own.

Processes of parts are told to begin, and asked for what they measured later, so that several can
run at the same time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import torch

from lamina import _native
from lamina.bench.attention import LEAST_BYTES, Case
from lamina.bench.attention import Subject as PagedAttention
from lamina.bench.subjects import Subject, SubjectProcess
from lamina.config import THREAD_ENVIRONMENT, EngineConfig
from lamina.convert import SlicedModel, convert
from lamina.engine.start import start_engine
from lamina.plan.layers import LayerCost, ModelCost
from lamina.types import EngineRequest, SamplingParams
from lamina.workers.process import limit_threads, pinned_pool

Interval = tuple[float, float]
"""Begin and end of something, seconds of the system's monotonic clock."""
Pass = tuple[float, float, float]
"""Begin and end, and how long a step of the whole model takes at that speed."""
Cores = tuple[int, tuple[int, ...]]
"""Number of threads, and the cores that they are kept to (none: any)."""
_PAGE_TOKENS = 64
_PROMPT_BYTES = 32 << 20


class Pools:
    """Threads of a process for each way to place them; one at a time is used."""

    def __init__(self) -> None:
        self._all = os.sched_getaffinity(0)
        self._pools: dict[Cores, _native.ThreadPool] = {}

    def use(self, where: Cores) -> _native.ThreadPool:
        """Threads there, and the calling one among them."""
        threads, cores = where
        os.sched_setaffinity(0, self._all)
        if where not in self._pools:
            limit_threads(threads)
            self._pools[where] = pinned_pool(threads, cores)
        if cores:
            os.sched_setaffinity(0, cores[:1] if len(cores) >= threads else cores)
        return self._pools[where]


class Part:
    """What runs in a `PartProcess`."""

    def close(self) -> None:
        """Called once at the end."""


class SlicesPart(Part):
    """Slices of models with random weights, attention left out."""

    def __init__(self, folders: Mapping[str, str], wheres: Sequence[Cores]) -> None:
        """
        Args:
            folders: of each model's config.json, by name.
        """
        self._pools = Pools()
        self._models: dict[tuple[str, Cores], SlicedModel] = {}
        for name, folder in folders.items():
            for where in wheres:
                pool = self._pools.use(where)
                model = convert(Path(folder), dtype="bfloat16", load_format="dummy")
                model.optimize(pool)
                self._models[name, where] = model

    @torch.inference_mode()
    def run(
        self, name: str, where: Cores, rows: int, logit_rows: int, steps: int, least_s: float = 0.0
    ) -> list[Interval]:
        """Steps one after the other, the last `logit_rows` of their rows yielding logits.

        Args:
            steps: at least so many, and as many as `least_s` seconds take.
        """
        self._pools.use(where)
        model = self._models[name, where]
        outputs = [
            torch.zeros(rows, spec.num_query_heads, spec.head_dim_v, dtype=model.dtype)
            for spec in model.attention_specs
        ]
        tokens = torch.arange(rows)
        intervals: list[Interval] = []
        stop_s = time.monotonic() + least_s
        while len(intervals) < steps or time.monotonic() < stop_s:
            begin = time.monotonic()
            state = model.begin(tokens % 7, tokens, tokens[rows - logit_rows :])
            for layer, output in enumerate(outputs):
                model.run_q(layer, state)
                model.run_kv(layer, state)
                model.run_deferred(layer, state)
                state.attention_output = output
            model.run_last(state)
            intervals.append((begin, time.monotonic()))
        return intervals


class AttentionPart(Part):
    """Attention of a model's step, all layers, over KV that no cache of the machine holds."""

    def __init__(self, model: ModelCost) -> None:
        self._pools = Pools()
        self._kinds: dict[LayerCost, int] = {}
        for layer in model.layers:
            self._kinds[layer] = self._kinds.get(layer, 0) + 1
        self._subjects: list[tuple[PagedAttention, float]] = []  # and the layers that each is for

    def prepare(self, where: Cores, share: int, batch: int, context: int, rows: int = 1) -> None:
        """Set up a batch in memory, instead of the last one.

        Args:
            share: of all heads, this executor has one in so many.
            context: tokens that every sequence has.
            rows: of each sequence in the step; more than 1: a prompt's chunk.
        """
        self._subjects.clear()
        pool = self._pools.use(where)
        for layer, count in self._kinds.items():
            case = _case(layer, share, batch, context, rows, where[0])
            subject = PagedAttention(case, pool, LEAST_BYTES if rows == 1 else _PROMPT_BYTES)
            subject.run()
            self._subjects.append((subject, count / subject.num_layers))

    def run(self, passes: int) -> list[Pass]:
        """Passes over what is prepared."""
        return [self._pass() for _ in range(passes)]

    def loop(self, seconds: float) -> list[Pass]:
        """Passes for so long."""
        stop_s = time.monotonic() + seconds
        passes = []
        while time.monotonic() < stop_s:
            passes.append(self._pass())
        return passes

    def read_bytes_per_s(self, where: Cores, passes: int) -> list[float]:
        """Plain reading of memory."""
        self._subjects.clear()
        reader = _native.MemoryReader(LEAST_BYTES, self._pools.use(where))
        return [reader.size / reader.read() for _ in range(passes)]

    def _pass(self) -> Pass:
        begin = time.monotonic()
        step_s = sum(subject.run() * layers for subject, layers in self._subjects)
        return begin, time.monotonic(), step_s


class Tokens(msgspec.Struct, frozen=True):
    """What an engine generated in a stretch of time."""

    seconds: float
    count: int
    gaps_s: list[float]
    """Times between a sequence's tokens, of all sequences."""
    context: float
    """Tokens of a sequence at the beginning, on average."""


class EnginePart(Part):
    """An engine in this process, its workers in their own, whose tokens are noted one by one: with
    several micro-batches in flight a step does not give all sequences a token."""

    def __init__(self, config: EngineConfig) -> None:
        self._started = start_engine(config)
        self._num_prompts = 0
        self._lengths: dict[str, int] = {}

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compute the prompts, forgetting earlier ones."""
        engine = self._started.engine
        for name in self._lengths:
            engine.abort(name)
        names = [f"{self._num_prompts + index}" for index in range(len(prompts))]
        self._num_prompts += len(prompts)
        self._lengths = {name: len(p) for name, p in zip(names, prompts, strict=True)}
        sampling = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        for name, prompt in zip(names, prompts, strict=True):
            engine.add(
                EngineRequest(
                    request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling, seed=0
                )
            )
        waiting = set(names)
        while waiting:
            waiting.difference_update(self._step())

    def record(self, num_tokens: int) -> Tokens:
        """Decode until every sequence has `num_tokens` more than at the beginning; the first is
        not counted, so that what was in flight before has had time to end."""
        last: dict[str, float] = {}
        counts = dict.fromkeys(self._lengths, -1)
        gaps: list[float] = []
        context = 0.0
        begin = now = time.monotonic()
        while min(counts.values()) < num_tokens:
            names = self._step()
            now = time.monotonic()
            for name in names:
                counts[name] += 1
                if context:
                    gaps.append(now - last[name])
                last[name] = now
            if not context and min(counts.values()) >= 0:
                begin, context = now, sum(self._lengths.values()) / len(self._lengths)
        return Tokens(now - begin, len(gaps), gaps, context)

    def close(self) -> None:
        self._started.close()

    def _step(self) -> list[str]:
        """The sequences that got a token."""
        names = []
        for output in self._started.engine.step():
            if output.token_ids and output.request_id in self._lengths:
                assert output.finish_reason is None, "the engine's max_model_len is too small"
                self._lengths[output.request_id] += 1
                names.append(output.request_id)
        return names


class EnginesPart(Part):
    """Engines that live for one measurement each."""

    def __init__(self) -> None:
        self._cores = os.sched_getaffinity(0)

    def gaps(
        self, config: EngineConfig, batches: Sequence[int], context: int, num_tokens: int
    ) -> list[list[float]]:
        """Times between tokens at each batch."""
        os.sched_setaffinity(0, self._cores)
        subject = EnginePart(config)
        try:
            found = []
            for batch in batches:
                subject.prefill([[1] * context] * batch)
                found.append(subject.record(num_tokens).gaps_s)
            return found
        finally:
            subject.close()


class PartProcess(SubjectProcess):
    """A part in a process of its own."""

    def __init__(self, name: str, make: Callable[..., Part], *arguments: object) -> None:
        super().__init__(name, cast("Callable[..., Subject]", make), arguments, THREAD_ENVIRONMENT)

    def call(self, method: str, *arguments: object) -> Any:
        """Call a method of the part there and wait for what it returns."""
        return self._call(method, *arguments)

    def start(self, method: str, *arguments: object) -> None:
        """Have a method called; `finish` waits for what it returns."""
        self._pipe.send((method, arguments))

    def finish(self) -> Any:
        return self._receive()


def _case(layer: LayerCost, share: int, batch: int, context: int, rows: int, threads: int) -> Case:
    return Case(
        dtype="bfloat16",
        cache_dtype="bfloat16",
        group=layer.query_heads // layer.kv_heads,
        context=int(layer.attended(context)),
        batch=batch,
        kv_heads=max(1, layer.kv_heads // share),
        head_dim=layer.head_dim_k,
        head_dim_v=layer.head_dim_v,
        page_tokens=_PAGE_TOKENS,
        threads=threads,
        rows=rows,
    )
