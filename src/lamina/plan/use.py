"""How busy the devices of each pool were."""

from __future__ import annotations

from collections.abc import Iterable

from lamina.plan.build import Settings, Site
from lamina.plan.deployment import Pool
from lamina.plan.recorder import Busy
from lamina.plan.results import PoolUse


def pool_uses(sites: Iterable[Site], settings: Settings, duration_s: float) -> tuple[PoolUse, ...]:
    """One entry per pool, in the order in which they come; prefill instances and the executors
    beside them are one."""
    pools: dict[int, tuple[list[str], Pool, list[Busy], list[float]]] = {}

    def add(pool: Pool, role: str, busy: Busy, weight_bytes: float) -> None:
        entry = pools.setdefault(id(pool), ([], pool, [], []))
        if role not in entry[0]:
            entry[0].append(role)
        entry[2].append(busy)
        entry[3].append(weight_bytes)

    for site in sites:
        add(site.model, site.model_role, site.instance.model_busy, site.weight_bytes)
        for executor, pool in site.attention.items():
            add(pool, "attention", site.instance.busy[executor], 0.0)
    return tuple(
        _use(" and ".join(roles), pool, busy, sum(weights), settings, duration_s)
        for roles, pool, busy, weights in pools.values()
    )


def _use(
    role: str,
    pool: Pool,
    busy: list[Busy],
    weight_bytes: float,
    settings: Settings,
    duration_s: float,
) -> PoolUse:
    device, count = pool.device, pool.count
    held = weight_bytes + sum(b.memory_byte_s for b in busy) / duration_s
    return PoolUse(
        role=role,
        device=device.name,
        count=count,
        compute=sum(b.flops for b in busy)
        / (device.flops_for(settings.dtype) * count * duration_s),
        bandwidth=sum(b.num_bytes for b in busy)
        / (device.bandwidth_bytes_per_s * count * duration_s),
        memory=held / (device.memory_bytes * count),
        network=sum(b.network_bytes for b in busy)
        / (2 * device.network_bytes_per_s * count * duration_s),
    )
