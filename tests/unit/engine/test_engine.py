"""The engine over executors in plain Python: tokens, aborts and pages with several steps in
flight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamina.convert import SlicedModel, convert
from lamina.engine.engine import Engine
from lamina.types import FinishReason, SequenceOutput
from lamina.workers.deployment import Machine, resolve
from lamina.workers.model import ModelWorker
from lamina.workers.pipeline import LocalPipeline
from support.engines import requests, run_all, tiny_config, tokens, transformers_greedy
from support.executor import PythonExecutor
from support.families import VOCAB_SIZE, save_tiny_model

NUM_TOKENS = 12
LENGTHS = (1, 7, 20, 33)


class PythonFleet:
    """What the engine wants of a fleet, over executors in this thread."""

    def __init__(self, executors: Sequence[PythonExecutor]) -> None:
        self.executors = {x.end.executor: x for x in executors}
        self.read_bytes_per_s = {e: 1e9 for e in self.executors if e}

    def name(self, executor: int) -> str:
        return f"worker-{executor}" if executor else "local"

    def lost(self, executor: int) -> str | None:
        return None

    def integrity(self) -> dict[int, Any]:
        return {
            e: SimpleNamespace(
                problems=(),
                sequences=tuple({sequence for sequence, _ in x.lanes}),
                pages_used=len(x.lanes),
                pages_total=0,
            )
            for e, x in self.executors.items()
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> SlicedModel:
    return convert(folder)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    eager: Any = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    return transformers_greedy(eager, prompts, NUM_TOKENS)


def start(folder: Path, model: SlicedModel, num_workers: int, **changes: Any) -> Any:
    """An engine and its fleet."""
    config = tiny_config(folder, num_workers, **changes)
    deployment = resolve(
        config, model.attention_specs, "float32", 512, Machine(cores=(0, 1), ram_bytes=1 << 30)
    )
    executors = [
        PythonExecutor(
            e,
            model.attention_specs,
            page_units=units,
            max_rows=config.max_num_batched_tokens,
            num_micro_batches=deployment.max_depth,
        )
        for e, units in deployment.page_units.items()
    ]
    worker = ModelWorker(
        model,
        [x.end for x in executors],
        num_micro_batches=deployment.max_depth,
        early_q=config.early_q,
        step_deadline_s=10.0,
    )
    pipeline = LocalPipeline(
        worker,
        [x.plan_end for x in executors],
        num_micro_batches=deployment.max_depth,
        step_deadline_s=10.0,
    )
    fleet: Any = PythonFleet(executors)
    return SimpleNamespace(engine=Engine(config, model, deployment, fleet, pipeline), fleet=fleet)


def assert_sound(started: Any) -> None:
    problems, executors = started.engine.check_integrity()
    assert problems == []
    assert all(e.pages_used == 0 for e in executors)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("num_workers", "partition"), [(0, "auto"), (1, "auto"), (2, "heads"), (2, "requests"),
                                   (3, "tokens")],
)  # fmt: skip
def test_greedy_tokens_do_not_depend_on_what_is_in_flight(
    depth: int,
    num_workers: int,
    partition: str,
    folder: Path,
    model: SlicedModel,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    started = start(folder, model, num_workers, pipeline_depth=depth, attention_partition=partition)
    batch = requests(prompts, ignore_eos=True, max_tokens=NUM_TOKENS)
    outputs = run_all(started, batch)
    assert [tokens(outputs[str(i)]) for i in range(len(prompts))] == expected
    assert_sound(started)
    started.engine.timeline.flush()
    records = started.engine.timeline.records
    assert {record.micro_batch for record in records} == set(range(min(depth, len(prompts))))


def test_requests_may_be_aborted_while_their_steps_are_in_flight(
    folder: Path, model: SlicedModel, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    started = start(folder, model, 2, pipeline_depth=3)
    engine = started.engine
    for request in requests(prompts, ignore_eos=True, max_tokens=NUM_TOKENS):
        engine.add(request)
    outputs: list[SequenceOutput] = []
    for _ in range(6):
        outputs += engine.step()
    engine.abort("2")
    seen = len(outputs)
    while engine.has_work:
        outputs += engine.step()
    assert all(output.request_id != "2" for output in outputs[seen:])
    for index in (0, 1, 3):
        own = [output for output in outputs if output.request_id == str(index)]
        assert tokens(own) == expected[index]
    assert_sound(started)


def test_what_integrity_checks_finish_is_returned_by_the_next_step(
    folder: Path, model: SlicedModel, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    started = start(folder, model, 1, pipeline_depth=2)
    engine = started.engine
    for request in requests(prompts, ignore_eos=True, max_tokens=NUM_TOKENS):
        engine.add(request)
    outputs: list[SequenceOutput] = []
    while engine.has_work:
        outputs += engine.step()
        assert engine.check_integrity()[0] == []
    for index, right in enumerate(expected):
        assert tokens([o for o in outputs if o.request_id == str(index)]) == right


def test_logits_that_are_not_numbers_end_only_their_request(
    folder: Path,
    model: SlicedModel,
    prompts: list[list[int]],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_last, num_calls = model.run_last, 0

    def poisoned(state: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        logits = run_last(state)
        if num_calls == 12:
            logits[0] = torch.nan
        return logits

    monkeypatch.setattr(model, "run_last", poisoned)
    started = start(folder, model, 1, pipeline_depth=2)
    outputs = run_all(started, requests(prompts, ignore_eos=True, max_tokens=NUM_TOKENS))
    failed = [i for i, o in outputs.items() if o[-1].finish_reason is FinishReason.ERROR]
    assert len(failed) == 1
    for index in range(len(prompts)):
        if str(index) not in failed:
            assert tokens(outputs[str(index)]) == expected[index]
    assert_sound(started)
