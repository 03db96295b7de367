"""How long the parts of a step take on given devices: slices, attention, messages.

The estimate is a roofline: the longer of computing and of moving bytes, at a share of the device's
peak (`Efficiency`). Where a `Profile` has measured the part on that device, the measurement is used
instead. Times are per step, over all layers, in seconds. In the paper's symbols (Lamina, section 3)
`SliceCost.seconds` is MTIME(B) and `AttentionCost.seconds` is ATIME(B, l).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise

import msgspec

from lamina.errors import ConfigError
from lamina.plan.hardware import Device
from lamina.plan.model import ModelCost
from lamina.plan.profile import AttentionTime, Curve, Profile


class EfficiencyCurve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Share of a peak that is reached, over the size of the work (linear in its logarithm, constant
    beyond both ends)."""

    sizes: tuple[float, ...] = (1.0,)
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.shares) or not self.sizes:
            raise ConfigError(
                f"shares must be as many as sizes ({len(self.sizes)}), got {len(self.shares)}"
            )
        if self.sizes[0] <= 0 or any(b <= a for a, b in pairwise(self.sizes)):
            raise ConfigError(f"sizes must be positive and increasing, got {list(self.sizes)}")
        if any(not 0 < share <= 1 for share in self.shares):
            raise ConfigError(f"shares must be above 0 and at most 1, got {list(self.shares)}")

    def at(self, size: float) -> float:
        i = bisect_right(self.sizes, size)
        if i == 0:
            return self.shares[0]
        if i == len(self.sizes):
            return self.shares[-1]
        low, high = self.sizes[i - 1 : i + 1]
        along = math.log(size / low) / math.log(high / low)
        return self.shares[i - 1] + along * (self.shares[i] - self.shares[i - 1])


class Efficiency(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shares of the peaks that are reached, and latencies. docs/planner.md says why these."""

    compute: EfficiencyCurve = EfficiencyCurve(shares=(0.6,))
    """Of FLOP/s, over the rows of a step."""
    bandwidth: EfficiencyCurve = EfficiencyCurve(shares=(0.8,))
    """Of memory bandwidth, over the bytes that one device reads for one layer."""
    memory: float = 0.9
    """Of memory capacity that weights and KV may fill."""
    network: float = 0.914
    """Of the network's line rate."""
    interconnect: float = 0.8
    """Of the rate between chips of one machine."""
    hop_latency_s: float = 16.5e-6
    """Of a message between model worker and attention worker, one way."""
    collective_latency_s: float = 10e-6
    """Of an all-reduce between the ranks of a replica."""

    def __post_init__(self) -> None:
        for field in ("memory", "network", "interconnect"):
            if not 0 < getattr(self, field) <= 1:
                raise ConfigError(
                    f"efficiency {field} must be above 0 and at most 1, got {getattr(self, field)}"
                )
        for field in ("hop_latency_s", "collective_latency_s"):
            if not getattr(self, field) >= 0:
                raise ConfigError(
                    f"efficiency {field} must be at least 0, got {getattr(self, field)}"
                )


class Devices(msgspec.Struct, frozen=True, kw_only=True):
    """Equal devices that work as one: ranks of a replica, or attention workers of equal shares."""

    device: Device
    count: int = 1
    compute_share: float = 1.0
    """Of each device's computing speed: an executor beside a prefill instance has less than all."""
    bandwidth_share: float = 1.0
    """Of each device's memory bandwidth."""

    @property
    def memory_bytes(self) -> float:
        return float(self.device.memory_bytes * self.count)

    @property
    def bandwidth_bytes_per_s(self) -> float:
        return self.device.bandwidth_bytes_per_s * self.count * self.bandwidth_share

    def flops_per_s(self, dtype: str) -> float:
        return self.device.flops_for(dtype) * self.count * self.compute_share


def link_bytes_per_s(device: Device, e: Efficiency, in_one_machine: bool) -> float:
    """One direction between two devices: over the network, or between chips of one machine if the
    device has such a link."""
    if in_one_machine and device.interconnect_bytes_per_s is not None:
        return device.interconnect_bytes_per_s * e.interconnect
    return device.network_bytes_per_s * e.network


def roofline_s(
    flops: float, num_bytes: float, devices: Devices, dtype: str, e: Efficiency, *,
    rows: float, ops: int,
) -> float:  # fmt: skip
    """Seconds for work spread evenly over the devices.

    Args:
        rows: size for the efficiency of computing.
        ops: equal pieces that the bytes are read in, for the efficiency of reading.
    """
    compute = flops / (devices.flops_per_s(dtype) * e.compute.at(rows))
    share = e.bandwidth.at(max(1.0, num_bytes / (ops * devices.count)))
    return max(compute, num_bytes / (devices.bandwidth_bytes_per_s * share))


class SliceCost:
    """All slices of a step on one replica, collectives included."""

    def __init__(
        self,
        model: ModelCost,
        devices: Devices,
        *,
        dtype: str,
        efficiency: Efficiency,
        profile: Profile | None = None,
    ) -> None:
        """
        Raises:
            ConfigError: the devices cannot compute in `dtype`.
        """
        self._model = model
        self._devices = devices
        self._dtype = dtype
        self._efficiency = efficiency
        self._measured: Curve | None = None
        if profile is not None:
            self._measured = profile.slices_on(devices.device.name, devices.count)
        self._known: dict[tuple[int, int], float] = {}
        self._known_work: dict[tuple[int, int], tuple[float, float]] = {}
        devices.flops_per_s(dtype)

    def seconds(self, rows: int, logit_rows: int | None = None) -> float:
        """
        Args:
            logit_rows: rows whose logits are computed; None: all.
        """
        logits = rows if logit_rows is None else logit_rows
        if rows == 0:
            return 0.0
        seconds = self._known.get((rows, logits))
        if seconds is None:
            seconds = self._compute(rows, logits)
            self._known[rows, logits] = seconds
        return seconds

    def work(self, rows: int, logit_rows: int) -> tuple[float, float]:
        """FLOPs and bytes."""
        if rows == 0:
            return 0.0, 0.0
        work = self._known_work.get((rows, logit_rows))
        if work is None:
            model = self._model
            work = model.slice_flops(rows, logit_rows), model.slice_bytes(rows, logit_rows)
            self._known_work[rows, logit_rows] = work
        return work

    def _compute(self, rows: int, logits: int) -> float:
        if self._measured is not None:
            return self._measured.at(rows)
        flops, num_bytes = self.work(rows, logits)
        return self.collectives_s(rows) + roofline_s(
            flops,
            num_bytes,
            self._devices,
            self._dtype,
            self._efficiency,
            rows=rows,
            ops=len(self._model.layers),
        )

    def collectives_s(self, rows: int) -> float:
        """Two all-reduces of the rows per layer among the ranks (ring), which nothing hides."""
        ranks = self._devices.count
        if ranks == 1:
            return 0.0
        device, e, model = self._devices.device, self._efficiency, self._model
        rate = link_bytes_per_s(device, e, in_one_machine=True)
        num_bytes = 2 * (ranks - 1) / ranks * rows * model.hidden_size * model.bytes_per_element
        return 2 * len(model.layers) * (e.collective_latency_s + num_bytes / rate)


class AttentionCost:
    """The attention ops of a step on the devices of one executor."""

    def __init__(
        self,
        model: ModelCost,
        devices: Devices,
        *,
        dtype: str,
        efficiency: Efficiency,
        profile: Profile | None = None,
    ) -> None:
        self._model = model
        self._devices = devices
        self._dtype = dtype
        self._efficiency = efficiency
        self._measured: AttentionTime | None = None
        self._speed = devices.count * devices.bandwidth_share
        if profile is not None:
            name = devices.device.name
            self._measured = profile.attention_on(name)
            if together := profile.attention_on(name, devices.count):
                self._measured = together
                self._speed = devices.bandwidth_share
        # Without windows time is linear in the tokens attended to.
        self._full = all(layer.window is None for layer in model.layers)
        self._bytes_per_token = model.attention_bytes(1)
        self._flops_per_token = model.attention_flops(1)

    def work(self, rows: float, tokens: float) -> tuple[float, float]:
        """FLOPs and bytes of `rows` decode rows that attend to `tokens` tokens in all.

        With sliding windows the rows are taken to be of equal length.
        """
        if self._full or rows == 0:
            return tokens * self._flops_per_token, tokens * self._bytes_per_token
        context = tokens / rows
        return (
            rows * self._model.attention_flops(context),
            rows * self._model.attention_bytes(context),
        )

    def seconds(self, rows: float, tokens: float) -> float:
        """Decode rows. Shares count as parts of a row: half the heads of a row are 0.5 rows."""
        if tokens <= 0:
            return 0.0
        if self._measured is not None:
            return self._measured.decode.at(rows, tokens / rows) / self._speed
        flops, num_bytes = self.work(rows, tokens)
        return roofline_s(
            flops,
            num_bytes,
            self._devices,
            self._dtype,
            self._efficiency,
            rows=1,
            ops=len(self._model.layers),
        )

    def prompt_work(self, rows: int, before: int) -> tuple[float, float]:
        """FLOPs and bytes of a prompt's rows that attend to each other and to `before` tokens."""
        model = self._model
        flops = rows * model.attention_flops(before + (rows + 1) / 2)
        return flops, model.attention_bytes(before + rows) if before else 0.0

    def prompt_seconds(self, rows: int, before: int) -> float:
        """A chunk of one prompt."""
        if self._measured is not None and self._measured.prompt is not None:
            speed = self._devices.count * self._devices.compute_share
            return self._measured.prompt.at(rows, before) / speed
        flops, num_bytes = self.prompt_work(rows, before)
        return roofline_s(
            flops,
            num_bytes,
            self._devices,
            self._dtype,
            self._efficiency,
            rows=rows,
            ops=len(self._model.layers),
        )


def min_bandwidth_bytes_per_s(
    model: ModelCost, batch: float, model_s: float, attention_s: float, *, alpha: float
) -> float:
    """Least bandwidth between model and attention workers that adds at most a fraction `alpha` to a
    step's time (Lamina, section 3.1, which writes (2 + 2/G) e d B L for the bytes).

    Args:
        model_s: MTIME(B).
        attention_s: ATIME(B, l).
    """
    if not alpha > 0:
        raise ConfigError(f"alpha must be positive, got {alpha}")
    return model.hop_bytes_per_row * batch / (alpha * (model_s + attention_s))
