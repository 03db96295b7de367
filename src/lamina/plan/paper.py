"""Lamina's evaluation (arXiv 2405.01814v2, section 6) on the simulator: decode only, equal cost.

Nothing here is fitted: devices and prices are the paper's table, costs are the roofline with the
default `Efficiency`, requests are those of the traces, all there from the beginning, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from lamina.errors import ConfigError
from lamina.plan.arrivals import Workload
from lamina.plan.build import Builder, Settings
from lamina.plan.deployment import Deployment, Disaggregated, Monolithic, parse_deployment
from lamina.plan.hardware import load_devices
from lamina.plan.model import ModelCost, load_model
from lamina.plan.recorder import RequestTimes
from lamina.plan.results import Result
from lamina.plan.simulate import simulate
from lamina.plan.synthetic import Lengths, synthetic
from lamina.plan.traces import read_trace

GAIN_RANGE = (0.161, 0.901)
"""The paper's gains over its twelve cells."""
BATCH_RATIO = 2.39
"""The paper's mean batch over that of vLLM."""

MODELS = ("LLaMA-33B", "LLaMA-65B", "LLaMA3-70B")
CONFIGURATIONS = {
    "LLaMA-33B": ("mono:2xH100", "dop:1xH100/2xH20,depth=2"),
    "LLaMA-65B": ("mono:4xH100", "dop:2xH100/4xH20,depth=2"),
    "LLaMA3-70B": ("mono:4xH100", "dop:2xH100/4xH20,depth=2"),
}
TRACES = {
    "Azure-Conv": "azure_conv.csv.gz",
    "Azure-Code": "azure_code.csv.gz",
    "Kimi-Conv": "kimi_conv.csv.gz",
}
STAND_IN = "Kimi-TA (stand-in)"
SETTINGS = Settings(dtype="fp16", decode_only=True, at_once=True, max_num_seqs=4096)


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two equal-cost configurations, while requests waited."""

    deployment: str
    price_per_hour: float | None
    tokens_per_s: float
    mean_batch: float
    model_compute: float
    """Share of the model devices' peak, over the whole run."""
    attention_bandwidth: float
    """The same of the bandwidth of the devices with the KV."""
    num_preemptions: int


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One model and trace."""

    model: str
    workload: str
    num_requests: int
    num_left_out: int
    """Longer than one of the configurations can hold."""
    baseline: Side
    lamina: Side

    @property
    def gain(self) -> float:
        return self.lamina.tokens_per_s / self.baseline.tokens_per_s - 1

    @property
    def batch_ratio(self) -> float:
        return self.lamina.mean_batch / self.baseline.mean_batch


def workloads(traces: Path, num_requests: int | None = None) -> Iterator[Workload]:
    """The paper's traces; for Kimi-TA, which is not to be had, a stand-in of its published means
    with the spreads of Kimi-Conv.

    Args:
        traces: folder with the traces.
        num_requests: the first so many of each; None: all.

    Raises:
        ConfigError: a trace is missing or malformed.
    """

    def cut(workload: Workload) -> Workload:
        return workload if num_requests is None else workload.first(num_requests)

    for name, file in TRACES.items():
        if not (traces / file).is_file():
            raise ConfigError(f"trace {traces / file} is missing; give the folder of the traces")
        yield cut(msgspec.structs.replace(read_trace(traces / file), name=name))
    yield cut(
        synthetic(
            num_requests=23608,
            rate=23608 / 3600,
            prompt=Lengths(kind="lognormal", mean=8560.0, spread=1.313),
            output=Lengths(kind="lognormal", mean=182.1, spread=0.729),
            name=STAND_IN,
        )
    )


def cells(
    traces: Path,
    *,
    models: Iterable[str] = MODELS,
    num_requests: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Cell]:
    """Every model with every trace, in both configurations."""
    result = []
    for workload in workloads(traces, num_requests):
        for model in models:
            if progress is not None:
                progress(f"{model}, {workload.name}")
            result.append(cell(model, workload))
    return result


def cell(model_name: str, workload: Workload) -> Cell:
    model = load_model(model_name)
    devices = load_devices()
    sides = [parse_deployment(text, devices) for text in CONFIGURATIONS[model_name]]
    limit = min(longest_tokens(model, side, SETTINGS) for side in sides)
    fitting = tuple(a for a in workload.arrivals if a.prompt_tokens + a.output_tokens <= limit)
    kept = msgspec.structs.replace(workload, arrivals=fitting)
    baseline, lamina = (_side(simulate(model, side, kept, SETTINGS)) for side in sides)
    return Cell(
        model=model_name,
        workload=workload.name,
        num_requests=len(fitting),
        num_left_out=len(workload.arrivals) - len(fitting),
        baseline=baseline,
        lamina=lamina,
    )


def mean_batch_ratio(cells: Sequence[Cell]) -> float:
    """Over the cells, each counting the same."""
    return sum(c.batch_ratio for c in cells) / len(cells)


def longest_tokens(model: ModelCost, deployment: Deployment, settings: Settings) -> int:
    """Tokens of the longest sequence that a deployment can hold."""
    builder = Builder(
        model, settings, RequestTimes([0.0]), longest=2**40, mean_context=1.0, num_requests=1
    )
    match deployment:
        case Monolithic():
            site = builder.monolithic(deployment)
        case Disaggregated():
            site = builder.disaggregated(deployment)
        case _:
            site = builder.decode(deployment)
    return site.instance.batcher.max_model_len - 1


def _side(result: Result) -> Side:
    steady = result.saturated
    return Side(
        deployment=result.deployment,
        price_per_hour=result.price_per_hour,
        tokens_per_s=result.tokens_per_s if steady is None else steady.tokens_per_s,
        mean_batch=result.mean_batch if steady is None else steady.mean_batch,
        model_compute=result.pools[0].compute,
        attention_bandwidth=result.pools[-1].bandwidth,
        num_preemptions=result.num_preemptions,
    )
