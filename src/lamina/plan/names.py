"""Looking things up by name, and what to say when the name is unknown."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import TypeVar

from lamina.errors import ConfigError

T = TypeVar("T")

_NUM_SUGGESTIONS = 3


def normalise(name: str) -> str:
    """Letters and digits only, lower case: `RTX 4090`, `rtx-4090` and `rtx4090` are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_by_name(name: str, known: Mapping[str, T], what: str, remedy: str) -> T:
    """The entry of that name; case, spaces and hyphens do not matter.

    Args:
        what: what the names are names of, for the message.
        remedy: what to do if none of the suggestions is meant.

    Raises:
        ConfigError: there is none; names the nearest ones.
    """
    by_normal = {normalise(key): key for key in known}
    wanted = normalise(name)
    if wanted in by_normal:
        return known[by_normal[wanted]]
    near = difflib.get_close_matches(wanted, by_normal, n=_NUM_SUGGESTIONS, cutoff=0.5)
    # `A100` is short for both sizes, however unlike the whole names are.
    near = list(dict.fromkeys([n for n in by_normal if wanted and wanted in n] + near))
    hint = (
        f"did you mean {' or '.join(by_normal[n] for n in near[:_NUM_SUGGESTIONS])}?"
        if near
        else f"known are {', '.join(known)}."
    )
    raise ConfigError(f"{what} {name!r} is unknown; {hint} {remedy}")
