"""The engine: plan -> submit -> collect -> apply, with a step of every micro-batch in flight.

It owns the scheduler and knows tokens, never text. Who runs the slices is the pipeline's business.
"""

from __future__ import annotations

import time

import torch

from lamina.config import EngineConfig
from lamina.convert import SlicedModel
from lamina.engine.events import StepRecord
from lamina.engine.messages import EngineStats, ExecutorStats, ModelInfo
from lamina.engine.pacing import Pacing
from lamina.engine.phases import PhaseHistograms
from lamina.engine.sampler import Sampler
from lamina.engine.steps import PlannedStep
from lamina.engine.timeline import Timeline
from lamina.engine.trace import TraceWriter
from lamina.kv.pages import bytes_per_page, cache_dtype_name
from lamina.plan.priors import Priors
from lamina.sched.batcher import Batcher
from lamina.sched.depth import DepthPolicy
from lamina.sched.sequence import Finish
from lamina.sched.weights import WorkerWeights
from lamina.types import EngineRequest, FinishReason, SequenceOutput, StepPlan, TokenLogprobs
from lamina.workers.deployment import Deployment
from lamina.workers.fleet import ExecutorFleet
from lamina.workers.model import StepInputs
from lamina.workers.pipeline import Finished, Pipeline


class Engine:
    """Continuous batching over a pipeline and its attention executors. One thread uses it.

    Attributes:
        timeline: of the last steps.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: SlicedModel,
        deployment: Deployment,
        fleet: ExecutorFleet,
        pipeline: Pipeline,
        *,
        trace: TraceWriter | None = None,
        priors: Priors | None = None,
    ) -> None:
        """
        Args:
            fleet: the running executors; the engine uses them and does not close them.
            pipeline: over these executors.
            trace: gets every step; not closed either.
            priors: what a profile says of them.
        """
        self.model = model
        self.deployment = deployment
        self._config = config
        self._fleet = fleet
        self._pipeline = pipeline
        self._sampler = Sampler()
        budget = deployment.page_budget()
        self._batcher = Batcher(
            budget,
            deployment.placer(budget),
            num_micro_batches=pipeline.num_micro_batches,
            num_replicas=deployment.num_replicas,
            max_num_seqs=config.max_num_seqs,
            max_num_rows=config.max_num_batched_tokens,
            max_model_len=deployment.max_model_len,
        )
        self._trace = trace
        self._phases = PhaseHistograms()
        self.timeline = Timeline(fleet.name)
        self._pacing = _pacing(config, model, deployment, fleet, priors)
        self._batcher.depth = self._pacing.depth
        self._plans: dict[int, StepPlan] = {}  # of steps whose records are to come
        self._in_flight: dict[int, PlannedStep] = {}
        self._outputs: list[SequenceOutput] = []  # of steps collected outside of `step`
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
        """Whether `step` has something to do or to return."""
        return bool(self._outputs) or self._batcher.has_work

    def add(self, request: EngineRequest) -> None:
        """Queue a request that the front end has validated against `info`."""
        self._batcher.add(request)

    def abort(self, request_id: str) -> None:
        """Forget a request; unknown ones (already finished) are fine."""
        self._batcher.abort(request_id)

    def step(self) -> list[SequenceOutput]:
        """Bring every idle micro-batch into flight, wait until a step is through, and return what
        it adds to the requests.

        Raises:
            TransportError, CapacityError: an executor failed; the engine must not be used further.
        """
        self._submit_idle()
        outputs, self._outputs = self._outputs, []
        if self._in_flight:
            outputs += self._collect()
            if self._pipeline.runs_ahead:
                self._submit_idle()
        return outputs

    def stats(self) -> EngineStats:
        """A snapshot of the queue, the pages and where time went."""
        budget, times = self._batcher.budget, self._pipeline.times
        return EngineStats(
            num_running=self._batcher.num_running,
            num_waiting=self._batcher.num_waiting,
            executors=tuple(
                ExecutorStats(
                    name=self._fleet.name(executor),
                    pages_used=budget.used(executor),
                    pages_total=pages,
                    alive=self._fleet.lost(executor) is None,
                    weight=self._batcher.placer.weights.get(executor),
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
            phases=self._phases.snapshot(),
        )

    def check_integrity(self) -> tuple[list[str], list[ExecutorStats]]:
        """Problems of every executor's allocator, and disagreements with the engine's arithmetic.

        Steps in flight are finished first; what they add to requests comes with the next `step`.
        Blocks for one round trip to each worker.

        Raises:
            TransportError: an executor failed; the engine must not be used further.
        """
        while self._in_flight:
            self._outputs += self._collect()
        if (plan := self._batcher.plan_releases()) is not None:
            none = torch.empty(0, dtype=torch.int64)
            self._pipeline.submit(plan, StepInputs(none, none, none))
            self._pipeline.collect()
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

    def _submit_idle(self) -> None:
        """Plan and submit a step of every micro-batch that has none in flight."""
        clock = time.monotonic
        for micro_batch in self._batcher.idle:
            start = clock()
            plan = self._batcher.plan(micro_batch)
            if plan is not None:
                step = PlannedStep(plan, self._batcher, start)
                planned = clock()
                self._pipeline.submit(plan, step.inputs)
                step.planned_s = clock()
                self._in_flight[micro_batch] = step
                self._schedule_s += planned - start

    def _collect(self) -> list[SequenceOutput]:
        """Wait until a step is through and apply it."""
        finished = self._pipeline.collect()
        logits_s = time.monotonic()
        step = self._in_flight.pop(finished.plan.micro_batch)
        outputs = self._apply(step, finished)
        end_s = time.monotonic()
        self._sample_s += end_s - logits_s
        self._num_steps += 1
        if step.plan.spans:
            self._plans[step.plan.step] = step.plan
        records = self.timeline.add(
            finished,
            begin_s=step.begin_s,
            planned_s=step.planned_s,
            logits_s=logits_s,
            end_s=end_s,
        )
        if not self._batcher.has_work:
            records += self.timeline.flush()
        for record in records:
            self._take_note(record)
        return outputs

    def _take_note(self, record: StepRecord) -> None:
        """Let the policies see a step, and follow them; add it to the histograms and the trace."""
        plan = self._plans.pop(record.step)
        weights = self._pacing.observe(record, plan, self._batcher.num_decoding)
        if weights is not None:
            self._batcher.placer.weights.update(weights)
        self._batcher.depth = self._pacing.depth
        self._phases.add(record)
        if self._trace is not None:
            self._trace.write(record)

    def _apply(self, step: PlannedStep, finished: Finished) -> list[SequenceOutput]:
        """Sample, and commit the step. Sequences aborted meanwhile add nothing."""
        sampled, logits = step.sampled, finished.logits
        result = self._sampler.sample(logits[: len(sampled)], step.sampler_rows())
        scored = {
            sequence.request.request_id: entries
            for sequence, entries in step.score_prompts(logits[len(sampled) :])
        }
        alive = [(row, s) for row, s in enumerate(sampled) if not s.aborted]
        tokens = {s.id: result.token_ids[row] for row, s in alive if row not in result.errors}
        self._num_prompt_tokens += sum(
            s.num_prompt_tokens for _, s in alive if not s.output_token_ids
        )
        finishes = self._batcher.apply(step.plan, tokens)
        outputs: list[SequenceOutput] = []
        for row, sequence in alive:
            request_id = sequence.request.request_id
            prompt_logprobs = scored.pop(request_id, ())
            if row in result.errors:
                self._batcher.abort(request_id)
                outputs.append(
                    SequenceOutput(
                        request_id=request_id,
                        prompt_logprobs=prompt_logprobs,
                        finish_reason=FinishReason.ERROR,
                        error=result.errors[row],
                    )
                )
                continue
            output = _output(
                request_id,
                result.token_ids[row],
                result.logprobs[row],
                prompt_logprobs,
                finishes[sequence.id],
            )
            self._num_generated_tokens += len(output.token_ids)
            outputs.append(output)
        for request_id, entries in scored.items():
            outputs.append(SequenceOutput(request_id=request_id, prompt_logprobs=entries))
        return outputs


def _pacing(
    config: EngineConfig,
    model: SlicedModel,
    deployment: Deployment,
    fleet: ExecutorFleet,
    priors: Priors | None,
) -> Pacing:
    weights = WorkerWeights(
        deployment.remote, num_layers=model.num_layers, fixed=deployment.weights
    )
    speeds = fleet.read_bytes_per_s if priors is None else priors.bytes_per_s
    for executor, speed in speeds.items():
        weights.probe(executor, speed, 0.0)
    dtype = str(model.dtype).removeprefix("torch.")
    page_bytes = bytes_per_page(
        model.attention_specs, config.block_size, cache_dtype_name(config.kv_cache_dtype, dtype)
    )
    return Pacing(
        weights,
        DepthPolicy(
            deployment.max_depth,
            num_replicas=deployment.num_replicas,
            shares_cores=deployment.shares_cores,
            fixed=config.pipeline_depth,
            prior=None if priors is None else priors.tokens_per_s,
        ),
        {fleet.name(executor): executor for executor in deployment.num_pages},
        page_bytes / (config.block_size * deployment.units),
    )


def _output(
    request_id: str,
    token_id: int,
    logprobs: TokenLogprobs | None,
    prompt_logprobs: tuple[TokenLogprobs, ...],
    finish: Finish | None,
) -> SequenceOutput:
    """What a sampled token adds to its request; a stop token is not a part of the output."""
    stopped = finish is not None and finish.reason is FinishReason.STOP
    return SequenceOutput(
        request_id=request_id,
        token_ids=() if stopped else (token_id,),
        logprobs=() if stopped or logprobs is None else (logprobs,),
        prompt_logprobs=prompt_logprobs,
        finish_reason=finish.reason if finish else None,
        stop_token_id=finish.stop_token_id if finish else None,
    )
