"""What a deployment delivers in the steady state, from the cost model alone: no events, no clock.

The state is that of a full house: whenever a request ends the next one has its place. From the
requests' means follow how many prompt rows come with a decode row, how often a step carries a
prompt's chunk, and how much memory a running sequence holds. `simulate` answers the same question
with the real scheduler; the search uses this, which takes a thousandth of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import msgspec

from lamina.errors import CapacityError, ConfigError
from lamina.plan.build import Builder, Settings
from lamina.plan.colocated import Breakdown, Colocated, Point
from lamina.plan.cost import min_bandwidth_bytes_per_s
from lamina.plan.demand import Demand
from lamina.plan.deployment import Deployment, Disaggregated, Monolithic
from lamina.plan.model import ModelCost
from lamina.plan.recorder import RequestTimes
from lamina.plan.separate import Separate

_CURVE_POINTS = 40
ALPHA = 0.2
"""Share of a step's time that the network may add, in the formula for the least bandwidth."""


class Objectives(msgspec.Struct, frozen=True, kw_only=True):
    """Longest mean times; None: any."""

    ttft_s: float | None = None
    """From when a request has its place to its first token."""
    tbt_s: float | None = None

    def __post_init__(self) -> None:
        for field in ("ttft_s", "tbt_s"):
            value = getattr(self, field)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"objective {field} must be positive, got {value}")

    @property
    def given(self) -> bool:
        return self.ttft_s is not None or self.tbt_s is not None


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment at the most that it can do within the objectives."""

    deployment: Deployment
    tokens_per_s: float
    requests_per_s: float
    batch: float
    """Running sequences."""
    ttft_s: float
    tbt_s: float
    breakdown: Breakdown
    needed_link_bytes_per_s: float | None = None
    """Least bandwidth between model and attention workers by the paper's formula; of prefill-decode
    deployments, of KV and offloaded rows. None: no link is needed."""
    link_bytes_per_s: float | None = None
    """What there is."""


class Misfit(msgspec.Struct, frozen=True, kw_only=True):
    """Why a deployment is none."""

    deployment: Deployment
    kind: Literal["memory", "objective", "policy"]
    reason: str
    best_tbt_s: float | None = None
    """The least that it reaches, with one sequence per micro-batch."""
    best_ttft_s: float | None = None


class Estimator:
    """Estimates deployments of one model for one demand."""

    def __init__(
        self,
        model: ModelCost,
        demand: Demand,
        settings: Settings,
        objectives: Objectives | None = None,
    ) -> None:
        self.model = model
        self.demand = demand
        self.settings = msgspec.structs.replace(
            settings, tbt_objective_s=objectives.tbt_s if objectives else None
        )
        self.objectives = objectives or Objectives()
        self.builder = Builder(
            model,
            self.settings,
            RequestTimes([0.0]),
            longest=demand.longest,
            mean_context=demand.context,
            num_requests=1,
        )

    def estimate(self, deployment: Deployment) -> Estimate | Misfit:
        """
        Raises:
            ConfigError: a device cannot compute in the dtype.
        """
        try:
            side = self._side(deployment)
        except CapacityError as error:
            return Misfit(deployment=deployment, kind="memory", reason=str(error))
        if side.most_tokens < self.demand.longest:
            return Misfit(
                deployment=deployment,
                kind="memory",
                reason=f"{deployment} holds {side.most_tokens} tokens of one sequence at most, "
                f"the longest request has {self.demand.longest}",
            )
        most = side.most_batch
        if most < 1:
            return Misfit(
                deployment=deployment,
                kind="memory",
                reason=f"{deployment} has no memory for one sequence in each micro-batch",
            )
        if not self._meets(least := side.point(1)):
            return Misfit(
                deployment=deployment,
                kind="objective",
                reason=f"{deployment} reaches TBT {1e3 * least.tbt_s:.3g} ms and TTFT "
                f"{1e3 * least.ttft_s:.3g} ms at best",
                best_tbt_s=least.tbt_s,
                best_ttft_s=least.ttft_s,
            )
        if self.objectives.given:
            most = last_true(lambda b: self._meets(side.point(b)), 1, most)
        batch = side.best_batch(most)
        if isinstance(side, Separate) and side.may_offload and side.offloaded(batch) < 0.5:
            return Misfit(
                deployment=deployment,
                kind="policy",
                reason=f"{deployment} would offload nothing: the policy's bound is too low",
            )
        return self._estimate(deployment, side, batch)

    def needed_link(self, deployment: Deployment) -> list[tuple[int, float]]:
        """(batch, bytes per second that the formula asks for), up to what memory holds; empty for
        deployments that the formula is not about, and for those that do not fit."""
        if not isinstance(deployment, Disaggregated):
            return []
        side = self._side(deployment)
        assert isinstance(side, Colocated), "prompts and decoding are in one engine"
        most = side.most_batch
        rows = sorted(
            {max(1, round(most * i / _CURVE_POINTS)) for i in range(1, 1 + _CURVE_POINTS)}
        )
        curve = []
        for batch in rows if most else ():
            slices_s, attention_s = side.times(batch)
            needed = min_bandwidth_bytes_per_s(
                self.model, batch, slices_s, attention_s, alpha=ALPHA
            )
            curve.append((batch * deployment.depth, needed))
        return curve

    def _side(self, deployment: Deployment) -> Colocated | Separate:
        match deployment:
            case Monolithic():
                return Colocated(self.builder.monolithic(deployment), self.demand, self.settings)
            case Disaggregated():
                return Colocated(
                    self.builder.disaggregated(deployment),
                    self.demand,
                    self.settings,
                    depth=deployment.depth,
                    num_replicas=deployment.replicas,
                )
            case _:
                return Separate(self.builder, deployment, self.demand)

    def _meets(self, point: Point) -> bool:
        ttft_s, tbt_s = self.objectives.ttft_s, self.objectives.tbt_s
        return (tbt_s is None or point.tbt_s <= tbt_s) and (
            ttft_s is None or point.ttft_s <= ttft_s
        )

    def _estimate(self, deployment: Deployment, side: Colocated | Separate, batch: int) -> Estimate:
        point = side.point(batch)
        link = needed = None
        if isinstance(deployment, Disaggregated) and isinstance(side, Colocated):
            slices_s, attention_s = side.times(batch)
            needed = min_bandwidth_bytes_per_s(
                self.model, batch, slices_s, attention_s, alpha=ALPHA
            )
            link = self._link(deployment)
        elif isinstance(side, Separate):
            needed, link = side.needed_link(batch), side.link_bytes_per_s
        return Estimate(
            deployment=deployment,
            tokens_per_s=point.requests_per_s * self.demand.output_tokens,
            requests_per_s=point.requests_per_s,
            batch=point.batch,
            ttft_s=point.ttft_s,
            tbt_s=point.tbt_s,
            breakdown=point.breakdown,
            needed_link_bytes_per_s=needed,
            link_bytes_per_s=link,
        )

    def _link(self, deployment: Disaggregated) -> float:
        """Bandwidth between the ranks of a replica and the attention workers."""
        settings = self.settings
        if settings.profile is not None and (hop := settings.profile.hop(settings.transport)):
            return hop.bandwidth_bytes_per_s
        here = deployment.model.device.network_bytes_per_s * deployment.num_ranks
        there = sum(pool.device.network_bytes_per_s * pool.count for pool in deployment.attention)
        return min(here, there) * settings.efficiency.network


def last_true(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in [low, high] that `holds`; it does for `low`, and for no number above
    one for which it does not."""
    if holds(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
