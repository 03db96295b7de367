"""Deployments over which tokens must not change: all of them, and a set with all their pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple, TypeVar

_Case = TypeVar("_Case", bound=Sequence[Any])

FAMILIES = ("llama", "gemma3", "gpt_oss", "mixtral")


class Deployment(NamedTuple):
    """One way to run a model."""

    family: str
    pipeline_depth: int
    model_replicas: int
    tensor_parallel_size: int
    num_workers: int
    attention_partition: str
    early_q: bool

    def __str__(self) -> str:
        return (
            f"{self.family}-n{self.pipeline_depth}-r{self.model_replicas}"
            f"-tp{self.tensor_parallel_size}-w{self.num_workers}-{self.attention_partition}"
            f"-{'early' if self.early_q else 'late'}"
        )

    @property
    def num_processes(self) -> int:
        """Besides the engine's own."""
        num_ranks = self.model_replicas * self.tensor_parallel_size
        return self.num_workers + (num_ranks if num_ranks > 1 else 0)

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of the engine's config."""
        return {
            "pipeline_depth": self.pipeline_depth,
            "model_replicas": self.model_replicas,
            "tensor_parallel_size": self.tensor_parallel_size,
            "attention_partition": self.attention_partition,
            "early_q": self.early_q,
        }


def full_grid() -> list[Deployment]:
    """Every deployment in which each replica has a micro-batch."""
    return [
        deployment
        for values in product(
            FAMILIES,
            (1, 2, 3, 4),
            (1, 2, 3),
            (1, 2),
            (1, 2, 3, 4),
            ("heads", "requests", "tokens"),
            (True, False),
        )
        if (deployment := Deployment(*values)).pipeline_depth >= deployment.model_replicas
    ]


def pairs(case: Sequence[Any]) -> set[tuple[int, Any, int, Any]]:
    """Every two values of a case, with their places."""
    return {(i, case[i], j, case[j]) for i, j in combinations(range(len(case)), 2)}


def covering_set(
    cases: Sequence[_Case], cost: Callable[[_Case], float] = lambda case: 0.0
) -> list[_Case]:
    """Few of these cases that have every pair of values that occurs in any of them.

    Greedy and without chance: always a case with most pairs that are still missing; of several the
    cheapest, and of those the first.
    """
    missing = set().union(*(pairs(case) for case in cases))
    left = [(case, pairs(case)) for case in cases]
    chosen = []
    while missing:
        case, covered = max(left, key=lambda item: (len(item[1] & missing), -cost(item[0])))
        chosen.append(case)
        missing -= covered
    return chosen
