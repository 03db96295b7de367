"""Model ranks as processes: the same tokens, and what happens when one of them fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamina.config import EngineConfig
from lamina.engine.start import StartedEngine, start_engine
from lamina.errors import EngineDead, PeerLost
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
from support.families import VOCAB_SIZE, save_tiny_model
from support.servers import wait_until

NUM_TOKENS = 32
LENGTHS = (1, 7, 20, 45, 30, 3)
"""Below and above the pages (16) and the chunks (24) of these tests."""
LIMIT_S = 2.0
"""From a fault to its error, and to the last process's end."""


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]


class Subject:
    """A tiny model and what transformers says to the prompts."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = save_tiny_model(family, folder)
        eager: Any = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )
        self.expected = transformers_greedy(eager, prompts(), NUM_TOKENS)

    def config(self, num_workers: int, **changes: Any) -> EngineConfig:
        return tiny_config(self.folder, num_workers, **changes)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject("llama", tmp_path_factory.mktemp("llama"))


def answers(started: StartedEngine) -> list[list[int]]:
    batch = requests(prompts(), ignore_eos=True, max_tokens=NUM_TOKENS)
    outputs = run_all(started, batch)
    return [tokens(outputs[request.request_id]) for request in batch]


@pytest.mark.parametrize(
    ("num_workers", "changes"),
    [
        pytest.param(1, {"model_replicas": 2, "pipeline_depth": 2}, id="2 replicas, depth 2"),
        pytest.param(2, {"model_replicas": 2, "pipeline_depth": 3}, id="2 replicas, depth 3"),
        pytest.param(
            2, {"model_replicas": 2, "pipeline_depth": 3, "early_q": False, "transport": "tcp"},
            id="2 replicas, tcp, no early q",
        ),
        pytest.param(2, {"model_replicas": 3, "pipeline_depth": 4}, id="3 replicas, depth 4"),
        pytest.param(
            2,
            {"model_replicas": 3, "pipeline_depth": 3, "attention_partition": "requests"},
            id="3 replicas, by requests",
        ),
        pytest.param(
            2,
            {"model_replicas": 2, "pipeline_depth": 2, "attention_partition": "tokens"},
            id="2 replicas, by tokens",
        ),
        pytest.param(0, {"model_replicas": 3}, id="3 replicas, attention local"),
        pytest.param(1, {"tensor_parallel_size": 2, "pipeline_depth": 2}, id="2 ranks"),
        pytest.param(
            2,
            {"tensor_parallel_size": 2, "model_replicas": 2, "pipeline_depth": 3},
            id="2 x 2 ranks",
        ),
        pytest.param(
            1,
            {"tensor_parallel_size": 2, "model_replicas": 2, "transport": "tcp"},
            id="2 x 2 ranks, tcp",
        ),
    ],
)  # fmt: skip
def test_greedy_tokens_equal_transformers(
    num_workers: int, changes: dict[str, Any], llama: Subject
) -> None:
    with running(llama.config(num_workers, **changes)) as started:
        assert answers(started) == llama.expected
        assert_sound(started)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "mixtral"])
def test_other_families(family: str, tmp_path: Path) -> None:
    subject = Subject(family, tmp_path)
    for changes in ({"model_replicas": 3}, {"tensor_parallel_size": 2}):
        with running(subject.config(2, pipeline_depth=3, **changes)) as started:
            assert answers(started) == subject.expected, changes
            assert_sound(started)


def test_more_replicas_than_slices(llama: Subject) -> None:
    """Some ranks then have no slice of a step: 3 layers are 4 slices."""
    with running(llama.config(1, model_replicas=5, pipeline_depth=5)) as started:
        assert answers(started) == llama.expected
        assert_sound(started)


@pytest.mark.parametrize("changes", [{"model_replicas": 2}, {"tensor_parallel_size": 2}])
def test_preemption_does_not_change_tokens(changes: dict[str, int], llama: Subject) -> None:
    page_bytes = tiny_llama_page_bytes(16)
    config = llama.config(2, attention_memory_bytes=10 * page_bytes // 2, **changes)
    with running(config) as started:
        assert answers(started) == llama.expected
        assert started.engine.stats().preemptions_total > 0
        assert_sound(started)


def test_aborted_requests_leave_no_pages(llama: Subject) -> None:
    batch = requests(prompts(), ignore_eos=True)
    with running(llama.config(2, model_replicas=2)) as started:
        for request in batch:
            started.engine.add(request)
        for step in range(6):
            started.engine.step()
            started.engine.abort(str(step))
        while started.engine.has_work:
            started.engine.step()
        assert_sound(started)


def test_sampling_rows_and_prompt_logprobs(llama: Subject) -> None:
    """Logits of many rows come from whichever rank runs the last slice."""
    (prompt,) = prompts()[3:4]
    batch = requests([prompt], prompt_logprobs=2, max_tokens=4, ignore_eos=True)
    entries = []
    for changes in ({}, {"model_replicas": 2}):
        with running(llama.config(1, **changes)) as started:
            outputs = run_all(started, batch)["0"]
        entries.append([entry for output in outputs for entry in output.prompt_logprobs])
    assert [e.token_id for e in entries[0]] == prompt[1:]
    for alone, over_ranks in zip(*entries, strict=True):
        assert over_ranks.token_id == alone.token_id
        assert over_ranks.logprob == pytest.approx(alone.logprob, abs=1e-4)


# --- failures ---


def processes(started: StartedEngine) -> list[int]:
    """Ranks, hosts and attention workers."""
    assert started.ranks is not None
    return [*started.ranks.pids.values(), *started.fleet.pids.values()]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def busy(started: StartedEngine) -> None:
    """Long answers, all under way."""
    for request in requests(prompts(), ignore_eos=True, max_tokens=80):
        started.engine.add(request)
    for _ in range(20):
        started.engine.step()


def step_until_lost(started: StartedEngine) -> tuple[PeerLost, float]:
    begin = time.monotonic()
    try:
        while started.engine.has_work:
            started.engine.step()
    except PeerLost as error:
        return error, time.monotonic() - begin
    raise AssertionError("all answers ended without an error")


def close_and_check(started: StartedEngine) -> None:
    pids = processes(started)
    started.close()
    wait_until(lambda: not any(map(runs, pids)), LIMIT_S)


@pytest.mark.parametrize(
    ("victim", "changes"),
    [
        ("model-rank-1.0", {"model_replicas": 2}),
        ("model-rank-0.0", {"model_replicas": 2, "transport": "tcp"}),
        ("model-rank-0.1", {"tensor_parallel_size": 2}),
        ("model-host-0", {"model_replicas": 2}),
    ],
)
def test_killed_process_is_named(victim: str, changes: dict[str, Any], llama: Subject) -> None:
    with running(llama.config(2, **changes)) as started:
        busy(started)
        assert started.ranks is not None
        os.kill(started.ranks.pids[victim], signal.SIGKILL)
        error, seconds = step_until_lost(started)
        # A host takes its ranks with it: any of them may be missed first.
        assert error.peer == victim or (victim == "model-host-0" and "rank" in error.peer)
        assert seconds < LIMIT_S
        with pytest.raises(PeerLost):
            started.fleet.check()
        time.sleep(0.5)
        others = {name: pid for name, pid in started.ranks.pids.items() if name != victim}
        if victim != "model-host-0":
            assert all(map(runs, others.values())), "the others wait to be told"
            assert list(started.ranks.lost) == [victim], "and nobody else is blamed"
        close_and_check(started)


@pytest.mark.parametrize("victim", ["model-rank-1.0", "attention-worker-1"])
def test_stopped_process_is_lost(victim: str, llama: Subject) -> None:
    config = llama.config(2, model_replicas=2, heartbeat_timeout_s=1.5)
    with running(config) as started:
        busy(started)
        assert started.ranks is not None
        pids = started.ranks.pids | {
            f"attention-worker-{e}": pid for e, pid in started.fleet.pids.items()
        }
        os.kill(pids[victim], signal.SIGSTOP)
        error, seconds = step_until_lost(started)
        assert error.peer == victim
        assert "heartbeat" in str(error)
        assert seconds < config.heartbeat_timeout_s + LIMIT_S
        close_and_check(started)


@pytest.mark.parametrize("victim", ["rank", "worker"])
def test_stall_delays_and_corrupts_nothing(victim: str, llama: Subject) -> None:
    config = llama.config(2, model_replicas=2, pipeline_depth=3, heartbeat_timeout_s=10.0)
    with running(config) as started:
        assert started.ranks is not None
        pid = started.ranks.pids["model-rank-1.0"] if victim == "rank" else started.fleet.pids[1]
        resume = threading.Timer(1.0, os.kill, (pid, signal.SIGCONT))
        batch = requests(prompts(), ignore_eos=True, max_tokens=NUM_TOKENS)
        for request in batch:
            started.engine.add(request)
        outputs = {request.request_id: list[int]() for request in batch}
        begin = time.monotonic()
        num_steps = 0
        while started.engine.has_work:
            for output in started.engine.step():
                outputs[output.request_id] += output.token_ids
            num_steps += 1
            if num_steps == 20:
                os.kill(pid, signal.SIGSTOP)
                resume.start()
        assert time.monotonic() - begin > 1.0, "it was held up"
        assert list(outputs.values()) == llama.expected
        assert_sound(started)


def test_stopped_for_longer_than_a_step_may_take(llama: Subject) -> None:
    """One that still had heartbeats would end the same way: the step's deadline names it."""
    config = llama.config(1, model_replicas=2, step_deadline_s=0.5, heartbeat_timeout_s=20.0)
    with running(config) as started:
        busy(started)
        os.kill(started.fleet.pids[1], signal.SIGSTOP)
        error, seconds = step_until_lost(started)
        assert error.peer == "attention-worker-1"
        assert "in time" in str(error)
        assert seconds < 0.5 + LIMIT_S
        close_and_check(started)


def test_clean_end_leaves_no_process(llama: Subject) -> None:
    with running(llama.config(1, model_replicas=2, tensor_parallel_size=2)) as started:
        busy(started)
        begin = time.monotonic()
        close_and_check(started)
        assert time.monotonic() - begin < LIMIT_S


def test_weights_that_cannot_be_loaded(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(EngineDead, match=r"model-host-0.*CheckpointError.*has no weights"):
        start_engine(tiny_config(tmp_path, 1, model_replicas=2))


def test_heads_that_cannot_be_shared_out(llama: Subject) -> None:
    with pytest.raises(Exception, match="tensor_parallel_size"):
        start_engine(llama.config(1, tensor_parallel_size=4))
