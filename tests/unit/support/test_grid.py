"""The covering set of deployments covers, and is small."""

from __future__ import annotations

from itertools import product

from support.grid import FAMILIES, covering_set, full_grid, pairs


def test_the_grid_has_every_deployment_once() -> None:
    grid = full_grid()
    assert len(grid) == len(set(grid)) == len(FAMILIES) * 9 * 2 * 4 * 3 * 2
    assert len({str(deployment) for deployment in grid}) == len(grid)
    assert all(d.pipeline_depth >= d.model_replicas for d in grid)


def test_every_pair_is_covered() -> None:
    grid = full_grid()
    chosen = covering_set(grid, cost=lambda deployment: deployment.num_processes)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, grid))
    assert set(chosen) <= set(grid)
    # Two parameters have four values each, so 16 is the least.
    assert 16 <= len(chosen) <= 24


def test_of_equally_good_cases_the_cheapest_is_taken() -> None:
    cases = list(product("ab", (1, 2)))
    assert covering_set(cases, cost=lambda case: -case[1])[0] == ("a", 2)
    assert covering_set(cases)[0] == ("a", 1)


def test_it_is_the_same_each_time() -> None:
    assert covering_set(full_grid()) == covering_set(full_grid())


def test_constraints_are_kept() -> None:
    cases = [case for case in product((1, 2, 3), (1, 2, 3), "ab") if case[0] >= case[1]]
    chosen = covering_set(cases)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, cases))
    assert len(chosen) < len(cases)
