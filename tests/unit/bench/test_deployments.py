"""Names and settings of deployments side by side."""

from __future__ import annotations

from lamina.cli.bench.deployments import deployments

PLAIN = {
    "transport": ["shm"],
    "pipeline_depth": [1],
    "model_replicas": [1],
    "tensor_parallel_size": [1],
    "early_q": [True],
    "defer": [True],
}


def test_what_does_not_vary_is_not_said() -> None:
    assert list(deployments([0, 2], PLAIN)) == ["lamina, monolithic", "lamina, 2 remote over shm"]


def test_the_simplest_value_is_the_baseline() -> None:
    found = deployments([1], PLAIN | {"pipeline_depth": [1, 2], "early_q": [True, False]})
    assert list(found) == [
        "lamina, 1 remote over shm, depth 2, early q",
        "lamina, 1 remote over shm, depth 2, no early q",
        "lamina, 1 remote over shm, depth 1, early q",
        "lamina, 1 remote over shm, depth 1, no early q",
    ]
    assert [s["pipeline_depth"] for s in found.values()] == [2, 2, 1, 1]


def test_the_monolith_has_no_variants() -> None:
    found = deployments([0, 1], PLAIN | {"pipeline_depth": [2, 3], "transport": ["shm", "tcp"]})
    assert list(found) == [
        "lamina, monolithic",
        "lamina, 1 remote over shm, depth 3",
        "lamina, 1 remote over shm, depth 2",
        "lamina, 1 remote over tcp, depth 3",
        "lamina, 1 remote over tcp, depth 2",
    ]
    assert found["lamina, monolithic"]["pipeline_depth"] == 1
    assert found["lamina, monolithic"]["num_workers"] == 0
