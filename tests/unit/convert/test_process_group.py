"""Ranks in processes, over gloo: the same logits, and errors instead of hangs."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lamina.convert import TensorParallel, convert
from lamina.convert.collectives import use_group
from lamina.convert.process_group import ProcessGroup, Rendezvous, join_store, open_store
from lamina.errors import DeadlineExceeded, PeerLost, ProtocolMismatch, TransportError
from support.families import save_tiny_model
from support.ranks import serve_rank
from support.slices import run_slices

HOST = "127.0.0.1"
PROMPTS = [torch.arange(3, 12), torch.tensor([5])]


def _pair(timeout_s: float) -> list[ProcessGroup]:
    """Both ranks of a group, in this process."""
    store, rendezvous = open_store(HOST, timeout_s=10)
    stores = [store, join_store(rendezvous, timeout_s=10)]

    def connect(rank: int) -> ProcessGroup:
        return ProcessGroup(stores[rank], rank, 2, timeout_s=timeout_s, address=HOST)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(connect, range(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_and_parts_of_two_ranks(dtype: torch.dtype) -> None:
    groups = _pair(20)
    tensors = [torch.full((1, 3, 4), float(rank + 1), dtype=dtype) for rank in range(2)]

    def run(rank: int) -> list[list[float]]:
        parts = groups[rank].all_gather(tensors[rank], 2)
        groups[rank].all_reduce(tensors[rank])
        return [x.flatten().unique().tolist() for x in (*parts, tensors[rank])]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [[[1.0], [2.0], [3.0]]] * 2


def test_a_rank_that_does_not_come_is_a_deadline_not_a_hang() -> None:
    group, _ = _pair(1.0)
    start_s = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="longer than 1 s"):
        group.all_reduce(torch.ones(4))
    assert time.monotonic() - start_s < 10


def test_ranks_that_never_connect_are_a_deadline() -> None:
    store, _ = open_store(HOST, timeout_s=1)
    with pytest.raises(DeadlineExceeded, match="connecting 2 ranks"):
        ProcessGroup(store, 0, 2, timeout_s=1, address=HOST)


def test_a_store_that_nobody_opened_is_a_deadline() -> None:
    store, rendezvous = open_store(HOST, timeout_s=1)
    del store
    with pytest.raises(DeadlineExceeded, match="does not listen"):
        join_store(rendezvous, timeout_s=1)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(TransportError, match="address of this machine"):
        open_store("192.0.2.1", timeout_s=1)


def test_a_group_of_another_size_is_refused() -> None:
    group, _ = _pair(5)
    with pytest.raises(ProtocolMismatch, match="cut for 3 ranks, the group has 2"):
        group.all_gather(torch.ones(4), 3)


@pytest.fixture
def rendezvous() -> Iterator[tuple[object, Rendezvous]]:
    yield open_store(HOST, timeout_s=60)
    use_group(None)


def test_two_processes_give_the_whole_model_s_logits(
    rendezvous: tuple[object, Rendezvous], tmp_path: Path
) -> None:
    folder = save_tiny_model("llama", tmp_path)
    store, address = rendezvous
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    other = context.Process(target=serve_rank, args=(folder, address, PROMPTS, answers))
    other.start()
    group = ProcessGroup(store, 0, 2, timeout_s=60, address=HOST)
    use_group(group)
    model = convert(folder, parallel=TensorParallel(rank=0, size=2))
    got = run_slices(model, PROMPTS)
    want = run_slices(convert(folder), PROMPTS)
    for mine, theirs, expected in zip(got, answers.get(timeout=60), want, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-4)
        assert torch.equal(mine.argmax(-1), expected.argmax(-1))
        assert mine.tolist() == theirs
    other.join(60)
    assert other.exitcode == 0
    with pytest.raises(PeerLost, match="rank ended"):
        run_slices(model, PROMPTS)
