"""One step between scheduler and pipeline: its tensors, made once from its plan."""

from __future__ import annotations

import torch

from lamina.engine.sampler import SamplerRow, prompt_logprobs
from lamina.sched.batcher import Batcher
from lamina.sched.sequence import Sequence
from lamina.types import StepPlan, TokenLogprobs
from lamina.workers.model import StepInputs


class PlannedStep:
    """A plan in flight and what its logits are for.

    Attributes:
        inputs: of the model. Of the logit rows, the first belong to `sampled`, the others to
            prompts whose log-probabilities are wanted.
        sampled: sequences whose next token the step gives.
        begin_s: when planning began.
        planned_s: when it was submitted.
    """

    def __init__(self, plan: StepPlan, batcher: Batcher, begin_s: float) -> None:
        self.plan = plan
        self.begin_s = begin_s
        self.planned_s = begin_s
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
        self.sampled = [sequence for sequence, _ in sampled]
        self.inputs = StepInputs(
            torch.tensor(input_ids, dtype=torch.int64),
            torch.tensor(position_ids, dtype=torch.int64),
            torch.tensor([row for _, row in sampled] + prompt_rows, dtype=torch.int64),
        )

    def sampler_rows(self) -> list[SamplerRow]:
        """What the sampler must know, for each of `sampled`."""
        return [
            SamplerRow(
                s.request.sampling,
                s.request.seed,
                s.request.prompt_token_ids,
                s.output_token_ids,
                s.request.eos_token_ids,
            )
            for s in self.sampled
        ]

    def score_prompts(
        self, logits_PV: torch.Tensor
    ) -> list[tuple[Sequence, tuple[TokenLogprobs, ...]]]:
        """Log-probabilities of the prompt tokens that follow the prompt rows, of each sequence that
        wants them and was not aborted."""
        scored: list[tuple[Sequence, tuple[TokenLogprobs, ...]]] = []
        row = 0
        for sequence, first, last in self._prompt_parts:
            part = logits_PV[row : row + last - first]
            row += last - first
            if not sequence.aborted:
                targets = sequence.tokens(first + 1, last + 1)
                num_top = sequence.request.sampling.prompt_logprobs or 0
                scored.append((sequence, tuple(prompt_logprobs(part, targets, num_top))))
        return scored
