"""What there is to plan with: devices, how many, what links them, what they cost.

As a line of text: parts with commas between them, each some devices or the speed of the network

    2 x RTX 4090, 3 x RTX 3090 at $0.20, 1 CPU box with 512 GB, 25 GbE

or as a TOML or JSON file:

    link = "25 GbE"
    [[devices]]
    device = "RTX 4090"      # a name of the catalogue or of a hardware file
    count = 2
    price_per_hour = 0.35    # of one; and, if they differ from the catalogue's,
    memory = "24 GB"
    network = "10 GbE"       # to other machines
    interconnect = "25 GB/s" # to devices of its kind in the same machine
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from lamina.errors import ConfigError
from lamina.plan.deployment import Pool
from lamina.plan.hardware import Device, find_device
from lamina.plan.names import normalise

GENERIC = dict.fromkeys(
    ("cpu", "cpubox", "cpuboxes", "cpumachine", "cpumachines", "cpuserver", "cpuservers"),
    "2x EPYC 9654",
)
"""What somebody means who does not say which machine (normalised names)."""
OWN_PRICE = "given with the inventory"

_MEMORY = {"gb": 1e9, "gib": 2**30, "tb": 1e12, "tib": 2**40}
_RATES = {
    "gbe": 1e9 / 8, "gbps": 1e9 / 8, "gbit/s": 1e9 / 8, "gb/s": 1e9, "gib/s": 2**30,
    "mbe": 1e6 / 8, "mbps": 1e6 / 8, "mbit/s": 1e6 / 8, "mb/s": 1e6, "tb/s": 1e12,
}  # fmt: skip
_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """Devices to plan with; every pool is of another device."""

    pools: tuple[Pool, ...]
    notes: tuple[str, ...] = ()
    """What was taken for granted."""

    def __post_init__(self) -> None:
        if not self.pools:
            raise ConfigError("the inventory has no devices; give some such as 2 x RTX 4090")

    def __str__(self) -> str:
        return ", ".join(f"{pool.count} x {pool.device.name}" for pool in self.pools)


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Devices as a file gives them."""

    device: str
    count: int = 1
    memory: str | None = None
    network: str | None = None
    interconnect: str | None = None
    price_per_hour: float | None = None


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    devices: list[_Entry]
    link: str | None = None


def open_inventory(spec: str, devices: Mapping[str, Device]) -> Inventory:
    """The inventory that a line of text or a file describes.

    Args:
        spec: the text, or the path of a .toml or .json file.
        devices: the known ones.

    Raises:
        ConfigError: the file cannot be read, a part cannot be understood, or a device is unknown
            (with the nearest names).
    """
    path = Path(spec)
    if path.suffix in (".toml", ".json"):
        return _resolved(_read(path), devices)
    return parse_inventory(spec, devices)


def parse_inventory(text: str, devices: Mapping[str, Device]) -> Inventory:
    """The inventory of a line of text. Raises as `open_inventory`."""
    link: str | None = None
    entries = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if _amount(part, _RATES) is not None:
            if link is not None:
                raise ConfigError(f"inventory {text!r} gives the network's speed twice")
            link = part
        else:
            entries.append(_entry(part, devices))
    return _resolved(_File(devices=entries, link=link), devices)


def _entry(part: str, devices: Mapping[str, Device]) -> _Entry:
    match = re.fullmatch(
        rf"(?P<what>.+?)(?:\s+with\s+(?P<memory>{_NUMBER}\s*[a-z]+))?"
        rf"(?:\s+(?:at|for)\s+\$?\s*(?P<price>{_NUMBER})\s*(?:\$|usd)?\s*(?:/\s*h(?:our)?)?)?",
        part,
        re.IGNORECASE,
    )
    assert match is not None, "the first group takes anything"
    what, count = match["what"], 1
    if normalise(what) not in map(normalise, devices):  # a name may begin like a count
        counted = re.fullmatch(r"([0-9]+)\s*(?:x\s*|×\s*|\s)(.+)", what, re.IGNORECASE)
        if counted is not None:
            count, what = int(counted[1]), counted[2].strip()
    price = match["price"]
    return _Entry(
        device=what,
        count=count,
        memory=match["memory"],
        price_per_hour=None if price is None else float(price),
    )


def _read(path: Path) -> _File:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"inventory {path} cannot be read: {error}") from None
    try:
        tables: Any = (
            tomllib.loads(text) if path.suffix == ".toml" else msgspec.json.decode(text.encode())
        )
        return msgspec.convert(tables, _File)
    except (tomllib.TOMLDecodeError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"inventory {path}: {error}; it has link and a list of devices, each with "
            f"{', '.join(_Entry.__struct_fields__)}"
        ) from None


def _resolved(file: _File, devices: Mapping[str, Device]) -> Inventory:
    link = None if file.link is None else _rate(file.link, "link")
    notes: list[str] = []
    counts: dict[str, int] = {}
    known: dict[str, Device] = {}
    for entry in file.devices:
        device = _device(entry, link, devices, notes)
        if known.get(device.name, device) != device:  # two sizes of one machine
            name = f"{device.name} ({device.memory_bytes / 1e9:.0f} GB)"
            device = msgspec.structs.replace(device, name=name)
        if known.setdefault(device.name, device) != device:
            raise ConfigError(
                f"inventory: {entry.device} is given more than once with different figures; "
                "describe one of them under a name of its own in a hardware file"
            )
        if entry.count < 1:
            raise ConfigError(f"the number of {entry.device} must be at least 1, got {entry.count}")
        counts[device.name] = counts.get(device.name, 0) + entry.count
    return Inventory(
        pools=tuple(Pool(device=known[name], count=count) for name, count in counts.items()),
        notes=tuple(dict.fromkeys(notes)),
    )


def _device(
    entry: _Entry, link: float | None, devices: Mapping[str, Device], notes: list[str]
) -> Device:
    name = entry.device
    if normalise(name) in GENERIC and normalise(name) not in map(normalise, devices):
        machine = GENERIC[normalise(name)]
        notes.append(f"{name} is taken to be a {machine}: name the machine for its own figures")
        name = machine
    device = find_device(name, dict(devices))
    changes: dict[str, Any] = {}
    sources = dict(device.sources)
    if entry.memory is not None:
        changes["memory_bytes"] = int(_of(entry.memory, _MEMORY, f"memory of {name}", "512 GB"))
    if entry.network is not None or link is not None:
        changes["network_bytes_per_s"] = (
            link if entry.network is None else _rate(entry.network, f"network of {name}")
        )
    if entry.interconnect is not None:
        rate = _rate(entry.interconnect, f"interconnect of {name}")
        changes["interconnect_bytes_per_s"] = rate
    if entry.price_per_hour is not None:
        changes["price_per_hour"] = entry.price_per_hour
        sources["price_per_hour"] = OWN_PRICE
    return msgspec.structs.replace(device, **changes, sources=sources)


def _amount(text: str, units: Mapping[str, float]) -> float | None:
    match = re.fullmatch(rf"{_NUMBER}\s*([a-z/]+)", text.strip(), re.IGNORECASE)
    if match is None or match[2].lower() not in units:
        return None
    return float(match[1]) * units[match[2].lower()]


def _of(text: str, units: Mapping[str, float], what: str, example: str) -> float:
    value = _amount(text, units)
    if not value:
        raise ConfigError(f"{what} must be an amount such as {example}, got {text!r}")
    return value


def _rate(text: str, what: str) -> float:
    return _of(text, _RATES, what, "25 GbE or 3.1 GB/s")
