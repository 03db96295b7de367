"""What holds a deployment back: what more of each resource would give, and how much it would take.

A quarter more of one resource at a time, everything else equal; the one with the greatest gain is
the binding constraint. Times from a measured profile do not change with the devices' figures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from lamina.plan.build import Settings
from lamina.plan.deployment import Deployment, Disaggregated, Monolithic, Pool
from lamina.plan.estimate import Estimate, Estimator, Misfit, Objectives

MORE = 1.25
_MOST_MORE = 16.0
_LEAST_GAIN = 0.005
_CHOICE_GAIN = 0.05

MODEL, ATTENTION, ALL = "model", "attention", "all"
"""Sides of a deployment. Prefill instances are the model side, the decode instance the attention
side; of a monolithic one both are all."""


class Case(NamedTuple):
    """A deployment and what it runs under."""

    deployment: Deployment
    settings: Settings
    objectives: Objectives


class Resource(NamedTuple):
    """Something that there may be more of."""

    name: str
    scaled: Callable[[Case, float], Case]
    amount: Callable[[Case], str]
    is_choice: bool = False
    """The user sets it."""


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """The binding constraint of a deployment."""

    name: str
    gain: float
    """Of throughput, for a quarter more of it (a quarter less latency)."""

    def __str__(self) -> str:
        if self.gain < _LEAST_GAIN:
            return self.name
        return f"{self.name} ({MORE - 1:.0%} more: +{self.gain:.0%})"


class BreakEven(msgspec.Struct, frozen=True, kw_only=True):
    """How much more of one resource alone reaches a throughput."""

    name: str
    factor: float
    have: str
    need: str

    @property
    def more(self) -> str:
        """The change in words."""
        return f"{self.factor - 1:.0%} more" if self.factor < 2 else f"{self.factor:.2g} times"


def binding(estimator: Estimator, estimate: Estimate) -> Limit:
    """The resource of which a quarter more gives the most; of twice as much, where whole sequences
    leave a quarter without effect. What the user sets comes before devices, if a quarter more of it
    gives a twentieth."""
    case = Case(estimate.deployment, estimator.settings, estimator.objectives)
    for factor in (MORE, 2.0):
        limits = []
        for resource in resources(case):
            reached = _reached(estimator, resource.scaled(case, factor))
            gain = (reached / estimate.tokens_per_s - 1) * (MORE - 1) / (factor - 1)
            limits.append((resource, Limit(name=resource.name, gain=gain)))
        best = max((limit for _, limit in limits), key=lambda limit: limit.gain)
        chosen = [limit for r, limit in limits if r.is_choice and limit.gain >= _CHOICE_GAIN]
        best = max(chosen, key=lambda limit: limit.gain, default=best)
        if best.gain >= _LEAST_GAIN:
            return best
    return Limit(name="no single resource", gain=0.0)


def break_even(estimator: Estimator, estimate: Estimate, tokens_per_s: float) -> BreakEven | None:
    """The least change of one resource that makes the deployment reach `tokens_per_s`; None if
    none does, up to sixteen times as much."""
    case = Case(estimate.deployment, estimator.settings, estimator.objectives)
    least: BreakEven | None = None
    for resource in resources(case):
        low, high = 1.0, least.factor if least else _MOST_MORE
        if _reached(estimator, resource.scaled(case, high)) < tokens_per_s:
            continue
        while high / low > 1.02:
            middle = (low * high) ** 0.5
            if _reached(estimator, resource.scaled(case, middle)) >= tokens_per_s:
                high = middle
            else:
                low = middle
        least = BreakEven(
            name=resource.name,
            factor=high,
            have=resource.amount(case),
            need=resource.amount(resource.scaled(case, high)),
        )
    return least


def _reached(estimator: Estimator, case: Case) -> float:
    other = Estimator(estimator.model, estimator.demand, case.settings, case.objectives)
    result = other.estimate(case.deployment)
    return 0.0 if isinstance(result, Misfit) else result.tokens_per_s


def resources(case: Case) -> list[Resource]:
    """Those that the deployment uses."""
    deployment = case.deployment
    if isinstance(deployment, Monolithic):
        found = [
            _memory("KV memory", ALL),
            _compute("compute", ALL),
            _bandwidth("memory bandwidth", ALL),
        ]
        if deployment.devices.count > 1:
            found.append(_ranks(ALL))
    elif isinstance(deployment, Disaggregated):
        found = [
            _memory("memory of the model side", MODEL),
            _memory("KV memory", ATTENTION),
            _compute("compute of the model side", MODEL),
            _bandwidth("memory bandwidth of the model side", MODEL),
            _bandwidth("attention bandwidth", ATTENTION),
            _network(),
            _latency(),
        ]
        if deployment.num_ranks > 1:
            found.append(_ranks(MODEL))
    else:
        found = [
            _memory("memory of the prefill side", MODEL),
            _memory("KV memory", ATTENTION),
            _compute("compute of the prefill side", MODEL),
            _compute("compute of the decode side", ATTENTION),
            _bandwidth("attention bandwidth", ATTENTION),
            _network(),
        ]
    found.append(_batch_limits())
    for field, name in (("tbt_s", "TBT objective"), ("ttft_s", "TTFT objective")):
        if getattr(case.objectives, field) is not None:
            found.append(_objective(field, name))
    return found


def _memory(name: str, side: str) -> Resource:
    return _of_devices(name, side, "memory_bytes", 1e9, "GB")


def _bandwidth(name: str, side: str) -> Resource:
    return _of_devices(name, side, "bandwidth_bytes_per_s", 1e9, "GB/s")


def _compute(name: str, side: str) -> Resource:
    def amount(case: Case) -> str:
        dtype = case.settings.dtype
        total = sum(p.count * p.device.flops_for(dtype) for p in _pools(case.deployment, side))
        return f"{total / 1e12:.4g} TFLOPS"

    return Resource(name, lambda case, factor: _with(case, side, ("flops",), factor), amount)


def _of_devices(name: str, side: str, field: str, unit: float, unit_name: str) -> Resource:
    def amount(case: Case) -> str:
        total = sum(p.count * getattr(p.device, field) for p in _pools(case.deployment, side))
        return f"{total / unit:.4g} {unit_name}"

    return Resource(name, lambda case, factor: _with(case, side, (field,), factor), amount)


def _network() -> Resource:
    def amount(case: Case) -> str:
        rates = [p.device.network_bytes_per_s for p in case.deployment.pools]
        return f"{min(rates) * 8 / 1e9:.4g} Gbit/s per device"

    fields = ("network_bytes_per_s", "interconnect_bytes_per_s")
    return Resource(
        "network",
        lambda case, factor: _with(
            case, ALL, fields[:1] if isinstance(case.deployment, Disaggregated) else fields, factor
        ),
        amount,
    )


def _latency() -> Resource:
    def scaled(case: Case, factor: float) -> Case:
        efficiency = case.settings.efficiency
        return case._replace(
            settings=msgspec.structs.replace(
                case.settings,
                efficiency=msgspec.structs.replace(
                    efficiency, hop_latency_s=efficiency.hop_latency_s / factor
                ),
            )
        )

    return Resource(
        "hop latency",
        scaled,
        lambda case: f"{1e6 * case.settings.efficiency.hop_latency_s:.3g} us",
    )


def _ranks(side: str) -> Resource:
    """Between the ranks of a replica: bandwidth, and latency with it."""

    def scaled(case: Case, factor: float) -> Case:
        efficiency = case.settings.efficiency
        faster = msgspec.structs.replace(
            efficiency, collective_latency_s=efficiency.collective_latency_s / factor
        )
        settings = msgspec.structs.replace(case.settings, efficiency=faster)
        fields: tuple[str, ...] = ("interconnect_bytes_per_s",)
        if side == ALL:  # without an interconnect ranks use the network, which serves nothing else
            fields = ("interconnect_bytes_per_s", "network_bytes_per_s")
        return _with(case._replace(settings=settings), side, fields, factor)

    def amount(case: Case) -> str:
        device = _pools(case.deployment, side)[0].device
        rate = device.interconnect_bytes_per_s or device.network_bytes_per_s
        return f"{rate / 1e9:.4g} GB/s"

    return Resource("links between ranks", scaled, amount)


def _batch_limits() -> Resource:
    def scaled(case: Case, factor: float) -> Case:
        settings = case.settings
        return case._replace(
            settings=msgspec.structs.replace(
                settings,
                max_num_seqs=int(settings.max_num_seqs * factor),
                max_num_batched_tokens=int(settings.max_num_batched_tokens * factor),
            )
        )

    def amount(case: Case) -> str:
        return (
            f"{case.settings.max_num_seqs} sequences, {case.settings.max_num_batched_tokens} rows"
        )

    return Resource("batch limits", scaled, amount, is_choice=True)


def _objective(field: str, name: str) -> Resource:
    def scaled(case: Case, factor: float) -> Case:
        value = getattr(case.objectives, field) * factor
        return case._replace(objectives=msgspec.structs.replace(case.objectives, **{field: value}))

    def amount(case: Case) -> str:
        return f"{1e3 * getattr(case.objectives, field):.4g} ms"

    return Resource(name, scaled, amount, is_choice=True)


def _pools(deployment: Deployment, side: str) -> tuple[Pool, ...]:
    first, *others = deployment.pools
    if side == ALL or not others:
        return (first, *others)
    return (first,) if side == MODEL else tuple(others)


def _with(case: Case, side: str, fields: tuple[str, ...], factor: float) -> Case:
    """The case with more of these figures on every device of a side."""

    def more(pool: Pool) -> Pool:
        changes: dict[str, Any] = {}
        for field in fields:
            value = getattr(pool.device, field)
            if field == "flops":
                changes[field] = {dtype: flops * factor for dtype, flops in value.items()}
            elif value is not None:
                changes[field] = type(value)(value * factor)
        device = msgspec.structs.replace(pool.device, **changes)
        return msgspec.structs.replace(pool, device=device)

    deployment = case.deployment
    parts: dict[str, Any] = {}
    for field in deployment.__struct_fields__:
        value = getattr(deployment, field)
        is_model = field in ("devices", "model", "prefill")
        if side != ALL and is_model != (side == MODEL):
            continue
        if isinstance(value, Pool):
            parts[field] = more(value)
        elif field == "attention":
            parts[field] = tuple(more(pool) for pool in value)
    return case._replace(deployment=msgspec.structs.replace(deployment, **parts))
