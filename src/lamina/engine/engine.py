"""The engine: plan -> run -> apply.

It owns the scheduler and the model worker of rank 0. It knows tokens, never text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq

import torch

from lamina.config import EngineConfig
from lamina.convert import SlicedModel
from lamina.engine.messages import EngineStats, ExecutorStats, ModelInfo
from lamina.engine.sampler import Sampler, SamplerRow, prompt_logprobs
from lamina.sched.batcher import Batcher
from lamina.sched.sequence import Sequence
from lamina.types import (
    EngineRequest,
    FinishReason,
    SequenceOutput,
    StepPlan,
    TokenLogprobs,
)
from lamina.workers.deployment import Deployment
from lamina.workers.fleet import ExecutorFleet
from lamina.workers.model import ModelWorker


class Engine:
    """Continuous batching over one model worker and its attention executors. One thread uses it."""

    def __init__(
        self,
        config: EngineConfig,
        model: SlicedModel,
        deployment: Deployment,
        fleet: ExecutorFleet,
    ) -> None:
        """
        Args:
            fleet: the running executors; the engine uses them and does not close them.
        """
        self.model = model
        self.deployment = deployment
        self._config = config
        self._fleet = fleet
        self._worker = ModelWorker(
            model, fleet.ends, early_q=config.early_q, step_deadline_s=config.step_deadline_s
        )
        self._sampler = Sampler()
        budget = deployment.page_budget()
        self._batcher = Batcher(
            budget,
            deployment.placer(budget),
            num_micro_batches=deployment.max_depth,
            num_replicas=deployment.num_replicas,
            max_num_seqs=config.max_num_seqs,
            max_num_rows=config.max_num_batched_tokens,
            max_model_len=deployment.max_model_len,
        )
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_steps = 0
        self._sample_s = 0.0
        self._schedule_s = 0.0

    @property
    def info(self) -> ModelInfo:
        """What the front end must know."""
        return ModelInfo(
            architecture=self.model.architecture,
            dtype=str(self.model.dtype).removeprefix("torch."),
            vocab_size=self.model.vocab_size,
            max_model_len=self.deployment.max_model_len,
            eos_token_ids=self.model.eos_token_ids,
            max_num_seqs=self._config.max_num_seqs,
            max_num_waiting=self._config.max_num_waiting,
            attention=self.deployment.describe(),
        )

    @property
    def has_work(self) -> bool:
        return self._batcher.has_work

    def add(self, request: EngineRequest) -> None:
        """Queue a request that the front end has validated against `info`."""
        self._batcher.add(request)

    def abort(self, request_id: str) -> None:
        """Forget a request; unknown ones (already finished) are fine."""
        self._batcher.abort(request_id)

    def step(self) -> list[SequenceOutput]:
        """Run one step of one micro-batch and return what it adds to the requests.

        Raises:
            TransportError, CapacityError: an executor failed; the engine must not be used further.
        """
        clock = time.perf_counter
        start = clock()
        plan = self._batcher.plan()
        if plan is None:
            return []
        step = _StepInputs(plan, self._batcher)
        planned = clock()
        logits = self._worker.run(plan, step.input_ids, step.position_ids, step.logit_rows)
        ran = clock()
        outputs = self._apply(plan, step, logits)
        self._schedule_s += planned - start
        self._sample_s += clock() - ran
        self._num_steps += 1
        return outputs

    def stats(self) -> EngineStats:
        """A snapshot of the queue, the pages and where time went."""
        budget, times = self._batcher.budget, self._worker.times
        return EngineStats(
            num_running=self._batcher.num_running,
            num_waiting=self._batcher.num_waiting,
            executors=tuple(
                ExecutorStats(
                    name=self._fleet.name(executor),
                    pages_used=budget.used(executor),
                    pages_total=pages,
                    alive=self._fleet.lost(executor) is None,
                )
                for executor, pages in sorted(budget.capacity_pages.items())
            ),
            prompt_tokens_total=self._num_prompt_tokens,
            generated_tokens_total=self._num_generated_tokens,
            preemptions_total=self._batcher.num_preemptions,
            steps_total=self._num_steps,
            seconds={
                "schedule": self._schedule_s,
                "slices": times.slices_s,
                "send": times.post_s,
                "attention": times.attention_s,
                "steps_other": times.other_s,
                "sample": self._sample_s,
            },
        )

    def check_integrity(self) -> tuple[list[str], list[ExecutorStats]]:
        """Problems of every executor's allocator, and disagreements with the engine's arithmetic.

        Blocks for one round trip to each worker.

        Raises:
            TransportError: an executor failed; the engine must not be used further.
        """
        if (plan := self._batcher.plan_releases()) is not None:
            none = torch.empty(0, dtype=torch.int64)
            self._worker.run(plan, none, none, none)
        problems: list[str] = []
        counts: list[ExecutorStats] = []
        for executor, report in self._fleet.integrity().items():
            name = self._fleet.name(executor)
            problems += [f"{name}: {problem}" for problem in report.problems]
            expected = self._batcher.budget.sequences(executor)
            if set(report.sequences) != expected:
                problems.append(
                    f"{name} holds sequences {sorted(report.sequences)}, "
                    f"the engine counts {sorted(expected)}"
                )
            counts.append(
                ExecutorStats(
                    name=name, pages_used=report.pages_used, pages_total=report.pages_total
                )
            )
        return problems, counts

    def _apply(
        self, plan: StepPlan, step: _StepInputs, logits: torch.Tensor
    ) -> list[SequenceOutput]:
        sampled = step.sampled
        rows = [
            SamplerRow(
                s.request.sampling,
                s.request.seed,
                s.request.prompt_token_ids,
                s.output_token_ids,
                s.request.eos_token_ids,
            )
            for s in sampled
        ]
        result = self._sampler.sample(logits[: len(rows)], rows)
        scored = step.score_prompts(logits[len(rows) :])
        tokens: dict[int, int] = {}
        outputs: list[SequenceOutput] = []
        for row, sequence in enumerate(sampled):
            if row in result.errors:
                outputs.append(
                    SequenceOutput(
                        request_id=sequence.request.request_id,
                        prompt_logprobs=scored.pop(sequence.id, ()),
                        finish_reason=FinishReason.ERROR,
                        error=result.errors[row],
                    )
                )
            else:
                tokens[sequence.id] = result.token_ids[row]
            if not sequence.output_token_ids:
                self._num_prompt_tokens += sequence.num_prompt_tokens
        finishes = self._batcher.apply(plan, tokens)
        for output in outputs:
            self._batcher.abort(output.request_id)
        for row, sequence in enumerate(sampled):
            if sequence.id not in tokens:
                continue
            finish = finishes[sequence.id]
            stopped = finish is not None and finish.reason is FinishReason.STOP
            logprobs = result.logprobs[row]
            self._num_generated_tokens += not stopped
            outputs.append(
                SequenceOutput(
                    request_id=sequence.request.request_id,
                    token_ids=() if stopped else (tokens[sequence.id],),
                    logprobs=() if stopped or logprobs is None else (logprobs,),
                    prompt_logprobs=scored.pop(sequence.id, ()),
                    finish_reason=finish.reason if finish else None,
                    stop_token_id=finish.stop_token_id if finish else None,
                )
            )
        for sequence_id, entries in scored.items():
            request_id = self._batcher.sequence(sequence_id).request.request_id
            outputs.append(SequenceOutput(request_id=request_id, prompt_logprobs=entries))
        return outputs


class _StepInputs:
    """Tensors and bookkeeping of one step, made once from its plan."""

    def __init__(self, plan: StepPlan, batcher: Batcher) -> None:
        input_ids: list[int] = []
        position_ids: list[int] = []
        prompt_rows: list[int] = []
        self._prompt_parts: list[tuple[Sequence, int, int]] = []
        for span in plan.spans:
            sequence = batcher.sequence(span.sequence)
            start, stop = span.context_tokens, span.context_tokens + span.num_rows
            if sequence.request.sampling.prompt_logprobs is not None:
                first = max(start, sequence.num_scored)
                last = min(stop, sequence.num_prompt_tokens - 1)
                if first < last:
                    offset = len(input_ids) - start
                    prompt_rows.extend(range(offset + first, offset + last))
                    self._prompt_parts.append((sequence, first, last))
                    sequence.num_scored = last
            input_ids += sequence.tokens(start, stop)
            position_ids += range(start, stop)
        sampled = batcher.sampled_rows(plan)
        self.sampled: Seq[Sequence] = [sequence for sequence, _ in sampled]
        self.input_ids = torch.tensor(input_ids, dtype=torch.int64)
        self.position_ids = torch.tensor(position_ids, dtype=torch.int64)
        self.logit_rows = torch.tensor([row for _, row in sampled] + prompt_rows, dtype=torch.int64)

    def score_prompts(self, logits_PV: torch.Tensor) -> dict[int, tuple[TokenLogprobs, ...]]:
        """Log-probabilities of the prompt tokens that follow the prompt rows, per sequence."""
        scored: dict[int, tuple[TokenLogprobs, ...]] = {}
        row = 0
        for sequence, first, last in self._prompt_parts:
            targets = sequence.tokens(first + 1, last + 1)
            num_top = sequence.request.sampling.prompt_logprobs or 0
            part = logits_PV[row : row + last - first]
            scored[sequence.id] = tuple(prompt_logprobs(part, targets, num_top))
            row += last - first
        return scored
