"""Deployments: which devices do what. One line of text names one.

mono:4xH100                                tensor-parallel over four devices
dop:2xH100/4xH20,depth=2                   model workers / attention workers
dop:4xH100/2xH20+2xL40S,replicas=2,depth=3 two replicas of two ranks, mixed attention workers
pd:1xA100 80GB/1xA100 80GB                 prefill instances / decode instance
pd:1xA100 80GB/1xA100 80GB,offload=auto    some decode attention on the prefill instances
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from lamina.config import MAX_PIPELINE_DEPTH
from lamina.errors import ConfigError
from lamina.plan.hardware import Device, find_device
from lamina.plan.names import find_by_name, normalise

DEVICES_PER_MACHINE = 8


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """Some equal devices."""

    device: Device
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(
                f"the number of {self.device.name} must be at least 1, got {self.count}"
            )

    def __str__(self) -> str:
        return f"{self.count}x{self.device.name}"


class Monolithic(msgspec.Struct, frozen=True, kw_only=True):
    """Model and attention on the same devices, tensor-parallel."""

    devices: Pool

    @property
    def pools(self) -> tuple[Pool, ...]:
        return (self.devices,)

    def __str__(self) -> str:
        return f"mono:{self.devices}"


class Disaggregated(msgspec.Struct, frozen=True, kw_only=True):
    """Model-attention disaggregation: DOP (a, b) with a model devices and b attention devices."""

    model: Pool
    """All ranks of all replicas."""
    attention: tuple[Pool, ...]
    replicas: int = 1
    depth: int = 2
    """Micro-batches in flight."""
    partition: Literal["heads", "requests"] = "heads"
    early_q: bool = True

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.model.count % self.replicas:
            raise ConfigError(
                f"replicas ({self.replicas}) must divide the model devices ({self.model.count})"
            )
        if not self.replicas <= self.depth <= MAX_PIPELINE_DEPTH:
            raise ConfigError(
                f"depth ({self.depth}) must be at least replicas ({self.replicas}) and at most "
                f"{MAX_PIPELINE_DEPTH}"
            )

    @property
    def pools(self) -> tuple[Pool, ...]:
        return (self.model, *self.attention)

    @property
    def num_ranks(self) -> int:
        """Tensor-parallel ranks of a replica."""
        return self.model.count // self.replicas

    def __str__(self) -> str:
        options = f",replicas={self.replicas}" if self.replicas > 1 else ""
        if self.partition != "heads":
            options += f",partition={self.partition}"
        if not self.early_q:
            options += ",early_q=no"
        workers = "+".join(map(str, self.attention))
        return f"dop:{self.model}/{workers},depth={self.depth}{options}"


class Offload(msgspec.Struct, frozen=True, kw_only=True):
    """Decode attention of some requests beside prefill instances (`sched.offload`)."""

    ratio: float | None = None
    """Most offloaded work per local work; None: the policy's bounds."""
    compute_share: float = 0.2
    """Of a prefill device's computing units, for its executor."""
    bandwidth_share: float = 0.6
    """Of its memory bandwidth that an executor with these units reaches."""

    def __post_init__(self) -> None:
        if self.ratio is not None and self.ratio < 0:
            raise ConfigError(f"offload must be auto or a ratio of at least 0, got {self.ratio}")
        for field in ("compute_share", "bandwidth_share"):
            if not 0 < getattr(self, field) < 1:
                raise ConfigError(f"{field} must be between 0 and 1, got {getattr(self, field)}")


class PrefillDecode(msgspec.Struct, frozen=True, kw_only=True):
    """Prefill instances and one decode instance."""

    prefill: Pool
    """All ranks of all prefill instances."""
    decode: Pool
    """Ranks of the decode instance."""
    prefill_ranks: int = 1
    """Of each prefill instance."""
    offload: Offload | None = None

    def __post_init__(self) -> None:
        if self.prefill_ranks < 1 or self.prefill.count % self.prefill_ranks:
            raise ConfigError(
                f"prefill_ranks ({self.prefill_ranks}) must divide the prefill devices "
                f"({self.prefill.count})"
            )

    @property
    def pools(self) -> tuple[Pool, ...]:
        return (self.prefill, self.decode)

    @property
    def in_one_machine(self) -> bool:
        """Whether KV and rows move between chips: one kind of device, as few as a machine has."""
        count = self.prefill.count + self.decode.count
        return self.prefill.device.name == self.decode.device.name and count <= DEVICES_PER_MACHINE

    @property
    def num_prefill_instances(self) -> int:
        return self.prefill.count // self.prefill_ranks

    def __str__(self) -> str:
        text = f"pd:{self.prefill}/{self.decode}"
        if self.prefill_ranks > 1:
            text += f",prefill_ranks={self.prefill_ranks}"
        if self.offload is None:
            return text
        ratio = self.offload.ratio
        return text + (",offload=auto" if ratio is None else f",offload={ratio:g}")


Deployment = Monolithic | Disaggregated | PrefillDecode


def price_per_hour(deployment: Deployment) -> float | None:
    """US dollars; None if the price of a device is not known."""
    return _total((pool.count, pool.device.price_per_hour) for pool in deployment.pools)


def power_w(deployment: Deployment) -> float | None:
    """Limit of all devices together; None if that of one is not known."""
    return _total((pool.count, pool.device.power_w) for pool in deployment.pools)


def _total(parts: Iterable[tuple[int, float | None]]) -> float | None:
    total = 0.0
    for count, value in parts:
        if value is None:
            return None
        total += count * value
    return total


_EXAMPLE = "such as mono:4xH100, dop:2xH100/4xH20,depth=2 or pd:1xH100/1xH100,offload=auto"
_OPTIONS: dict[str, tuple[str, ...]] = {
    "mono": (),
    "dop": ("depth", "replicas", "partition", "early_q"),
    "pd": ("prefill_ranks", "offload", "compute_share", "bandwidth_share"),
}


def parse_deployment(text: str, devices: Mapping[str, Device]) -> Deployment:
    """The deployment that a line of text (see the module) names.

    Raises:
        ConfigError: a device, option or kind is unknown (names the nearest), or a number is wrong.
    """
    kind, colon, rest = text.partition(":")
    if not colon:
        raise ConfigError(f"deployment {text!r} must be {_EXAMPLE}")
    find_by_name(kind, {name: name for name in _OPTIONS}, "kind of deployment", f"({_EXAMPLE})")
    where, *given = rest.split(",")
    options: dict[str, str] = {}
    for part in given:
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise ConfigError(f"deployment {text!r}: {part!r} must be an option such as depth=2")
        known = {name: name for name in _OPTIONS[kind]}
        hint = f"({', '.join(known) or 'there are none'})"
        options[find_by_name(key.strip(), known, f"option of {kind}", hint)] = value.strip()
    sides = [[_pool(part, devices) for part in side.split("+")] for side in where.split("/")]
    if len(sides) != (1 if kind == "mono" else 2):
        raise ConfigError(f"deployment {text!r} must be {_EXAMPLE}")
    if len(sides[0]) > 1 or (kind == "pd" and len(sides[1]) > 1):
        raise ConfigError(
            f"deployment {text!r}: only attention workers may be of several kinds of device"
        )
    if kind == "mono":
        return Monolithic(devices=sides[0][0])
    if kind == "dop":
        return _disaggregated(sides[0][0], sides[1], options)
    ranks = _int(options, "prefill_ranks", 1)
    options.pop("prefill_ranks", None)
    return PrefillDecode(
        prefill=sides[0][0], decode=sides[1][0], prefill_ranks=ranks, offload=_offload(options)
    )


def _disaggregated(model: Pool, attention: list[Pool], options: dict[str, str]) -> Disaggregated:
    replicas = _int(options, "replicas", 1)
    partition = options.get("partition", "heads")
    if partition not in ("heads", "requests"):
        raise ConfigError(f"partition must be heads or requests, got {partition!r}")
    return Disaggregated(
        model=model,
        attention=tuple(attention),
        replicas=replicas,
        depth=_int(options, "depth", replicas + 1),
        partition=partition,  # type: ignore[arg-type]
        early_q=_bool(options, "early_q", True),
    )


def _offload(options: dict[str, str]) -> Offload | None:
    if "offload" not in options:
        if options:
            raise ConfigError(f"{', '.join(options)} need offload, such as offload=auto")
        return None
    shares = {name: _float(options, name) for name in options if name != "offload"}
    ratio = None if options["offload"] == "auto" else _float(options, "offload")
    return Offload(ratio=ratio, **shares)


def _pool(text: str, devices: Mapping[str, Device]) -> Pool:
    if normalise(text) in map(normalise, devices):  # a name may begin like a count: 2x EPYC 9654
        return Pool(device=find_device(text, dict(devices)))
    match = re.fullmatch(r"\s*(?:([0-9]+)\s*x\s*)?(.+?)\s*", text)
    if match is None:
        raise ConfigError(f"devices must be given such as 4xH100, got {text!r}")
    return Pool(device=find_device(match.group(2), dict(devices)), count=int(match.group(1) or 1))


def _int(options: dict[str, str], key: str, default: int) -> int:
    text = options.get(key, str(default))
    if not re.fullmatch(r"[0-9]+", text):
        raise ConfigError(f"{key} must be a number, got {text!r}")
    return int(text)


def _float(options: dict[str, str], key: str) -> float:
    try:
        return float(options[key])
    except ValueError:
        raise ConfigError(f"{key} must be a number, got {options[key]!r}") from None


def _bool(options: dict[str, str], key: str, default: bool) -> bool:
    text = options.get(key)
    if text is None:
        return default
    if text not in ("yes", "no"):
        raise ConfigError(f"{key} must be yes or no, got {text!r}")
    return text == "yes"
