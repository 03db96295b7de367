"""Measured times of a model's parts on the devices at hand; they replace the roofline.

`lamina calibrate` writes a profile, a JSON file; the cost model, the simulator and the engine read
it. Between measured points times are interpolated linearly, beyond the last one they go on along
the last piece, below the first one they stay as they are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from lamina.errors import ConfigError
from lamina.plan.hardware import Device

VERSION = 1


def thread_device(num_threads: int) -> str:
    """What `lamina calibrate` calls so many threads of a machine."""
    return f"cpu-{num_threads}"


def _check_grid(grid: Sequence[float], what: str) -> None:
    if not grid or any(b <= a for a, b in pairwise(grid)) or grid[0] < 0:
        raise ConfigError(f"{what} must be increasing numbers of at least 0, got {list(grid)}")


def _piece(grid: Sequence[float], x: float) -> tuple[int, float]:
    """The piece of the grid that x lies in (or goes on from) and how far along it is."""
    if len(grid) == 1:
        return 0, 0.0
    i = min(max(bisect_right(grid, x) - 1, 0), len(grid) - 2)
    return i, max(0.0, (x - grid[i]) / (grid[i + 1] - grid[i]))


class Curve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values over a grid of sizes."""

    sizes: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_grid(self.sizes, "sizes")
        if len(self.values) != len(self.sizes):
            raise ConfigError(
                f"values must be as many as sizes ({len(self.sizes)}), got {len(self.values)}"
            )

    def at(self, size: float) -> float:
        i, along = _piece(self.sizes, size)
        value = self.values[i]
        return value + along * (self.values[i + 1] - value) if along else value


class Surface(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds over a grid of two sizes."""

    sizes: tuple[float, ...]
    contexts: tuple[float, ...]
    seconds: tuple[tuple[float, ...], ...]
    """One row per size, one column per context."""

    def __post_init__(self) -> None:
        _check_grid(self.sizes, "sizes")
        _check_grid(self.contexts, "contexts")
        if len(self.seconds) != len(self.sizes) or any(
            len(row) != len(self.contexts) for row in self.seconds
        ):
            raise ConfigError(
                f"seconds must be {len(self.sizes)} rows (sizes) of {len(self.contexts)} (contexts)"
            )

    def at(self, size: float, context: float) -> float:
        i, down = _piece(self.sizes, size)
        j, right = _piece(self.contexts, context)

        def along(row: tuple[float, ...]) -> float:
            return row[j] + (right * (row[j + 1] - row[j]) if right else 0.0)

        first = along(self.seconds[i])
        return first + (down * (along(self.seconds[i + 1]) - first) if down else 0.0)


class SlicesTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All slices of one step on one replica, collectives included, attention excluded."""

    device: str
    tensor_parallel: int = 1
    seconds: Curve
    """Over the rows of the step."""


class AttentionTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Attention of one step in all layers with all heads on one or several devices."""

    device: str
    workers: int = 1
    """Devices that share the heads evenly and work side by side."""
    decode: Surface
    """Over the batch (one row per sequence) and the context that each attends to."""
    prompt: Surface | None = None
    """Over the rows of one prompt's chunk and the tokens before it; None: from the roofline."""


class HopTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message between a model worker and an attention worker."""

    transport: str
    latency_s: float
    """Of an empty message, one way."""
    bandwidth_bytes_per_s: float


class SideBySide(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Model worker and attention workers on one machine: what they do to each other there.

    They share the memory bus, and cores where both have more threads than there are cores.
    """

    model: str
    """Device of the model worker."""
    ranks: int = 1
    attention: str
    """Device of the attention workers."""
    workers: int = 1
    slices_slowdown: Curve
    """How many times longer slices take while attention runs, over their rows."""
    attention_slowdown: Curve
    """How many times longer attention takes while slices run, over the slices' rows."""
    hop_s: Curve
    """Per layer, what a step takes beyond slices and attention: packing, hops, waking, merging.
    Over the bytes that cross in the layer, both directions together."""
    hop_busy_s: Curve
    """The part of it that does not pass while another micro-batch is served."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything measured of one model on one machine or cluster. What is missing is estimated."""

    version: int = VERSION
    model: str
    config: dict[str, Any] = {}
    """The Hugging Face config of the model, which `scaling` needs to cost others by it."""
    devices: tuple[Device, ...] = ()
    """Of this machine, as measured: deployments can name them."""
    side_by_side: tuple[SideBySide, ...] = ()
    slices: tuple[SlicesTime, ...] = ()
    attention: tuple[AttentionTime, ...] = ()
    hops: tuple[HopTime, ...] = ()
    step_overhead_s: float = 0.0
    """Of the engine per step: planning, sampling, reports."""
    row_overhead_s: float = 0.0
    """Of the engine per row that yields a token."""

    def with_devices(self, devices: dict[str, Device]) -> dict[str, Device]:
        """These and the profile's own, which replace those of the same name."""
        return devices | {device.name: device for device in self.devices}

    def slices_on(self, device: str, tensor_parallel: int) -> Curve | None:
        for entry in self.slices:
            if (entry.device, entry.tensor_parallel) == (device, tensor_parallel):
                return entry.seconds
        return None

    def attention_on(self, device: str, workers: int = 1) -> AttentionTime | None:
        for entry in self.attention:
            if (entry.device, entry.workers) == (device, workers):
                return entry
        return None

    def beside(self, model: str, ranks: int, attention: str, workers: int) -> SideBySide | None:
        """What was measured of these working side by side."""
        wanted = (model, ranks, attention, workers)
        for entry in self.side_by_side:
            if (entry.model, entry.ranks, entry.attention, entry.workers) == wanted:
                return entry
        return None

    def hop(self, transport: str | None) -> HopTime | None:
        """The transport's, or the first one if none is named."""
        if transport is None:
            return self.hops[0] if self.hops else None
        return next((entry for entry in self.hops if entry.transport == transport), None)


def read_profile(file: Path) -> Profile:
    """
    Raises:
        ConfigError: the file cannot be read or is not a profile of this version.
    """
    try:
        profile = msgspec.json.decode(file.read_bytes(), type=Profile)
    except OSError as error:
        raise ConfigError(f"profile {file} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, ConfigError) as error:
        raise ConfigError(
            f"profile {file} is not valid: {error}; write it again with lamina calibrate"
        ) from None
    if profile.version != VERSION:
        raise ConfigError(
            f"profile {file} has version {profile.version}, this Lamina reads {VERSION}; "
            "write it again with lamina calibrate"
        )
    return profile


def write_profile(profile: Profile, file: Path) -> None:
    file.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
