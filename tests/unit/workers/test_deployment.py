"""What "auto" resolves to, and what is refused."""

from __future__ import annotations

import pytest

from lamina.attention.spec import AttentionSpec
from lamina.config import (
    AttentionWorkerConfig,
    EngineConfig,
    parse_attention_workers,
    parse_bytes,
    parse_cores,
    parse_memory,
)
from lamina.errors import CapacityError, ConfigError
from lamina.types import LOCAL
from lamina.workers.deployment import Deployment, Machine, resolve

MACHINE = Machine(cores=tuple(range(8)), ram_bytes=2**30)
SPECS = tuple(
    AttentionSpec(
        layer=layer, num_query_heads=8, num_kv_heads=4, head_dim_k=16, head_dim_v=16, scale=0.25
    )
    for layer in range(2)
)
PAGE = 16
PAGE_BYTES = 2 * 4 * 32 * PAGE * 2
"""Layers, KV heads, k and v elements, tokens, bytes per element."""


def deploy(limit: int | None = 256, **fields: object) -> Deployment:
    settings: dict[str, object] = {"model": "x", "block_size": PAGE, "max_num_batched_tokens": 64}
    config = EngineConfig(**(settings | fields))  # type: ignore[arg-type]
    return resolve(config, SPECS, "bfloat16", limit, MACHINE)


def workers(count: int) -> tuple[AttentionWorkerConfig, ...]:
    return tuple(AttentionWorkerConfig() for _ in range(count))


def test_defaults_hold_every_sequence_at_full_length() -> None:
    deployment = deploy(max_num_seqs=3)
    assert deployment.max_model_len == 256
    assert deployment.num_pages == {LOCAL: (256 + 64) // PAGE, 1: 3 * 256 // PAGE}
    assert deployment.page_units == {LOCAL: 4, 1: 4}
    assert deployment.num_threads == 8
    assert deployment.worker_num_threads == {1: 8}


def test_heads_are_shared_where_there_are_enough() -> None:
    deployment = deploy(attention_workers=workers(3), attention_memory_bytes=64 * PAGE_BYTES)
    assert deployment.partition is not None
    assert deployment.partition.mode == "heads"
    assert deployment.page_units == {LOCAL: 4, 1: 1, 2: 1, 3: 1}
    assert deployment.num_pages[1] == deployment.num_pages[3] == 256, "a quarter of the heads"
    assert deployment.describe() == "3 workers, partitioned by heads"
    assert deployment.worker_num_threads == {1: 2, 2: 2, 3: 2}


def test_requests_are_shared_where_there_are_more_workers_than_heads() -> None:
    deployment = deploy(attention_workers=workers(5), attention_memory_bytes=64 * PAGE_BYTES)
    assert deployment.partition is not None
    assert deployment.partition.mode == "requests"
    assert deployment.num_pages[5] == 64
    assert deployment.page_units[5] == 4


def test_unasked_pages_leave_room_for_unequal_weights() -> None:
    two = deploy(attention_workers=workers(2), max_num_seqs=3)
    assert two.num_pages[1] == two.num_pages[2] == 3 * 4 * 256 // PAGE, "all of the heads on one"
    four = deploy(attention_workers=workers(4), max_num_seqs=4, attention_partition="tokens")
    assert four.num_pages[1] == 4 * 256 // PAGE // 2, "twice an equal share"


def test_the_length_follows_the_partition() -> None:
    memory = 8 * PAGE_BYTES
    fields = {"attention_workers": workers(2), "attention_memory_bytes": memory}
    assert deploy(attention_partition="requests", **fields).max_model_len == 8 * PAGE
    assert deploy(attention_partition="tokens", **fields).max_model_len == 16 * PAGE
    assert deploy(attention_partition="heads", **fields).max_model_len == 16 * PAGE
    assert deploy(**(fields | {"attention_workers": workers(5)})).max_model_len == 256, (
        "auto shares by tokens what no worker holds alone"
    )
    with pytest.raises(CapacityError, match="give more local memory"):
        deploy(local_memory_bytes=8 * PAGE_BYTES, max_model_len=256)


def test_micro_batches_to_prepare_for() -> None:
    assert deploy().max_depth == 2
    assert deploy(model_replicas=3).max_depth == 4
    assert deploy(attention="local").max_depth == 1
    assert deploy(attention="local", model_replicas=2).max_depth == 3
    assert deploy(pipeline_depth=3).max_depth == 3


def test_ranks_share_memory_cores_and_heads() -> None:
    deployment = deploy(
        attention="local",
        model_replicas=2,
        tensor_parallel_size=2,
        model_cores=(0, 1, 2, 3),
        attention_memory_bytes=64 * PAGE_BYTES,
    )
    assert deployment.page_units == {LOCAL: 2}
    assert deployment.num_pages == {LOCAL: 32}, "of half the heads, in each of four ranks"
    assert deployment.num_threads == 1
    assert deployment.model_cores == ((0,), (1,), (2,), (3,))
    budget = deployment.page_budget()
    assert budget.capacity_pages[LOCAL] == 64
    assert deployment.max_model_len == 256
    with pytest.raises(ConfigError, match="tensor_parallel_size=3 does not divide"):
        deploy(tensor_parallel_size=3)


def test_each_worker_can_have_its_own_threads() -> None:
    two = parse_attention_workers("cpu:1MiB:1,cpu:1MiB:3")
    deployment = deploy(attention_workers=two, worker_cores=(2, 3, 4, 5))
    assert deployment.worker_num_threads == {1: 1, 2: 3}
    assert deployment.worker_cores == {1: (2,), 2: (3, 4, 5)}


def test_given_weights_are_the_placers() -> None:
    deployment = deploy(attention_workers=workers(2), attention_weights=(3.0, 1.0))
    placer = deployment.placer(deployment.page_budget())
    assert [s.num_units for s in placer.place(16, 256, {}) or ()] == [3, 1]
    assert deploy(attention_workers=workers(2)).weights is None


def test_each_worker_can_have_its_own_memory() -> None:
    own = parse_attention_workers(f"cpu:{32 * PAGE_BYTES},cpu")
    deployment = deploy(
        attention_workers=own,
        attention_partition="requests",
        attention_memory_bytes=16 * PAGE_BYTES,
    )
    assert deployment.num_pages[1] == 32
    assert deployment.num_pages[2] == 16


def test_monolithic_has_one_pool() -> None:
    deployment = deploy(attention="local", attention_memory_bytes=20 * PAGE_BYTES)
    assert deployment.num_pages == {LOCAL: 20}
    assert deployment.partition is None


def test_unasked_memory_stays_within_its_share_of_the_machine() -> None:
    deployment = deploy(limit=2**20)
    quarter = MACHINE.ram_bytes // 4
    assert deployment.num_pages[1] == quarter // PAGE_BYTES
    assert deployment.max_model_len == quarter // PAGE_BYTES * PAGE, "the length follows the pages"


def test_a_length_that_was_asked_for_must_fit() -> None:
    with pytest.raises(CapacityError, match="max_model_len to at most 160"):
        deploy(max_model_len=256, attention_memory_bytes=10 * PAGE_BYTES)


def test_an_unasked_length_shrinks_to_what_fits() -> None:
    assert deploy(attention_memory_bytes=10 * PAGE_BYTES).max_model_len == 160


def test_refusals() -> None:
    with pytest.raises(CapacityError, match="too little for one page, which takes 8192 bytes"):
        deploy(attention_memory_bytes=PAGE_BYTES - 1)
    with pytest.raises(ConfigError, match="model's own context length 256"):
        deploy(max_model_len=257)
    with pytest.raises(ConfigError, match="attention_partition=heads"):
        deploy(attention_workers=workers(5), attention_partition="heads")
    with pytest.raises(ConfigError, match="more than can be placed"):
        deploy(attention_workers=workers(5), max_num_seqs=2)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8GiB", 8 * 2**30),
        ("512MiB", 2**29),
        ("2e9", 2 * 10**9),
        ("4G", 4 * 10**9),
        ("1.5KiB", 1536),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_bytes(text, "memory") == value


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 parsec", "1GiBB"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="memory must be a size such as 8GiB"):
        parse_bytes(text, "memory")


@pytest.mark.parametrize("text", ["two", "tpu:8GiB", "cpu:lots", "cpu,,cpu", "-1"])
def test_wrong_worker_lists(text: str) -> None:
    with pytest.raises(ConfigError, match="attention_workers"):
        parse_attention_workers(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"max_num_batched_tokens": 8}, "max_num_batched_tokens must be at least max_num_seqs"),
        ({"step_deadline_s": 0.0}, "step_deadline_s must be positive"),
        ({"heartbeat_timeout_s": 0.3}, "heartbeat_timeout_s must be at least three"),
        ({"attention_workers": ()}, "attention=local"),
        ({"max_model_len": 0}, "max_model_len must be at least 1"),
        ({"model_replicas": 17}, "model_replicas must be between 1 and 16"),
        ({"pipeline_depth": 1, "model_replicas": 2}, "must be at least model_replicas"),
        ({"pipeline_depth": 3, "max_num_seqs": 2}, "must be at most max_num_seqs"),
        ({"attention_weights": (1.0, 2.0)}, "one per attention worker"),
        ({"attention_weights": (0.0,)}, "attention_weights must be positive"),
    ],
)
def test_wrong_settings(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(model="x", **fields)  # type: ignore[arg-type]


def test_a_fraction_of_the_memory_is_shared_by_the_workers() -> None:
    share = 2 * 64 * PAGE_BYTES / 2**30
    deployment = deploy(
        attention_workers=workers(2),
        attention_partition="requests",
        attention_memory_fraction=share,
    )
    assert deployment.num_pages[1] == deployment.num_pages[2] == 64


def test_cores_are_dealt_out_while_there_are_enough() -> None:
    two = workers(2)
    deployment = deploy(attention_workers=two, worker_cores=(4, 5, 6, 7), model_cores=(0, 1))
    assert deployment.num_threads == 2
    assert deployment.worker_num_threads == {1: 2, 2: 2}
    assert deployment.worker_cores == {1: (4, 5), 2: (6, 7)}
    shared = deploy(attention_workers=two, worker_cores=(7,), worker_num_threads=1)
    assert shared.worker_cores == {1: (7,), 2: (7,)}


def test_cores_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="worker_cores names cores 8"):
        deploy(worker_cores=(7, 8))


def test_cores_and_memory_are_read_from_text() -> None:
    assert parse_cores("0-2,7", "cores") == (0, 1, 2, 7)
    for text in ("", "3-1", "a", "1,,2"):
        with pytest.raises(ConfigError, match="cores must be a list of cores"):
            parse_cores(text, "cores")
    assert parse_memory("0.5", "memory") == 0.5
    assert parse_memory("1", "memory") == 1.0
    assert parse_memory("2GiB", "memory") == 2**31
    with pytest.raises(ConfigError, match="memory must be a size"):
        parse_memory("half", "memory")
