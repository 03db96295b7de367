"""Speed of decode attention over paged memory, beside the machine's own reading of memory.

A case is a batch of sequences of one length whose pages lie at random places. What is timed is a
layer of a decode step as a worker runs it: `attend_cached`, then `finish`. Cases and plain reads of
as much memory take turns on the same threads, so that a slow minute of the machine hits both;
ratios are taken turn by turn.
"""

from __future__ import annotations

import random
import statistics
import time
from array import array
from collections.abc import Sequence

import msgspec
import torch

from lamina import _native
from lamina.attention.spec import AttentionSpec
from lamina.kv.pages import layer_specs
from lamina.types import ceil_div

LEAST_BYTES = 320 << 20
"""Keys and values that a pass reads, over as many layers as that takes: more than caches hold."""
_MOST_LAYERS = 1024
"""With less than 320 KiB per layer a pass reads less than that."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One shape of a decode step."""

    dtype: str
    """Of the model."""
    cache_dtype: str
    group: int
    """Query heads per KV head (G)."""
    context: int
    batch: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    threads: int
    head_dim_v: int | None = None
    """None: `head_dim`."""
    rows: int = 1
    """Of each sequence: 1 in a decode step, more in a prompt's chunk."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of a case: medians over the turns, and their range."""

    case: Case
    gb_per_s: float
    """Bytes of keys and values (and scales) that exist, per second."""
    gb_per_s_low: float
    gb_per_s_high: float
    read_gb_per_s: float
    """Plain reading, same threads, same turns."""
    ratio: float
    """Of the two, turn by turn."""
    ratio_low: float
    ratio_high: float
    tokens_per_s: float
    """Cached tokens attended to, times layers, per second."""
    layer_us: float


class Subject:
    """A case set up in memory: its layers hold tokens, their pages in random order."""

    def __init__(
        self, case: Case, pool: _native.ThreadPool, least_bytes: int = LEAST_BYTES
    ) -> None:
        self.case = case
        dim_k, dim_v = case.head_dim, case.head_dim_v or case.head_dim
        spec = AttentionSpec(
            layer=0,
            num_query_heads=case.kv_heads * case.group,
            num_kv_heads=case.kv_heads,
            head_dim_k=dim_k,
            head_dim_v=dim_v,
            scale=case.head_dim**-0.5,
        )
        scales_bytes = 8 if case.cache_dtype == "int8" else 0
        item_bytes = {"float32": 4, "int8": 1}.get(case.cache_dtype, 2)
        token_bytes = case.kv_heads * ((dim_k + dim_v) * item_bytes + scales_bytes)
        self.layer_bytes = case.batch * case.context * token_bytes
        held_bytes = self.layer_bytes or case.batch * case.rows * token_bytes
        self.num_layers = min(_MOST_LAYERS, ceil_div(least_bytes, held_bytes))
        pages_each = ceil_div(case.context + case.rows, case.page_tokens)
        num_pages = case.batch * pages_each
        self._native = _native.PagedAttention(
            layer_specs([spec] * self.num_layers, [None] * self.num_layers),
            case.dtype,
            case.cache_dtype,
            num_pages,
            case.page_tokens,
            pool,
        )
        self._pages = list(range(num_pages))
        random.Random(0).shuffle(self._pages)
        generator = torch.Generator().manual_seed(0)
        dtype: torch.dtype = getattr(torch, case.dtype)

        def rows(count: int, heads: int, dim: int) -> torch.Tensor:
            return torch.randn(count, heads, dim, generator=generator).to(dtype)

        prompt_k = rows(case.context, case.kv_heads, dim_k)
        prompt_v = rows(case.context, case.kv_heads, dim_v)
        for sequence in range(case.batch if case.context else 0):
            pages = self._pages[sequence * pages_each : (sequence + 1) * pages_each]
            step = self._begin([0], [case.context], [0], [pages])
            for layer in range(self.num_layers):
                self._native.finish(step, layer, prompt_k.data_ptr(), prompt_v.data_ptr(), 0)
        tables = [self._pages[i : i + pages_each] for i in range(0, num_pages, pages_each)]
        each, count = [case.rows] * case.batch, case.rows * case.batch
        self._step = self._begin(each, each, [case.context] * case.batch, tables)
        self._q = rows(count, case.kv_heads * case.group, dim_k)
        self._k, self._v = rows(count, case.kv_heads, dim_k), rows(count, case.kv_heads, dim_v)
        self._out = torch.empty(count, case.kv_heads * case.group, dim_v, dtype=dtype)

    def run(self) -> float:
        """All layers of one decode step; the seconds that took."""
        q, k, v, out = (x.data_ptr() for x in (self._q, self._k, self._v, self._out))
        native, step = self._native, self._step
        begin = time.perf_counter()
        for layer in range(self.num_layers):
            native.attend_cached(step, layer, q)
            native.finish(step, layer, k, v, out)
        return time.perf_counter() - begin

    def _begin(
        self,
        num_attending: list[int],
        num_stored: list[int],
        contexts: list[int],
        tables: list[list[int]],
    ) -> _native.StepSchedule:
        return self._native.begin(
            array("i", num_attending),
            array("i", num_stored),
            array("q", contexts),
            array("q", contexts),
            array("i", [0] * len(tables)),
            array("i", [len(table) for table in tables]),
            array("i", [page for table in tables for page in table]),
            False,
        )


def measure(cases: Sequence[Case], turns: int) -> list[Figure]:
    """Measure cases that all run on the same number of threads, interleaved with plain reads."""
    threads = {case.threads for case in cases}
    assert len(threads) == 1, "cases side by side share their threads"
    pool = _native.ThreadPool(threads.pop())
    reader = _native.MemoryReader(LEAST_BYTES, pool)
    subjects = [Subject(case, pool) for case in cases]
    for subject in subjects:
        subject.run()
    reader.read()
    seconds: list[list[float]] = [[] for _ in subjects]
    reads: list[list[float]] = [[] for _ in subjects]
    for _ in range(turns):
        for index, subject in enumerate(subjects):
            before = reader.read()
            seconds[index].append(subject.run())
            reads[index].append((before + reader.read()) / 2)
    return [
        _figure(subject, values, read_s, reader.size)
        for subject, values, read_s in zip(subjects, seconds, reads, strict=True)
    ]


def _figure(subject: Subject, seconds: list[float], read_s: list[float], read_bytes: int) -> Figure:
    num_bytes = subject.layer_bytes * subject.num_layers
    speeds = [num_bytes / value / 1e9 for value in seconds]
    read_speeds = [read_bytes / value / 1e9 for value in read_s]
    ratios = [mine / plain for mine, plain in zip(speeds, read_speeds, strict=True)]
    middle = statistics.median(seconds)
    case = subject.case
    return Figure(
        case=case,
        gb_per_s=statistics.median(speeds),
        gb_per_s_low=min(speeds),
        gb_per_s_high=max(speeds),
        read_gb_per_s=statistics.median(read_speeds),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        tokens_per_s=case.batch * case.context * subject.num_layers / middle,
        layer_us=1e6 * middle / subject.num_layers,
    )
