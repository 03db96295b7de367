"""A profile of one model turned into one of another model on the same machine.

Times follow the work that they are made of: a step of one row reads the weights, and what more rows
add is arithmetic; attention reads the cache; a hop carries bytes. Efficiencies are taken to be
those of the measured model, so the two should have the same data type and number of query heads per
KV head.
"""

from __future__ import annotations

import msgspec

from lamina.errors import ConfigError
from lamina.plan.configs import model_cost
from lamina.plan.layers import ModelCost
from lamina.plan.profile import AttentionTime, Curve, Profile, SlicesTime, Surface


def scaled(profile: Profile, model: ModelCost) -> Profile:
    """The profile as it would be of `model`; unchanged if that is what was measured.

    Raises:
        ConfigError: the profile does not say which model it is of.
    """
    if not profile.config:
        raise ConfigError(
            f"the profile is of {profile.model} and holds no config to cost {model.name} by; "
            "write it again with lamina calibrate"
        )
    measured = model_cost(profile.config, name=profile.model)
    if msgspec.structs.replace(measured, name=model.name) == model:
        return profile
    return msgspec.structs.replace(
        profile,
        model=model.name,
        slices=tuple(_slices(entry, measured, model) for entry in profile.slices),
        attention=tuple(_attention(entry, measured, model) for entry in profile.attention),
    )


def _slices(entry: SlicesTime, measured: ModelCost, model: ModelCost) -> SlicesTime:
    curve = entry.seconds
    rows = curve.sizes
    reading_s = curve.at(1)

    def seconds(size: float, value: float) -> float:
        num_bytes = model.slice_bytes(size) / measured.slice_bytes(size)
        flops = model.slice_flops(size) / measured.slice_flops(size)
        return min(reading_s, value) * num_bytes + max(0.0, value - reading_s) * flops

    values = tuple(seconds(size, value) for size, value in zip(rows, curve.values, strict=True))
    return msgspec.structs.replace(entry, seconds=Curve(sizes=rows, values=values))


def _attention(entry: AttentionTime, measured: ModelCost, model: ModelCost) -> AttentionTime:
    def of(surface: Surface, extra: bool) -> Surface:
        return Surface(
            sizes=surface.sizes,
            contexts=surface.contexts,
            seconds=tuple(
                tuple(
                    value * _attention_ratio(measured, model, context + (size if extra else 0))
                    for context, value in zip(surface.contexts, row, strict=True)
                )
                for size, row in zip(surface.sizes, surface.seconds, strict=True)
            ),
        )

    prompt = None if entry.prompt is None else of(entry.prompt, True)
    return msgspec.structs.replace(entry, decode=of(entry.decode, False), prompt=prompt)


def _attention_ratio(measured: ModelCost, model: ModelCost, context: float) -> float:
    return model.attention_bytes(max(1, context)) / measured.attention_bytes(max(1, context))
