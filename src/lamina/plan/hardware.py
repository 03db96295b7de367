"""What devices can do, from public sources: `hardware.toml`, and a file of the user's own.

Figures are peaks as their makers print them (GB = 10^9 bytes, dense arithmetic); what share of a
peak is reached is the cost model's business.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec

from lamina.errors import ConfigError
from lamina.plan.names import find_by_name, normalise

_WIDER = {
    "fp8": ("bf16", "fp16", "fp32"),
    "int8": ("bf16", "fp16", "fp32"),
    "bf16": ("fp16", "fp32"),
    "fp16": ("bf16", "fp32"),
    "fp32": (),
}
"""Where a device has no arithmetic of a type, it computes in the first of these that it has. bf16
and fp16 stand in for each other: such a device is given the model in the type that it knows."""

BYTES_PER_TRANSFER = 8
"""A DRAM channel is 64 bits wide (DDR5's two subchannels together)."""


class Dram(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The memory channels of a CPU machine."""

    sockets: int
    channels_per_socket: int
    megatransfers_per_s: int

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            if getattr(self, field) < 1:
                raise ConfigError(f"dram.{field} must be at least 1, got {getattr(self, field)}")

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Of all sockets together."""
        return (
            self.sockets * self.channels_per_socket * self.megatransfers_per_s * 1e6
        ) * BYTES_PER_TRANSFER


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One accelerator, or one CPU machine with all its sockets.

    Raises:
        ConfigError: a figure is not positive, or a type of number is unknown.
    """

    name: str
    kind: Literal["gpu", "cpu", "tpu"]
    flops: dict[str, float]
    """Dense FLOP/s by dtype (fp32, fp16, bf16, fp8; int8: integer operations per second), with
    accumulation in float32."""
    memory_bytes: int
    bandwidth_bytes_per_s: float
    """Of its memory."""
    network_bytes_per_s: float
    """To other machines, one direction."""
    interconnect_bytes_per_s: float | None = None
    """To chips of its kind in the same machine, one direction; None: over PCIe or the network."""
    power_w: float | None = None
    """The maker's limit for the board (CPU machines: for the processors alone)."""
    price_per_hour: float | None = None
    """US dollars for renting one."""
    dram: Dram | None = None
    """CPU machines: what `bandwidth_bytes_per_s` follows from."""
    source: str
    """Address of the page that the figures are from."""
    sources: dict[str, str] = {}
    """Figures that are from elsewhere: field (or `flops.bf16`) -> address, `computed: ...`,
    `assumed: ...` or `unread: ...` (see `hardware.toml`)."""

    def __post_init__(self) -> None:
        def need(ok: bool, field: str, want: str, value: object) -> None:
            if not ok:
                raise ConfigError(f"device {self.name!r}: {field} must be {want}, got {value}")

        need(bool(self.flops), "flops", "given for at least one dtype", self.flops)
        for dtype, value in self.flops.items():
            need(dtype in _WIDER, "flops", f"of {', '.join(_WIDER)}", repr(dtype))
            need(value > 0, f"flops.{dtype}", "positive", value)
        for field in ("memory_bytes", "bandwidth_bytes_per_s", "network_bytes_per_s",
                      "interconnect_bytes_per_s", "power_w"):  # fmt: skip
            value = getattr(self, field)
            need(value is None or value > 0, field, "positive", value)
        price = self.price_per_hour
        need(price is None or price >= 0, "price_per_hour", "at least 0", price)
        fields = (*self.__struct_fields__, *(f"flops.{dtype}" for dtype in self.flops))
        for field in self.sources:
            need(field in fields, "sources", f"of {', '.join(fields)}", repr(field))

    def flops_for(self, dtype: str) -> float:
        """FLOP/s for work in `dtype`; in a wider type where the device has none of it.

        Raises:
            ConfigError: the type is unknown, or the device has nothing to compute it with.
        """
        if dtype not in _WIDER:
            raise ConfigError(f"dtype must be one of {', '.join(_WIDER)}, got {dtype!r}")
        for candidate in (dtype, *_WIDER[dtype]):
            if candidate in self.flops:
                return self.flops[candidate]
        raise ConfigError(
            f"device {self.name!r} has no figure for {dtype} or a type that could stand in for it; "
            f"give flops.{dtype} in a hardware file"
        )

    def source_of(self, field: str) -> str:
        """Where that figure is from; `field` may be `flops.bf16`."""
        if field == "bandwidth_bytes_per_s" and self.dram is not None:
            field = "dram" if field not in self.sources else field
        whole = field.partition(".")[0]
        return self.sources.get(field, self.sources.get(whole, self.source))


def load_devices(extra: Path | None = None) -> dict[str, Device]:
    """All known devices by name.

    Args:
        extra: a TOML file of the user's, one table per device with the fields of `Device`. A table
            with the name of a known device replaces the figures that it gives and keeps the rest.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key or a wrong value; says which.
    """
    text = (resources.files("lamina.plan") / "hardware.toml").read_text()
    tables = _tables(text, "hardware.toml")
    devices = {name: _device(name, table, "hardware.toml") for name, table in tables.items()}
    if extra is None:
        return devices
    try:
        text = extra.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"hardware file {extra} cannot be read: {error}") from None
    names = {normalise(name): name for name in devices}
    for given, table in _tables(text, str(extra)).items():
        name = names.get(normalise(given), given)
        own = {"source": str(extra)} | table
        if name in tables:
            replaced = {field: str(extra) for field in table if field not in ("source", "sources")}
            base = tables[name]
            sources = base.get("sources", {}) | replaced | table.get("sources", {})
            own = base | table | {"source": base["source"], "sources": sources}
        devices[name] = _device(name, own, str(extra))
    return devices


def find_device(name: str, devices: dict[str, Device]) -> Device:
    """The device of that name; case, spaces and hyphens do not matter.

    Raises:
        ConfigError: there is none; names the nearest ones.
    """
    return find_by_name(name, devices, "device", "Others can be given in a hardware file.")


def _tables(text: str, file: str) -> dict[str, dict[str, Any]]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not TOML: {error}") from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(
                f"{file}: {name} must be a table of a device's figures such as [{name}], "
                f"got {table!r}"
            )
    return tables


def _device(name: str, table: dict[str, Any], file: str) -> Device:
    values = dict(table)
    if "name" in values:
        raise ConfigError(f"{file}, device {name!r}: the table's own name is the device's; drop it")
    if isinstance(values.get("memory_bytes"), float) and values["memory_bytes"].is_integer():
        values["memory_bytes"] = int(values["memory_bytes"])
    dram = values.get("dram")
    try:
        if dram is not None:
            channels = msgspec.convert(dram, Dram)
            values.setdefault("bandwidth_bytes_per_s", channels.bandwidth_bytes_per_s)
        return msgspec.convert({"name": name, **values}, Device)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{file}, device {name!r}: {error}; the fields are "
            f"{', '.join(Device.__struct_fields__[1:])}"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
