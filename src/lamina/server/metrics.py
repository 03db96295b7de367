"""Prometheus metrics of one server: requests as the front end sees them, pages and queues as the
engine last told. Every app has a registry of its own; nothing is global.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from lamina.engine.messages import PHASE_BUCKETS_S, PhaseHistogram
from lamina.engine.outputs import GenerationChunk
from lamina.server.contract import ServingEngine
from lamina.types import FinishReason

_TTFT_BUCKETS_S = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_TBT_BUCKETS_S = (
    0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5,
)  # fmt: skip
_REQUEST_BUCKETS_S = (
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0,
)  # fmt: skip


class Metrics:
    """Counters and histograms of one server; `render` is the page that Prometheus reads.

    Args:
        engine: asked for its statistics and health at every scrape.
        vllm_model_name: with a name, also export what has a counterpart in vLLM under vLLM's
            metric names, labelled with this model name.
    """

    def __init__(self, engine: ServingEngine, vllm_model_name: str | None = None) -> None:
        self.prompt_tokens = Counter(
            "lamina_prompt_tokens_total", "Prompt tokens of accepted requests", registry=None
        )
        self.generated_tokens = Counter(
            "lamina_generated_tokens_total", "Tokens generated", registry=None
        )
        self.requests = Counter(
            "lamina_requests_total",
            "Answers that ended (a request with n > 1 has several), by the reason",
            ["finish_reason"],
            registry=None,
        )
        for reason in FinishReason:
            self.requests.labels(reason.value)
        self.time_to_first_token = Histogram(
            "lamina_time_to_first_token_seconds",
            "From a request's hand-over to the engine to an answer's first token",
            buckets=_TTFT_BUCKETS_S,
            registry=None,
        )
        self.time_between_tokens = Histogram(
            "lamina_time_between_tokens_seconds",
            "Between consecutive tokens of one answer",
            buckets=_TBT_BUCKETS_S,
            registry=None,
        )
        self.request_time = Histogram(
            "lamina_request_seconds",
            "From a request's hand-over to the engine to the end of its last answer",
            buckets=_REQUEST_BUCKETS_S,
            registry=None,
        )
        collectors: list[Collector] = [
            _EngineCollector(engine),
            self.prompt_tokens,
            self.generated_tokens,
            self.requests,
            self.time_to_first_token,
            self.time_between_tokens,
            self.request_time,
        ]
        if vllm_model_name is not None:
            collectors.append(_VllmAliases(tuple(collectors), engine, vllm_model_name))
        self._registry = CollectorRegistry(auto_describe=False)
        for collector in collectors:
            self._registry.register(collector)

    def render(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class RequestMeter:
    """Measures one request from its hand-over to the engine on."""

    def __init__(self, metrics: Metrics, num_prompt_tokens: int, num_answers: int) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._start_s = time.perf_counter()
        self._accepted = False
        self._last_token_s: dict[int, float] = {}
        self._open = set(range(num_answers))

    def observe(self, chunk: GenerationChunk) -> None:
        now_s = time.perf_counter()
        metrics = self._metrics
        if not self._accepted:
            self._accepted = True
            metrics.prompt_tokens.inc(self._num_prompt_tokens)
        if chunk.token_ids:
            self._observe_tokens(chunk, now_s)
        if chunk.finish_reason is not None and chunk.index in self._open:
            self._end(chunk.index, chunk.finish_reason)
            if not self._open:
                metrics.request_time.observe(now_s - self._start_s)

    def close(self, failed: bool = False) -> None:
        """The request is over; answers without an end failed or were aborted.

        Nothing is counted for a request that the engine refused.
        """
        if failed and not self._accepted:
            return
        for index in tuple(self._open):
            self._end(index, FinishReason.ERROR if failed else FinishReason.ABORT)

    def _observe_tokens(self, chunk: GenerationChunk, now_s: float) -> None:
        num_tokens = len(chunk.token_ids)
        self._metrics.generated_tokens.inc(num_tokens)
        last_s = self._last_token_s.get(chunk.index)
        self._last_token_s[chunk.index] = now_s
        if last_s is None:
            self._metrics.time_to_first_token.observe(now_s - self._start_s)
            return
        for _ in range(num_tokens):
            self._metrics.time_between_tokens.observe((now_s - last_s) / num_tokens)

    def _end(self, index: int, reason: FinishReason) -> None:
        self._open.discard(index)
        self._metrics.requests.labels(reason.value).inc()


class _EngineCollector(Collector):
    """What the engine last reported, read at the scrape."""

    def __init__(self, engine: ServingEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        up = GaugeMetricFamily("lamina_engine_up", "1 while the engine can serve")
        up.add_metric([], float(self._engine.health().ok))
        running = GaugeMetricFamily("lamina_requests_running", "Sequences in the running batch")
        running.add_metric([], stats.num_running)
        waiting = GaugeMetricFamily("lamina_requests_waiting", "Sequences that wait for a place")
        waiting.add_metric([], stats.num_waiting)
        used = GaugeMetricFamily(
            "lamina_kv_pages_used", "KV pages in use, per attention executor", labels=["executor"]
        )
        total = GaugeMetricFamily(
            "lamina_kv_pages_total", "KV pages, per attention executor", labels=["executor"]
        )
        weight = GaugeMetricFamily(
            "lamina_attention_weight",
            "Share of new work of each attention worker, 0 to 1",
            labels=["executor"],
        )
        weights = sum(executor.weight or 0.0 for executor in stats.executors)
        for executor in stats.executors:
            if executor.weight is not None:
                weight.add_metric([executor.name], executor.weight / weights)
            used.add_metric([executor.name], executor.pages_used)
            total.add_metric([executor.name], executor.pages_total)
        preemptions = CounterMetricFamily(
            "lamina_preemptions_total", "Sequences that gave up their pages to be computed again"
        )
        preemptions.add_metric([], stats.preemptions_total)
        steps = CounterMetricFamily("lamina_engine_steps_total", "Steps that the engine ran")
        steps.add_metric([], stats.steps_total)
        seconds = CounterMetricFamily(
            "lamina_engine_seconds_total", "Where the engine's time went", labels=["phase"]
        )
        for phase, value in stats.seconds.items():
            seconds.add_metric([phase], value)
        yield from (up, running, waiting, used, total, preemptions, steps, seconds)
        yield weight
        yield _step_phases(stats.phases)


def _step_phases(phases: Mapping[str, PhaseHistogram]) -> Metric:
    family = HistogramMetricFamily(
        "lamina_step_phase_seconds",
        "Where the time of a step went, along its critical path; of a sample of the steps where "
        "they are short",
        labels=["phase"],
    )
    bounds = [*map(str, PHASE_BUCKETS_S), "+Inf"]
    for phase, histogram in phases.items():
        buckets = zip(bounds, accumulate(histogram.counts), strict=True)
        family.add_metric([phase], [*buckets], histogram.sum_s)
    return family


class _VllmAliases(Collector):
    """The same values under the names that vLLM's dashboards ask for."""

    _NAMES = {  # noqa: RUF012
        "lamina_requests_running": "vllm:num_requests_running",
        "lamina_requests_waiting": "vllm:num_requests_waiting",
        "lamina_prompt_tokens": "vllm:prompt_tokens",
        "lamina_generated_tokens": "vllm:generation_tokens",
        "lamina_requests": "vllm:request_success",
        "lamina_preemptions": "vllm:num_preemptions",
        "lamina_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
        "lamina_time_between_tokens_seconds": "vllm:inter_token_latency_seconds",
        "lamina_request_seconds": "vllm:e2e_request_latency_seconds",
    }
    _LABELS = {"finish_reason": "finished_reason"}  # noqa: RUF012

    def __init__(
        self, sources: Iterable[Collector], engine: ServingEngine, model_name: str
    ) -> None:
        self._sources = tuple(sources)
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        for source in self._sources:
            for family in source.collect():
                if name := self._NAMES.get(family.name):
                    yield self._renamed(family, name)
        executors = self._engine.stats.executors
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc",
            "Share of KV pages in use on the fullest executor; 1 is full",
            labels=["model_name"],
        )
        shares = [e.pages_used / e.pages_total for e in executors if e.pages_total]
        usage.add_metric([self._model_name], max(shares, default=0.0))
        yield usage

    def _renamed(self, family: Metric, name: str) -> Metric:
        out = Metric(name, family.documentation, family.type)
        for sample in family.samples:
            labels = {self._LABELS.get(key, key): value for key, value in sample.labels.items()}
            out.add_sample(
                name + sample.name.removeprefix(family.name),
                labels | {"model_name": self._model_name},
                sample.value,
            )
        return out
