"""Which deployments make the most of an inventory, for a model, a workload and objectives.

Deployments are estimated (`estimate`), the best for every use of devices are combined (`fleet`).
A model-attention disaggregated deployment whose bound (`candidates`) is below what the same devices
give without disaggregation is not estimated, except the most promising ones, for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import msgspec

from lamina.errors import CapacityError, ConfigError
from lamina.plan.build import Settings
from lamina.plan.candidates import Candidates, Usage, deeper, usage_of, with_depth
from lamina.plan.demand import Demand
from lamina.plan.deployment import Deployment, Disaggregated
from lamina.plan.estimate import Estimate, Estimator, Misfit, Objectives
from lamina.plan.fleet import Fleets, Plan, is_disaggregated, plan_of
from lamina.plan.inventory import OWN_PRICE, Inventory
from lamina.plan.model import ModelCost

Rank = Literal["throughput", "cost"]

MOST_ESTIMATES = 2000
"""Model-attention disaggregated deployments that are estimated at most."""
_COMPARED = 150
_DEEPENED = 80


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """What a search found."""

    plans: tuple[Plan, ...]
    """The best of each make, best first; `without` and `disaggregated` are among them."""
    without: Plan | None
    """The best without attention on other devices than the rest of the model; None: there is
    none."""
    disaggregated: Plan | None
    """The best with it: beside others if that is better than `without`, else nothing but it. None:
    there is none."""
    front: tuple[Plan, ...]
    """By rising price per hour, each with more throughput than all cheaper ones; of devices whose
    price is known."""
    num_estimated: int
    num_left_out: int
    """Deployments that were not estimated because there are too many."""
    left_out_gain: float
    """Most tokens per second that one of those may give above what the same devices give without
    disaggregation."""
    misfits: tuple[Misfit, ...]
    warnings: tuple[str, ...]


class _Best:
    """The best estimate for every use of devices."""

    def __init__(self, inventory: Inventory, estimator: Estimator) -> None:
        self.plain: dict[Usage, Estimate] = {}
        """Without disaggregation of attention."""
        self.disaggregated: dict[Usage, Estimate] = {}
        self.misfits: list[Misfit] = []
        self.num_estimated = 0
        self._inventory = inventory
        self._estimator = estimator

    def add(self, deployment: Deployment) -> Estimate | None:
        result = self._estimator.estimate(deployment)
        self.num_estimated += 1
        if isinstance(result, Misfit):
            self.misfits.append(result)
            return None
        best = self.disaggregated if is_disaggregated(result) else self.plain
        usage = usage_of(deployment, self._inventory)
        if usage not in best or result.tokens_per_s > best[usage].tokens_per_s:
            best[usage] = result
        return result


def search(
    model: ModelCost,
    inventory: Inventory,
    demand: Demand,
    settings: Settings,
    *,
    objectives: Objectives | None = None,
    rank: Rank = "throughput",
    budget_per_hour: float | None = None,
    num_plans: int = 10,
) -> Search:
    """
    Args:
        rank: cost: by US dollars per million generated tokens.
        budget_per_hour: most US dollars that a plan may cost.

    Raises:
        CapacityError: the model fits nowhere; says what would be needed.
        ConfigError: no deployment meets the objectives or the budget, prices are missing, or the
            inventory is too large.
    """
    objectives = objectives or Objectives()
    _check_prices(inventory, rank, budget_per_hour)
    counts = tuple(pool.count for pool in inventory.pools)
    estimator = Estimator(model, demand, settings, objectives)
    candidates = Candidates(model, inventory, settings, demand)
    best = _Best(inventory, estimator)
    for monolithic in candidates.monolithic():
        best.add(monolithic)
    for separate in candidates.prefill_decode():
        best.add(separate)
    plain = Fleets(counts, list(best.plain.items()))
    num_left_out, left_out_gain = _estimate_disaggregated(candidates, best, plain, inventory)
    if not best.plain and not best.disaggregated:
        raise _nothing(model, inventory, candidates, best.misfits, objectives)
    every: dict[Usage, Estimate] = dict(best.plain)
    for usage, estimate in best.disaggregated.items():
        if usage not in every or estimate.tokens_per_s > every[usage].tokens_per_s:
            every[usage] = estimate
    fleets = Fleets(counts, list(every.items()))
    chooser = _Chooser(inventory, counts, rank, budget_per_hour)
    without = chooser.best(plain, best.plain)
    disaggregated = chooser.best(fleets, best.disaggregated)
    if disaggregated and without and chooser.key(disaggregated) <= chooser.key(without):
        alone = Fleets(counts, list(best.disaggregated.items()))
        disaggregated = chooser.best(alone, best.disaggregated)
    estimates = (*best.plain.values(), *best.disaggregated.values())
    plans = chooser.ranked(estimates, [p for p in (without, disaggregated) if p], num_plans)
    if not plans:
        raise ConfigError(
            f"no deployment costs {budget_per_hour:g} $/h or less; the cheapest that fits costs "
            f"{min(chooser.price(usage_of(e.deployment, inventory)) for e in estimates):.2f}"
        )
    return Search(
        plans=tuple(plans),
        without=without,
        disaggregated=disaggregated,
        front=tuple(chooser.front(fleets)),
        num_estimated=best.num_estimated,
        num_left_out=num_left_out,
        left_out_gain=left_out_gain,
        misfits=tuple(best.misfits),
        warnings=tuple(_warnings(plans, inventory)),
    )


def _estimate_disaggregated(
    candidates: Candidates, best: _Best, plain: Fleets, inventory: Inventory
) -> tuple[int, float]:
    """Estimate what may be worth it: with one micro-batch more than replicas, then the best of them
    with other numbers.

    Returns:
        How many were left out although they may be worth it, and the most tokens per second that
        one of those may give above what the same devices give without disaggregation.
    """
    found: list[tuple[float, float, Usage, Disaggregated]] = []
    for deployment in candidates.disaggregated():
        bound, usage = candidates.bound(deployment), usage_of(deployment, inventory)
        found.append((bound - float(plain.best[usage]), bound, usage, deployment))
    found.sort(key=lambda f: f[1], reverse=True)
    compared, others = found[:_COMPARED], found[_COMPARED:]
    others = sorted((f for f in others if f[0] > 0), key=lambda f: f[0], reverse=True)
    reached: list[tuple[float, float, Disaggregated]] = []
    for _, bound, usage, deployment in (*compared, *others[:MOST_ESTIMATES]):
        known = best.disaggregated.get(usage)
        if known is not None and known.tokens_per_s >= bound:
            continue
        estimate = best.add(deployment)
        if estimate is not None:
            gain = estimate.tokens_per_s - float(plain.best[usage])
            reached.append((gain, estimate.tokens_per_s, deployment))
        elif deployment.replicas < deployment.depth:  # fewer sequences, less time between tokens
            best.add(with_depth(deployment, deployment.replicas))
    by_gain = sorted(reached, key=lambda r: r[0], reverse=True)[:_DEEPENED]
    by_speed = sorted(reached, key=lambda r: r[1], reverse=True)[:_DEEPENED]
    for _, tokens_per_s, deployment in {id(r[2]): r for r in (*by_gain, *by_speed)}.values():
        best.add(with_depth(deployment, deployment.replicas))
        for depth in deeper(deployment):
            estimate = best.add(with_depth(deployment, depth))
            if estimate is None or estimate.tokens_per_s < tokens_per_s:
                break  # more micro-batches make it worse from here on
            tokens_per_s = estimate.tokens_per_s
    left_out = others[MOST_ESTIMATES:]
    return len(left_out), max((f[0] for f in left_out), default=0.0)


class _Chooser:
    """Ranks plans within an inventory and a budget."""

    def __init__(
        self, inventory: Inventory, counts: Usage, rank: Rank, budget: float | None
    ) -> None:
        self._inventory = inventory
        self._counts = counts
        self._rank = rank
        self._budget = math.inf if budget is None else budget
        self._prices = [pool.device.price_per_hour for pool in inventory.pools]

    def price(self, usage: Usage) -> float:
        """US dollars per hour; infinite if not known."""
        total = 0.0
        for pool, count in zip(self._inventory.pools, usage, strict=True):
            if count:
                price = pool.device.price_per_hour
                total += math.inf if price is None else count * price
        return total

    def key(self, plan: Plan) -> float:
        """The greater the better."""
        if self._rank == "throughput":
            return plan.tokens_per_s
        price = plan.price_per_million_tokens
        return -math.inf if price is None else -price

    def best(self, fleets: Fleets, choices: dict[Usage, Estimate]) -> Plan | None:
        """The best plan that has at least one of `choices`, the rest from `fleets`."""
        best: tuple[float, Estimate, Usage | None] | None = None
        for usage, estimate in choices.items():
            if not self._fits(self.price(usage)):
                continue
            if self._rank == "cost":  # more devices make it no cheaper per token
                rest, value = None, self.key(plan_of([estimate]))
            else:
                rest = self._rest(fleets, usage)
                value = estimate.tokens_per_s + float(fleets.best[rest])
            if best is None or value > best[0]:
                best = value, estimate, rest
        if best is None:
            return None
        _, estimate, rest = best
        return plan_of([estimate, *(fleets.at(rest) if rest is not None else ())])

    def _rest(self, fleets: Fleets, usage: Usage) -> Usage:
        """Devices to use beside `usage`."""
        left = tuple(c - u for c, u in zip(self._counts, usage, strict=True))
        if self._budget == math.inf:
            return left
        return fleets.within(self._prices, max(0.0, self._budget - self.price(usage)), left)

    def _fits(self, price: float) -> bool:
        return self._budget == math.inf or price <= self._budget * (1 + 1e-9)

    def ranked(self, estimates: Iterable[Estimate], always: list[Plan], most: int) -> list[Plan]:
        """The best fleet of equal deployments of each make, and `always`."""
        best: dict[object, Plan] = {}
        for estimate in estimates:
            usage = usage_of(estimate.deployment, self._inventory)
            copies = min(c // u for c, u in zip(self._counts, usage, strict=True) if u)
            if self._budget < math.inf and self.price(usage) > 0:
                copies = min(copies, int(self._budget * (1 + 1e-9) / self.price(usage)))
            if copies < 1:
                continue
            plan = Plan(parts=((copies, estimate),))
            make = _make(estimate.deployment)
            if make not in best or self.key(plan) > self.key(best[make]):
                best[make] = plan
        plans = {str(plan): plan for plan in (*always, *best.values())}
        ranked = sorted(plans.values(), key=self.key, reverse=True)
        kept = ranked[:most]
        return kept + [p for p in ranked[most:] if p in always]

    def front(self, fleets: Fleets) -> list[Plan]:
        usages = fleets.front(self._prices)
        return [plan_of(chosen) for usage in usages if (chosen := fleets.at(usage))]


def _make(deployment: Deployment) -> object:
    """What deployments of one make have in common: all but numbers."""
    offload = getattr(deployment, "offload", None) is not None
    return type(deployment), offload, tuple(p.device.name for p in deployment.pools)


def _check_prices(inventory: Inventory, rank: Rank, budget: float | None) -> None:
    if budget is not None and not budget > 0:
        raise ConfigError(f"the budget must be positive, got {budget}")
    missing = [p.device.name for p in inventory.pools if p.device.price_per_hour is None]
    if missing and (
        budget is not None or (rank == "cost" and len(missing) == len(inventory.pools))
    ):
        raise ConfigError(
            f"there is no price for {', '.join(missing)}; give one, such as "
            f"'{missing[0]} at $0.40' in the inventory"
        )


def _warnings(plans: Iterable[Plan], inventory: Inventory) -> list[str]:
    used = {
        pool.device.name for plan in plans for _, e in plan.parts for pool in e.deployment.pools
    }
    sellers: dict[str, list[str]] = {}
    for pool in inventory.pools:
        device = pool.device
        if device.name in used and device.price_per_hour is not None:
            sellers.setdefault(device.source_of("price_per_hour"), []).append(device.name)
    warnings = []
    if len(sellers) > 1:
        by_seller = "; ".join(f"{', '.join(names)}: {source}" for source, names in sellers.items())
        warnings.append(
            "prices of different sellers and days are mixed, so that costs do not compare "
            f"({by_seller}); give your own, such as 'H100 at $2.50'"
        )
    missing = sorted(p.device.name for p in inventory.pools if p.device.price_per_hour is None)
    if missing and any(source == OWN_PRICE for source in sellers):
        warnings.append(f"there is no price for {', '.join(missing)}: plans with it have no cost")
    return warnings


def _nothing(
    model: ModelCost,
    inventory: Inventory,
    candidates: Candidates,
    misfits: list[Misfit],
    objectives: Objectives,
) -> Exception:
    """Why there is no deployment at all."""
    late = [m for m in misfits if m.best_tbt_s is not None and m.best_ttft_s is not None]
    if late:
        return _too_slow(late, objectives)
    weights = model.weight_bytes() / 1e9
    if not misfits:
        needs = []
        for pool in inventory.pools:
            count = candidates.ranks_needed(pool.device)
            if count is not None:
                needs.append(f"{count} x {pool.device.name}")
        usable = max(candidates.usable_bytes(p.device) * p.count for p in inventory.pools) / 1e9
        remedy = f"needed are {' or '.join(needs)}" if needs else "needed are larger devices"
        return CapacityError(
            f"{model.name} fits nowhere in {inventory}: its weights have {weights:.1f} GB, equal "
            f"devices together can use {usable:.1f} GB at most; {remedy}, or a smaller model"
        )
    first = next(m for m in misfits if m.kind == "memory")
    return CapacityError(
        f"{model.name} fits ({weights:.1f} GB), but its KV does not: {first.reason}; use more "
        "memory, or leave out the longest requests"
    )


def _too_slow(late: list[Misfit], objectives: Objectives) -> ConfigError:
    wanted, best = [], []
    for name, objective, times in (
        ("TBT", objectives.tbt_s, [(m.best_tbt_s or 0.0, str(m.deployment)) for m in late]),
        ("TTFT", objectives.ttft_s, [(m.best_ttft_s or 0.0, str(m.deployment)) for m in late]),
    ):
        if objective is not None:
            least, deployment = min(times)
            wanted.append(f"{name} {1e3 * objective:.4g} ms")
            best.append(f"{name} {1e3 * least:.3g} ms by {deployment}")
    return ConfigError(
        f"no deployment meets {' and '.join(wanted)}; the best is {', '.join(best)}, with one "
        "sequence at a time; allow more time, or use faster devices or a smaller model"
    )
