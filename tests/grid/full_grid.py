"""The same tokens over every deployment of the grid: `make test-grid`, about an hour on two cores.

`-k` picks some: the ids read `llama-n2-r1-tp1-w3-heads-early` for a pipeline of depth 2 with one
replica of one rank, 3 attention workers that share the heads, and early q.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from support.grid import Deployment, full_grid
from support.grid_tokens import FamilyTokens


@pytest.fixture(scope="module")
def family_tokens(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FamilyTokens]:
    return cache(lambda family: FamilyTokens(family, tmp_path_factory.mktemp(family)))


@pytest.mark.parametrize("deployment", full_grid(), ids=str)
def test_tokens_are_those_of_transformers(
    deployment: Deployment, family_tokens: Callable[[str], FamilyTokens]
) -> None:
    tokens = family_tokens(deployment.family)
    tokens.check(deployment.num_workers, **deployment.settings)
