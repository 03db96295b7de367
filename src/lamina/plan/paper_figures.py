"""What Lamina's paper computes or measures besides throughput, as rooflines and short simulations.

Utilisation against batch (figures 2 and 3), bandwidth needed against batch (figure 4), degrees of
parallelism with their cost (figure 11), and the batch at which the model workers are saturated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from lamina.plan.arrivals import Workload
from lamina.plan.cost import (
    AttentionCost,
    Devices,
    Efficiency,
    SliceCost,
    min_bandwidth_bytes_per_s,
)
from lamina.plan.deployment import Disaggregated, parse_deployment
from lamina.plan.hardware import Device, find_device, load_devices
from lamina.plan.model import ModelCost, load_model
from lamina.plan.paper import SETTINGS
from lamina.plan.results import Result
from lamina.plan.simulate import simulate
from lamina.plan.step import StepCost, StepLoad, round_s

MODEL = "LLaMA3-70B"
ALPHA = 0.2
BATCHES = (1, 10, 50, 100, 200, 300, 400, 600, 800)
DOPS = ("1/2", "2/2", "2/4", "2/6", "2/8", "4/4", "4/8")
"""Model devices / attention devices of the sweep."""


class Utilisation(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of a device's peaks at a batch: the paper's figures 2 (slices) and 3 (attention)."""

    batch: int
    slices_s: float
    slices_compute: float
    slices_bandwidth: float
    attention_s: float
    attention_compute: float
    attention_bandwidth: float


def utilisation(
    context: int = 4096,
    *,
    model_name: str = MODEL,
    model_device: str = "H100",
    attention_device: str = "H20",
    batches: Sequence[int] = BATCHES,
) -> list[Utilisation]:
    """One device for the slices (as if the weights fitted on it), one for attention."""
    model, devices = load_model(model_name), load_devices()
    compute, memory = find_device(model_device, devices), find_device(attention_device, devices)
    slices, attention = _costs(model, compute, memory)
    points = []
    for batch in batches:
        slices_s = slices.seconds(batch)
        attention_s = attention.seconds(batch, batch * context)
        flops, num_bytes = attention.work(batch, batch * context)
        points.append(
            Utilisation(
                batch=batch,
                slices_s=slices_s,
                slices_compute=model.slice_flops(batch)
                / slices_s
                / compute.flops_for(SETTINGS.dtype),
                slices_bandwidth=model.slice_bytes(batch)
                / slices_s
                / compute.bandwidth_bytes_per_s,
                attention_s=attention_s,
                attention_compute=flops / attention_s / memory.flops_for(SETTINGS.dtype),
                attention_bandwidth=num_bytes / attention_s / memory.bandwidth_bytes_per_s,
            )
        )
    return points


def _costs(
    model: ModelCost, compute: Device, memory: Device, a: int = 1, b: int = 1
) -> tuple[SliceCost, AttentionCost]:
    e = Efficiency()
    return (
        SliceCost(model, Devices(device=compute, count=a), dtype=SETTINGS.dtype, efficiency=e),
        AttentionCost(model, Devices(device=memory, count=b), dtype=SETTINGS.dtype, efficiency=e),
    )


class Bandwidth(msgspec.Struct, frozen=True, kw_only=True):
    """Least link bandwidth that adds at most a fraction alpha to a step."""

    batch: int
    context: int
    dop: tuple[int, int]
    bytes_per_s: float


def bandwidths(
    dops: Sequence[tuple[int, int]] = ((1, 1), (2, 4)),
    contexts: Sequence[int] = (4096, 8192),
    batches: Sequence[int] = (1, 50, 100, 150, 200, 250, 300),
) -> list[Bandwidth]:
    """The paper's figure 4: LLaMA3-70B on H100 and H20, alpha 0.2."""
    model, devices = load_model(MODEL), load_devices()
    points = []
    for a, b in dops:
        slices, attention = _costs(model, devices["H100"], devices["H20"], a, b)
        for context in contexts:
            for batch in batches:
                bytes_per_s = min_bandwidth_bytes_per_s(
                    model,
                    batch,
                    slices.seconds(batch),
                    attention.seconds(batch, batch * context),
                    alpha=ALPHA,
                )
                points.append(
                    Bandwidth(batch=batch, context=context, dop=(a, b), bytes_per_s=bytes_per_s)
                )
    return points


class Dop(msgspec.Struct, frozen=True, kw_only=True):
    """One degree of parallelism at saturation."""

    dop: tuple[int, int]
    price_per_hour: float
    tokens_per_s: float
    mean_batch: float
    tokens_per_dollar: float
    model_compute: float
    attention_bandwidth: float


def dop_sweep(
    workload: Workload,
    *,
    model_name: str = MODEL,
    dops: Sequence[str] = DOPS,
    progress: Callable[[str], None] | None = None,
) -> list[Dop]:
    """Throughput and cost over degrees of parallelism (figure 11), H100 and H20; those on which the
    model does not fit are left out."""
    model, devices = load_model(model_name), load_devices()
    points = []
    for dop in dops:
        a, b = (int(part) for part in dop.split("/"))
        deployment = parse_deployment(f"dop:{a}xH100/{b}xH20,depth=2", devices)
        usable = a * devices["H100"].memory_bytes * SETTINGS.efficiency.memory
        if model.weight_bytes() >= usable:
            continue
        if progress is not None:
            progress(f"{model_name}, DOP ({a}, {b})")
        points.append(_dop((a, b), simulate(model, deployment, workload, SETTINGS)))
    return points


def _dop(dop: tuple[int, int], result: Result) -> Dop:
    steady = result.saturated
    rate = result.tokens_per_s if steady is None else steady.tokens_per_s
    price = result.price_per_hour
    assert price is not None, "the paper's devices have prices"
    return Dop(
        dop=dop,
        price_per_hour=price,
        tokens_per_s=rate,
        mean_batch=result.mean_batch if steady is None else steady.mean_batch,
        tokens_per_dollar=rate * 3600 / price,
        model_compute=result.pools[0].compute,
        attention_bandwidth=result.pools[-1].bandwidth,
    )


class Saturation(msgspec.Struct, frozen=True, kw_only=True):
    """A disaggregated step at a batch, without the workload's ups and downs."""

    batch: int
    step_s: float
    tokens_per_s: float
    compute: float
    """Share of the model devices' peak."""
    compute_reachable: float
    """The same of what the efficiency lets them reach."""


def saturation(
    deployment: str = "dop:2xH100/4xH20,depth=2",
    *,
    model_name: str = MODEL,
    context: float = 1227.0,
    batches: Sequence[int] = (100, 200, 300, 400, 500, 600, 700, 800, 1000),
) -> list[Saturation]:
    """Throughput over the batch: where the model workers are saturated.

    Args:
        context: of each sequence; the default is Azure-Conv's mean over decode steps.
    """
    model, parsed = load_model(model_name), parse_deployment(deployment, load_devices())
    assert isinstance(parsed, Disaggregated)
    pool = parsed.attention[0]
    cost = StepCost(
        model,
        Devices(device=parsed.model.device, count=parsed.num_ranks),
        {1: Devices(device=pool.device, count=pool.count)},
        dtype=SETTINGS.dtype,
        efficiency=SETTINGS.efficiency,
        num_replicas=parsed.replicas,
    )
    e = SETTINGS.efficiency.compute
    points = []
    for batch in batches:
        rows = batch // parsed.depth
        load = StepLoad(
            rows=rows,
            logit_rows=rows,
            attending={1: float(rows)},
            attended={1: rows * context},
        )
        times = cost.times(load)
        step_s = cost.step_s(round_s(times, [times] * (parsed.depth - 1), parsed.replicas))
        rate = rows * parsed.depth / step_s
        flops = rate * model.slice_flops(1)
        compute = flops / (parsed.model.device.flops_for(SETTINGS.dtype) * parsed.model.count)
        points.append(
            Saturation(
                batch=batch,
                step_s=step_s,
                tokens_per_s=rate,
                compute=compute,
                compute_reachable=compute / e.at(rows),
            )
        )
    return points
