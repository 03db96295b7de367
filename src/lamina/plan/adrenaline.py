"""Adrenaline's evaluation (arXiv 2503.20552v1) on the simulator: one prefill, one decode instance.

ShareGPT is not at hand. The stand-in's mean output is the paper's own (tokens/s over requests/s
where all requests are served); its mean prompt is what makes a full decode instance hold the batch
that the baseline's throughput and time per token imply (1412 tokens/s x 47.5 ms = 67 sequences).
The lengths' spreads are assumed. Costs are the roofline with the default `Efficiency`.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from lamina.plan.arrivals import Workload
from lamina.plan.build import Builder, Settings
from lamina.plan.deployment import PrefillDecode, parse_deployment
from lamina.plan.hardware import load_devices
from lamina.plan.model import load_model
from lamina.plan.recorder import RequestTimes
from lamina.plan.simulate import simulate
from lamina.plan.synthetic import Lengths, synthetic
from lamina.sched.offload import Bounds

MODEL = "Llama-2-7B"
DEPLOYMENT = "pd:1xA100 80GB/1xA100 80GB"
RATIOS = (0.2, 0.4, 0.6, 0.7, 0.8, 1.0, 1.2)
SETTINGS = Settings(dtype="fp16")


class StandIn(msgspec.Struct, frozen=True, kw_only=True):
    """Lengths of a dataset that is not at hand."""

    name: str
    prompt: Lengths
    output: Lengths
    saturating_rate: float
    """Requests/s above what the deployment can serve."""


SHAREGPT = StandIn(
    name="ShareGPT (stand-in)",
    prompt=Lengths(kind="lognormal", mean=1260.0, spread=0.5),
    output=Lengths(kind="lognormal", mean=489.0, spread=0.8),
    saturating_rate=6.0,
)
OPENTHOUGHTS = StandIn(
    name="OpenThoughts (stand-in)",
    prompt=Lengths(kind="lognormal", mean=200.0, spread=0.5),
    output=Lengths(kind="lognormal", mean=1800.0, spread=0.5),
    saturating_rate=2.5,
)
"""Assumed: short questions, answers that fill much of the models' context of 4096 tokens."""
_MAX_TOKENS = 4096


class Digitised(msgspec.Struct, frozen=True, kw_only=True):
    """A point of the paper's figure, read off the picture: vLLM, Adrenaline."""

    requests_per_s: float
    ttft_s: tuple[float, float]
    tpot_ms: tuple[float, float]
    tokens_per_s: tuple[float, float]


FIGURE = (
    Digitised(requests_per_s=2.0, ttft_s=(0.5, 0.3), tpot_ms=(30.8, 22.4), tokens_per_s=(978, 978)),
    Digitised(
        requests_per_s=3.0, ttft_s=(2.0, 0.3), tpot_ms=(46.9, 30.2), tokens_per_s=(1360, 1466)
    ),
    Digitised(
        requests_per_s=3.6, ttft_s=(6.4, 0.5), tpot_ms=(47.5, 39.8), tokens_per_s=(1412, 1680)
    ),
    Digitised(
        requests_per_s=4.0, ttft_s=(10.6, 0.5), tpot_ms=(50.4, 47.7), tokens_per_s=(1346, 1791)
    ),
    Digitised(
        requests_per_s=4.6, ttft_s=(15.2, 1.2), tpot_ms=(55.9, 51.0), tokens_per_s=(1346, 1975)
    ),
)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One simulated run."""

    ttft_s: float
    tpot_ms: float
    tokens_per_s: float
    mean_batch: float
    offloaded_share: float
    """Of requests."""
    prefill_bandwidth: float
    """Shares of the peaks."""
    prefill_memory: float
    decode_compute: float


class RatePoint(msgspec.Struct, frozen=True, kw_only=True):
    """The two systems at one request rate, beside the paper's figure."""

    paper: Digitised
    without: Outcome
    offloading: Outcome


class RatioPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A fixed bound on offloaded work per local work, at saturation."""

    ratio: float
    outcome: Outcome


class RatioSweep(msgspec.Struct, frozen=True, kw_only=True):
    workload: str
    bounds: Bounds
    """What the policy itself would choose."""
    without: Outcome
    points: tuple[RatioPoint, ...]

    @property
    def best(self) -> RatioPoint:
        """The smallest ratio within 1 % of the highest throughput."""
        highest = max(p.outcome.tokens_per_s for p in self.points)
        return next(p for p in self.points if p.outcome.tokens_per_s >= 0.99 * highest)


def stand_in(dataset: StandIn, rate: float, num_requests: int) -> Workload:
    """Requests of these lengths; a prompt or output that leaves the model's context is cut."""
    drawn = synthetic(
        num_requests=num_requests,
        rate=rate,
        prompt=dataset.prompt,
        output=dataset.output,
        name=dataset.name,
    )
    return msgspec.structs.replace(
        drawn,
        arrivals=tuple(
            msgspec.structs.replace(
                a,
                prompt_tokens=(prompt := min(a.prompt_tokens, _MAX_TOKENS - 2)),
                output_tokens=min(a.output_tokens, _MAX_TOKENS - 1 - prompt),
            )
            for a in drawn.arrivals
        ),
    )


def rate_sweep(
    num_requests: int = 1000, progress: Callable[[str], None] | None = None
) -> list[RatePoint]:
    """With and without offloading over the figure's request rates."""
    points = []
    for paper in FIGURE:
        if progress is not None:
            progress(f"{paper.requests_per_s} requests/s")
        workload = stand_in(SHAREGPT, paper.requests_per_s, num_requests)
        points.append(
            RatePoint(
                paper=paper,
                without=_run(DEPLOYMENT, workload),
                offloading=_run(DEPLOYMENT + ",offload=auto", workload),
            )
        )
    return points


def ratio_sweep(
    dataset: StandIn, num_requests: int = 500, progress: Callable[[str], None] | None = None
) -> RatioSweep:
    """Throughput at saturation over the bound on offloaded work."""
    workload = stand_in(dataset, dataset.saturating_rate, num_requests)
    points = []
    for ratio in RATIOS:
        if progress is not None:
            progress(f"{dataset.name}, ratio {ratio}")
        points.append(
            RatioPoint(ratio=ratio, outcome=_run(f"{DEPLOYMENT},offload={ratio}", workload))
        )
    return RatioSweep(
        workload=dataset.name,
        bounds=policy_bounds(workload),
        without=_run(DEPLOYMENT, workload),
        points=tuple(points),
    )


def policy_bounds(workload: Workload) -> Bounds:
    """The policy's bounds for the paper's hardware and a workload."""
    deployment = parse_deployment(DEPLOYMENT + ",offload=auto", load_devices())
    assert isinstance(deployment, PrefillDecode)
    summary = workload.summary()
    builder = Builder(
        load_model(MODEL),
        SETTINGS,
        RequestTimes([0.0]),
        longest=summary.max_total_tokens,
        mean_context=summary.mean_decode_context,
        num_requests=1,
    )
    return builder.offload_bounds(deployment)


def _run(deployment: str, workload: Workload) -> Outcome:
    result = simulate(
        load_model(MODEL), parse_deployment(deployment, load_devices()), workload, SETTINGS
    )
    assert result.ttft_s is not None, "requests were served"
    assert result.tbt_s is not None, "tokens came"
    prefill, decode = result.pools
    return Outcome(
        ttft_s=result.ttft_s.mean,
        tpot_ms=1e3 * result.tbt_s.mean,
        tokens_per_s=result.tokens_per_s_while_arriving or result.tokens_per_s,
        mean_batch=result.mean_batch,
        offloaded_share=result.offloaded_share,
        prefill_bandwidth=prefill.bandwidth,
        prefill_memory=prefill.memory,
        decode_compute=decode.compute,
    )
