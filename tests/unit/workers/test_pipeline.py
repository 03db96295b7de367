"""Steps of several micro-batches through one model worker, over executors in plain Python."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lamina.convert import SlicedModel, convert
from lamina.types import LOCAL, Share, Span, StepPlan
from lamina.workers.model import ModelWorker, StepInputs
from lamina.workers.pipeline import MODEL_WORKER, Finished, LocalPipeline
from lamina.workers.steptimes import slice_times
from support.executor import PythonExecutor
from support.families import VOCAB_SIZE, save_tiny_model
from support.slices import run_slices

UNITS = 6
LOCAL_SHARE = (Share(LOCAL, 0, UNITS),)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SlicedModel:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", folder)
    return convert(folder)


class Run:
    """Sequences of random tokens, each advanced by its own micro-batch."""

    def __init__(
        self, model: SlicedModel, placements: Sequence[tuple[Share, ...]], *, early_q: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        self.placements = placements
        self.tokens = [
            torch.randint(3, VOCAB_SIZE, (12 + i,), generator=generator)
            for i in range(len(placements))
        ]
        self.computed = [0] * len(placements)
        self.logits: list[list[torch.Tensor]] = [[] for _ in placements]
        num_executors = 1 + max(s.executor for p in placements for s in p)
        self.executors = [
            PythonExecutor(
                e, model.attention_specs, page_units=(UNITS, 1, 2, 2)[e],
                num_micro_batches=len(placements),
            )
            for e in range(num_executors)
        ]  # fmt: skip
        worker = ModelWorker(
            model,
            [x.end for x in self.executors],
            num_micro_batches=len(placements),
            early_q=early_q,
            step_deadline_s=10.0,
        )
        self.pipeline = LocalPipeline(
            worker,
            [x.plan_end for x in self.executors],
            num_micro_batches=len(placements),
            step_deadline_s=10.0,
        )
        self.num_steps = 0
        self.finished: list[Finished] = []

    def submit(self, sequence: int, num_rows: int) -> None:
        """The next rows of a sequence, in the micro-batch of that number."""
        self.num_steps += 1
        start = self.computed[sequence]
        where = self.placements[sequence]
        span = (
            Span(sequence, num_rows, start, LOCAL_SHARE, (*LOCAL_SHARE, *where))
            if num_rows > 1 and where != LOCAL_SHARE
            else Span(sequence, num_rows, start, where, where)
        )
        self.computed[sequence] += num_rows
        positions = torch.arange(start, start + num_rows)
        inputs = StepInputs(self.tokens[sequence][positions], positions, torch.arange(num_rows))
        self.pipeline.submit(StepPlan(self.num_steps, sequence, (span,)), inputs)

    def collect(self) -> int:
        finished = self.pipeline.collect()
        self.finished.append(finished)
        self.logits[finished.plan.micro_batch].append(finished.logits)
        return finished.plan.micro_batch

    def run(self) -> None:
        """All tokens: a prompt of five, then one by one."""
        for sequence in range(len(self.placements)):
            self.submit(sequence, 5)
        in_flight = len(self.placements)
        while in_flight:
            sequence = self.collect()
            if self.computed[sequence] < len(self.tokens[sequence]):
                self.submit(sequence, 1)
            else:
                in_flight -= 1


def assert_right(run: Run, model: SlicedModel) -> None:
    expected = run_slices(model, run.tokens)
    for logits, right in zip(run.logits, expected, strict=True):
        torch.testing.assert_close(torch.cat(logits), right, atol=1e-4, rtol=1e-4)


BY_HEADS = (Share(1, 0, 2), Share(2, 2, 6))
REQUESTS = (Share(2, 0, UNITS),)
TOKENS = (Share(1, 0, UNITS, 0, 8), Share(2, 0, UNITS, 8, None))
MIXED = (Share(1, 0, 2, 0, 4), Share(3, 0, 2, 4, None), Share(2, 2, 6))


@pytest.mark.parametrize("early_q", [True, False])
@pytest.mark.parametrize(
    "placements",
    [
        pytest.param([LOCAL_SHARE], id="local"),
        pytest.param([LOCAL_SHARE] * 3, id="local, three in flight"),
        pytest.param([BY_HEADS, REQUESTS], id="heads and requests"),
        pytest.param([TOKENS, BY_HEADS, TOKENS, LOCAL_SHARE], id="tokens and others"),
        pytest.param([MIXED, MIXED], id="mixed in one sequence"),
    ],
)
def test_steps_in_flight_do_not_disturb_each_other(
    placements: list[tuple[Share, ...]], early_q: bool, model: SlicedModel
) -> None:
    run = Run(model, placements, early_q=early_q)
    run.run()
    assert_right(run, model)


def test_micro_batches_take_turns(model: SlicedModel) -> None:
    run = Run(model, [LOCAL_SHARE] * 2)
    run.submit(0, 5)
    run.submit(1, 5)
    run.collect()
    run.collect()
    first, second = (f.times[MODEL_WORKER] for f in run.finished)
    begins = [slice_times(t, k).begin for k in range(model.num_layers + 1) for t in (first, second)]
    assert begins == sorted(begins)


def test_a_step_begins_while_another_is_in_the_middle(model: SlicedModel) -> None:
    run = Run(model, [REQUESTS, REQUESTS])
    run.submit(0, 5)
    worker = run.pipeline._worker
    worker.run_next()
    worker.run_next()
    run.submit(1, 5)
    assert run.collect() == 0
    run.submit(0, 1)
    assert run.collect() == 1
    assert run.collect() == 0
    torch.testing.assert_close(
        torch.cat(run.logits[0]), run_slices(model, [run.tokens[0][:6]])[0], atol=1e-4, rtol=1e-4
    )


def test_times_and_reports_cover_the_step(model: SlicedModel) -> None:
    run = Run(model, [BY_HEADS])
    run.run()
    reports = [report for finished in run.finished for report in finished.reports]
    assert {report.executor for report in reports} == {LOCAL, 1, 2}
    decode = [report for report in reports if report.executor == 2 and report.step > 1]
    times = {f.plan.step: f.times[MODEL_WORKER] for f in run.finished}
    for report in decode:
        assert report.times.shape == (model.num_layers, 4)
        for layer, row in enumerate(report.times.tolist()):
            assert row == sorted(row)
            sent = slice_times(times[report.step], layer)
            assert sent.begin <= sent.inputs_here <= sent.q_end <= sent.q_sent <= sent.kv_end
            assert sent.q_end <= row[0]
            assert row[2] <= slice_times(times[report.step], layer + 1).inputs_here
    total = run.pipeline.times
    assert 0 < total.slices_s + total.post_s + total.attention_s < total.steps_s
    assert total.other_s > 0


def test_a_step_without_rows_releases_and_passes(model: SlicedModel) -> None:
    run = Run(model, [REQUESTS])
    run.submit(0, 5)
    run.collect()
    assert run.executors[2].lanes
    none = torch.empty(0, dtype=torch.int64)
    plan = StepPlan(2, 0, (), ((2, 0), (LOCAL, 0)))
    run.pipeline.submit(plan, StepInputs(none, none, none))
    finished = run.pipeline.collect()
    assert finished.plan == plan
    assert finished.logits.shape == (0, VOCAB_SIZE)
    assert not run.executors[2].lanes
    assert not run.executors[LOCAL].lanes
