"""Model costs by what a user writes: a known name, a model folder, a config.json."""

from __future__ import annotations

import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from lamina.errors import ConfigError
from lamina.plan.configs import model_cost
from lamina.plan.layers import LayerCost, ModelCost
from lamina.plan.names import find_by_name

__all__ = ["LayerCost", "ModelCost", "load_model", "model_cost", "named_configs"]


def load_model(model: str | Path) -> ModelCost:
    """The costs of a named model (`models.toml`), a model folder or a config.json.

    Raises:
        ConfigError: there is none of that name, or its config cannot be understood.
    """
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            config = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} cannot be read as a model's config: {error}") from None
        return model_cost(config, name=path.resolve().name if path.is_dir() else str(model))
    if path.is_dir():
        raise ConfigError(f"{path} has no config.json; give a model folder that has one")
    known = named_configs()
    config = find_by_name(
        str(model), known, "model", "Otherwise give a model folder or a config.json."
    )
    return model_cost(config, name=next(name for name, c in known.items() if c is config))


def named_configs() -> dict[str, dict[str, Any]]:
    """Configs of the papers' models and some others, by name; each has its `source`."""
    return tomllib.loads((resources.files("lamina.plan") / "models.toml").read_text())
