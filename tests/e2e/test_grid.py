"""The same tokens over deployments that have every pair of settings; all of them: tests/grid."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from support.grid import Deployment, covering_set, full_grid
from support.grid_tokens import FamilyTokens


@pytest.fixture(scope="module")
def family_tokens(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FamilyTokens]:
    return cache(lambda family: FamilyTokens(family, tmp_path_factory.mktemp(family)))


CASES = covering_set(full_grid(), cost=lambda deployment: deployment.num_processes)


@pytest.mark.parametrize("deployment", CASES, ids=str)
def test_tokens_are_those_of_transformers(
    deployment: Deployment, family_tokens: Callable[[str], FamilyTokens]
) -> None:
    tokens = family_tokens(deployment.family)
    tokens.check(deployment.num_workers, **deployment.settings)


@pytest.mark.parametrize("early_q", [True, False])
def test_deferring_nothing_does_not_change_tokens(
    early_q: bool, family_tokens: Callable[[str], FamilyTokens]
) -> None:
    family_tokens("gpt_neox").check(2, pipeline_depth=2, defer=False, early_q=early_q)
