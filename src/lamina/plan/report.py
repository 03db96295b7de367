"""A search as its reader sees it: rows, and a plain verdict with the number that decides it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from lamina.plan.colocated import Breakdown
from lamina.plan.confirm import Simulated, Simulations
from lamina.plan.demand import Demand
from lamina.plan.deployment import PrefillDecode
from lamina.plan.estimate import Estimator
from lamina.plan.fleet import Plan, is_disaggregated
from lamina.plan.inventory import Inventory
from lamina.plan.limits import binding, break_even
from lamina.plan.search import Rank, Search

LEAST_GAIN = 0.05
"""What disaggregation must give more to be worth it: less may be the estimates' error."""
_SLOW_S = 0.5


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One plan."""

    plan: str
    main: str
    """The deployment that it most depends on, which `limit` and what follows are about."""
    disaggregated: bool
    """Whether attention runs away from the rest of the model, in that deployment."""
    tokens_per_s: float
    requests_per_s: float
    ttft_s: float
    """Mean, from when a request has its place."""
    tbt_s: float
    """Mean."""
    batch: float
    """Running sequences."""
    price_per_hour: float | None
    price_per_million_tokens: float | None
    limit: str
    """The binding constraint."""
    needed_link_bytes_per_s: float | None
    """Least bandwidth between its model and attention workers by the paper's formula."""
    link_bytes_per_s: float | None
    """What there is."""
    breakdown: Breakdown
    """Of its TBT, in seconds."""
    simulated: Simulated | None
    needed_link: tuple[tuple[int, float], ...]
    """(batch, bytes per second) of model-attention disaggregation, by the same formula."""


class FrontPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A plan on the Pareto front."""

    plan: str
    price_per_hour: float
    tokens_per_s: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, as `--json` writes it."""

    model: str
    workload: str
    inventory: str
    rank: Rank
    pays: bool
    """Whether to disaggregate."""
    verdict: str
    rows: tuple[Row, ...]
    front: tuple[FrontPoint, ...]
    num_estimated: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def report(
    found: Search,
    estimator: Estimator,
    inventory: Inventory,
    *,
    rank: Rank = "throughput",
    simulations: Simulations | None = None,
    num_simulated: int = 3,
    progress: Callable[[], None] | None = None,
) -> Report:
    """
    Args:
        simulations: for the best `num_simulated` plans and those that the verdict compares.
        progress: called after each simulated deployment.
    """
    simulated: dict[str, Simulated | None] = {}
    if simulations is not None:
        compared = [found.without, found.disaggregated]
        for plan in (*compared, *found.plans[:num_simulated]):
            if plan is not None and str(plan) not in simulated:
                simulated[str(plan)] = simulations.plan(plan, progress)
    rows = tuple(_row(plan, estimator, simulated.get(str(plan))) for plan in found.plans)
    pays, verdict = _verdict(found, estimator, simulated, rank)
    return Report(
        model=estimator.model.name,
        workload=estimator.demand.name,
        inventory=str(inventory),
        rank=rank,
        pays=pays,
        verdict=verdict,
        rows=rows,
        front=tuple(
            FrontPoint(plan=str(plan), price_per_hour=price, tokens_per_s=plan.tokens_per_s)
            for plan in found.front
            if (price := plan.price_per_hour) is not None
        ),
        num_estimated=found.num_estimated,
        notes=(*inventory.notes, *_notes(found, estimator.demand)),
        warnings=(*found.warnings, *_slow(found, estimator)),
    )


def _row(plan: Plan, estimator: Estimator, simulated: Simulated | None) -> Row:
    main = plan.main
    return Row(
        plan=str(plan),
        main=str(main.deployment),
        disaggregated=is_disaggregated(main),
        tokens_per_s=plan.tokens_per_s,
        requests_per_s=plan.requests_per_s,
        ttft_s=plan.ttft_s,
        tbt_s=plan.tbt_s,
        batch=plan.batch,
        price_per_hour=plan.price_per_hour,
        price_per_million_tokens=plan.price_per_million_tokens,
        limit=str(binding(estimator, main)),
        needed_link_bytes_per_s=main.needed_link_bytes_per_s,
        link_bytes_per_s=main.link_bytes_per_s,
        breakdown=main.breakdown,
        simulated=simulated,
        needed_link=tuple(estimator.needed_link(main.deployment)),
    )


def _verdict(
    found: Search,
    estimator: Estimator,
    simulated: dict[str, Simulated | None],
    rank: Rank,
) -> tuple[bool, str]:
    """Whether disaggregation pays, and why."""
    without, disaggregated = found.without, found.disaggregated
    if disaggregated is None:
        assert without is not None, "there is a plan"
        why = next(
            (m.reason for m in found.misfits if str(m.deployment).startswith("dop:")),
            "no devices are left for attention beside those that the weights need",
        )
        return False, f"Do not disaggregate attention: it is not possible here ({why})."
    if without is None:
        main = disaggregated.main
        return True, (
            f"{_verb(disaggregated)}: nothing else serves this. {disaggregated} gives "
            f"{_value(disaggregated, disaggregated.tokens_per_s, rank)}; it is limited by "
            f"{binding(estimator, main)}."
        )
    with_speed, without_speed = disaggregated.tokens_per_s, without.tokens_per_s
    how = ""
    with_sim, without_sim = simulated.get(str(disaggregated)), simulated.get(str(without))
    if with_sim is not None and without_sim is not None:
        with_speed, without_speed = with_sim.tokens_per_s, without_sim.tokens_per_s
        how = ", simulated"
    gain = with_speed / without_speed - 1
    if rank == "cost":
        price, other = disaggregated.price_per_hour, without.price_per_hour
        if price is None or other is None:
            return False, (
                "Do not disaggregate attention for its cost: there is no price for what it needs "
                f"({disaggregated})."
            )
        gain = (with_speed / price) / (without_speed / other) - 1
    compared = (
        f"{disaggregated} gives {_value(disaggregated, with_speed, rank)}{how}, "
        f"{without} gives {_value(without, without_speed, rank)}"
    )
    if gain >= LEAST_GAIN:
        return True, (
            f"{_verb(disaggregated)}: {gain:+.0%} {_what(rank)}. {compared}. "
            f"What limits the latter is {binding(estimator, without.main)}.{_link(disaggregated)}"
        )
    if gain > 0:
        return False, (
            f"Do not disaggregate attention: {gain:+.1%} {_what(rank)} is too little to count on. "
            f"{compared}. What holds the former back is {binding(estimator, disaggregated.main)}."
        )
    return False, (
        f"Do not disaggregate attention: {gain:+.0%} {_what(rank)} at best. {compared}. "
        f"{_deciding(disaggregated, estimator, 1 / (1 + gain))}"
    )


def _deciding(plan: Plan, estimator: Estimator, missing: float) -> str:
    """The least change that would turn a verdict.

    Args:
        missing: throughput of the whole plan that would do, over what it gives.
    """
    main = plan.main
    count = next(count for count, e in plan.parts if e is main)
    more = (missing - 1) * plan.tokens_per_s / count
    turned = break_even(estimator, main, main.tokens_per_s + more)
    limit = binding(estimator, main)
    if turned is None:
        return (
            f"What holds it back is {limit}; no single resource would turn this, not even sixteen "
            f"times as much of it.{_link(plan)}"
        )
    return (
        f"What decides is {turned.name}: it would take {turned.need} instead of {turned.have} "
        f"({turned.more})."
    )


def _link(plan: Plan) -> str:
    main = plan.main
    if main.needed_link_bytes_per_s is None or main.link_bytes_per_s is None:
        return ""
    return (
        f" The link between the sides must give {main.needed_link_bytes_per_s / 1e9:.1f} GB/s; "
        f"there are {main.link_bytes_per_s / 1e9:.1f}."
    )


def _verb(plan: Plan) -> str:
    if isinstance(plan.main.deployment, PrefillDecode):
        return "Offload attention to the prefill instances"
    return "Disaggregate attention"


def _what(rank: Rank) -> str:
    return "throughput" if rank == "throughput" else "tokens per dollar"


def _value(plan: Plan, tokens_per_s: float, rank: Rank) -> str:
    price = plan.price_per_hour
    if rank == "throughput" or price is None:
        return f"{tokens_per_s:.0f} tokens/s"
    return f"{price / 3600 / tokens_per_s * 1e6:.2f} $ per million tokens"


def _notes(found: Search, demand: Demand) -> list[str]:
    best = found.plans[0]
    notes = []
    if demand.rate:
        load = demand.rate / best.requests_per_s
        notes.append(
            f"the workload's own rate of {demand.rate:.3g} requests/s is {load:.0%} of what the "
            f"first plan serves ({best.requests_per_s:.3g} requests/s)"
            + (": it cannot keep up" if load > 1 else "")
        )
    if found.num_left_out:
        notes.append(
            f"{found.num_left_out} deployments were not looked at because there are too many; what "
            f"one of them gives more than its devices give otherwise is {found.left_out_gain:.0f} "
            "tokens/s at most"
        )
    return notes


def _slow(found: Search, estimator: Estimator) -> list[str]:
    best = found.plans[0]
    if estimator.objectives.tbt_s is None and best.tbt_s > _SLOW_S:
        return [
            f"the first plan gives a token every {best.tbt_s:.2g} s: without an objective for the "
            "time between tokens, throughput is all that counts"
        ]
    return []
