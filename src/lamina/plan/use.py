"""How busy the devices of each pool were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lamina.plan.build import Settings, Site
from lamina.plan.deployment import Pool
from lamina.plan.recorder import Busy
from lamina.plan.results import PoolUse


def pool_uses(
    pools: Sequence[Pool], sites: Iterable[Site], settings: Settings, duration_s: float
) -> tuple[PoolUse, ...]:
    """One entry per pool of the deployment."""
    roles: list[list[str]] = [[] for _ in pools]
    busy: list[list[Busy]] = [[] for _ in pools]
    weight_bytes = [0.0] * len(pools)
    sites = list(sites)
    for site in sites:
        roles[site.model].append(site.role)
        busy[site.model].append(site.instance.model_busy)
        weight_bytes[site.model] += site.weight_bytes
    for site in sites:
        for executor, index in site.attention.items():
            roles[index].append("attention")
            busy[index].append(site.instance.busy[executor])
    return tuple(
        _use(
            " and ".join(dict.fromkeys(roles[i])) or "idle",
            pool,
            busy[i],
            weight_bytes[i],
            settings,
            duration_s,
        )
        for i, pool in enumerate(pools)
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
