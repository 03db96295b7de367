"""The same greedy tokens as transformers, for every family and over every deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamina._native import ThreadPool
from lamina.convert import SlicedModel, SliceState, convert
from lamina.types import FinishReason
from support.engines import (
    assert_sound,
    requests,
    run_all,
    running,
    tiny_config,
    tiny_llama_page_bytes,
    tokens,
    transformers_greedy,
)
from support.families import FAMILIES, VOCAB_SIZE, save_tiny_model

NUM_TOKENS = 64
PROMPT_LENGTHS = (1, 7, 20, 45)
"""Below and above the windows (8), the pages (16) and the chunks (24) of these tests."""


def make_prompts(lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path)
    eager: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    )
    prompts = make_prompts(PROMPT_LENGTHS)
    expected = transformers_greedy(eager, prompts, NUM_TOKENS)
    model = convert(tmp_path)
    model.optimize(ThreadPool(1))
    deployments: tuple[tuple[int, dict[str, Any]], ...] = (
        (0, {"pipeline_depth": 1}),
        (1, {"transport": "shm", "pipeline_depth": 2}),
        (2, {"transport": "tcp", "pipeline_depth": 3, "attention_partition": "tokens"}),
        (3, {"transport": "shm", "pipeline_depth": 4, "attention_partition": "heads"}),
    )
    for num_workers, changes in deployments:
        config = tiny_config(tmp_path, num_workers, **changes)
        with running(config, model) as started:
            outputs = run_all(started, requests(prompts, ignore_eos=True))
            answers = [tokens(outputs[str(index)]) for index in range(len(prompts))]
            assert answers == expected, f"{num_workers} attention workers, {changes}"
            assert_sound(started)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", path)
    return path


@pytest.fixture(scope="module")
def llama(folder: Path) -> SlicedModel:
    return convert(folder)


LENGTHS = (3, 17, 40, 8, 25, 31, 1, 12, 50, 5)


@pytest.fixture(scope="module")
def alone(folder: Path, llama: SlicedModel) -> list[list[int]]:
    """Each prompt's greedy tokens, monolithic, one request at a time."""
    prompts = make_prompts(LENGTHS, seed=2)
    with running(tiny_config(folder, 0), llama) as started:
        return [
            tokens(run_all(started, requests([prompt], ignore_eos=True))["0"]) for prompt in prompts
        ]


PAGE_BYTES = tiny_llama_page_bytes(16)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"early_q": False}, id="no early q"),
        pytest.param({"transport": "tcp"}, id="tcp"),
        pytest.param({"num_threads": 2, "worker_num_threads": 2}, id="two threads each"),
        pytest.param({"model_cores": (0,), "worker_cores": (0,)}, id="one core for all"),
        pytest.param({"attention_partition": "requests"}, id="partition by requests"),
        pytest.param({"block_size": 1}, id="pages of one token"),
        pytest.param({"max_num_batched_tokens": 512}, id="prompts whole"),
        pytest.param({"max_num_seqs": 1, "max_num_batched_tokens": 1}, id="one row per step"),
        pytest.param({"max_num_batched_tokens": 64, "max_num_seqs": 64}, id="large batch"),
    ],
)
def test_settings_do_not_change_tokens(
    changes: dict[str, Any], folder: Path, llama: SlicedModel, alone: list[list[int]]
) -> None:
    prompts = make_prompts(LENGTHS, seed=2)
    with running(tiny_config(folder, 2, **changes), llama) as started:
        outputs = run_all(started, requests(prompts, ignore_eos=True))
        assert [tokens(outputs[str(i)]) for i in range(len(prompts))] == alone
        assert_sound(started)


@pytest.mark.parametrize(
    ("num_workers", "partition", "depth", "transport"),
    [
        (0, "auto", 3, "auto"),
        (1, "auto", 4, "tcp"),
        (2, "heads", 2, "shm"),
        (2, "requests", 3, "tcp"),
        (2, "tokens", 4, "shm"),
        (3, "heads", 1, "tcp"),
        (3, "requests", 2, "shm"),
        (3, "tokens", 3, "shm"),
    ],
)
def test_pipelines_and_partitions_do_not_change_tokens(
    num_workers: int,
    partition: str,
    depth: int,
    transport: str,
    folder: Path,
    llama: SlicedModel,
    alone: list[list[int]],
) -> None:
    prompts = make_prompts(LENGTHS, seed=2)
    config = tiny_config(
        folder,
        num_workers,
        attention_partition=partition,
        pipeline_depth=depth,
        transport=transport,
    )
    with running(config, llama) as started:
        outputs = run_all(started, requests(prompts, ignore_eos=True))
        assert [tokens(outputs[str(i)]) for i in range(len(prompts))] == alone
        assert_sound(started)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_preemption_does_not_change_tokens(
    num_workers: int, folder: Path, llama: SlicedModel, alone: list[list[int]]
) -> None:
    prompts = make_prompts(LENGTHS, seed=2)
    share = max(1, num_workers)
    config = tiny_config(folder, num_workers, attention_memory_bytes=10 * PAGE_BYTES // share)
    with running(config, llama) as started:
        outputs = run_all(started, requests(prompts, ignore_eos=True))
        assert started.engine.stats().preemptions_total > 0
        assert [tokens(outputs[str(i)]) for i in range(len(prompts))] == alone
        assert_sound(started)


def test_sampling_does_not_depend_on_batch_or_preemption(folder: Path, llama: SlicedModel) -> None:
    prompts = make_prompts(LENGTHS, seed=3)
    sampling: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "ignore_eos": True}
    batch = requests(prompts, **sampling)
    with running(tiny_config(folder, 0), llama) as started:
        expected = [tokens(run_all(started, [request])[request.request_id]) for request in batch]
    config = tiny_config(folder, 2, attention_memory_bytes=5 * PAGE_BYTES)
    with running(config, llama) as started:
        outputs = run_all(started, batch)
        assert started.engine.stats().preemptions_total > 0
        assert [tokens(outputs[request.request_id]) for request in batch] == expected


def test_aborted_requests_leave_no_pages(folder: Path, llama: SlicedModel) -> None:
    batch = requests(make_prompts(LENGTHS, seed=4), ignore_eos=True)
    with running(tiny_config(folder, 2), llama) as started:
        for request in batch:
            started.engine.add(request)
        for step in range(12):
            started.engine.step()
            started.engine.abort(str(step))
        for request in batch:
            started.engine.abort(request.request_id)
        while started.engine.has_work:
            assert started.engine.step() == []
        assert_sound(started)


def test_prompt_logprobs_over_chunks(folder: Path, llama: SlicedModel) -> None:
    (prompt,) = make_prompts((50,), seed=5)
    eager: Any = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    with torch.inference_mode():
        logprobs = eager(torch.tensor([prompt])).logits[0].log_softmax(-1)
    with running(tiny_config(folder, 1), llama) as started:
        batch = requests([prompt], prompt_logprobs=2, max_tokens=4, ignore_eos=True)
        outputs = run_all(started, batch)["0"]
    entries = [entry for output in outputs for entry in output.prompt_logprobs]
    assert [entry.token_id for entry in entries] == prompt[1:]
    for position, entry in enumerate(entries):
        row = logprobs[position]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()
        assert entry.rank == int((row > row[entry.token_id]).sum()) + 1


def test_sampling_params_reach_the_sampler(folder: Path, llama: SlicedModel) -> None:
    (prompt,) = make_prompts((9,), seed=6)
    with running(tiny_config(folder, 1), llama) as started:
        plain = tokens(run_all(started, requests([prompt], ignore_eos=True))["0"])
        stop = plain[5]
        first = plain.index(stop)
        stopped = run_all(started, requests([prompt], ignore_eos=True, stop_token_ids=(stop,)))["0"]
        assert tokens(stopped) == plain[:first]
        assert stopped[-1].stop_token_id == stop
        penalised = run_all(
            started, requests([prompt], ignore_eos=True, max_tokens=16, repetition_penalty=50.0)
        )["0"]
        assert len(set(tokens(penalised))) == 16


def test_logits_that_are_not_numbers_end_only_their_request(
    folder: Path, llama: SlicedModel, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts(LENGTHS, seed=2)[:3]
    run_last, num_calls = llama.run_last, 0

    def poisoned(state: SliceState) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        logits = run_last(state)
        if num_calls == 10:
            logits[0] = torch.nan
        return logits

    monkeypatch.setattr(llama, "run_last", poisoned)
    with running(tiny_config(folder, 1), llama) as started:
        outputs = run_all(started, requests(prompts, ignore_eos=True))
        failed = [i for i, o in outputs.items() if o[-1].finish_reason is FinishReason.ERROR]
        assert len(failed) == 1
        assert "NaN" in str(outputs[failed[0]][-1].error)
        for index in {"0", "1", "2"} - set(failed):
            assert tokens(outputs[index]) == alone[int(index)]
        assert_sound(started)
