"""Steady state of an engine that computes prompts and decodes in the same steps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import comb
from typing import NamedTuple

from lamina.plan.build import Settings, Site
from lamina.plan.demand import Demand
from lamina.plan.step import StepLoad, StepTimes, round_s
from lamina.types import LOCAL

_DESCENT = 0.93


class Breakdown(NamedTuple):
    """Of the mean time between tokens, in seconds."""

    slices_s: float
    attention_s: float
    """Of the busiest executor, as far as nothing hides it."""
    hops_s: float
    waiting_s: float
    """For other micro-batches on the same devices."""
    prompts_s: float
    """What prompts in the same steps add."""


class Point(NamedTuple):
    """What one batch size gives."""

    requests_per_s: float
    batch: float
    ttft_s: float
    tbt_s: float
    breakdown: Breakdown


class Colocated:
    """A monolithic or model-attention disaggregated engine, by decode rows of a micro-batch."""

    def __init__(
        self,
        site: Site,
        demand: Demand,
        settings: Settings,
        *,
        depth: int = 1,
        num_replicas: int = 1,
    ) -> None:
        batcher = site.instance.batcher
        budget, units = batcher.budget, batcher.placer.units
        self._cost = site.instance.cost
        self._demand = demand
        self._depth = depth
        self._num_replicas = num_replicas
        self._max_rows = settings.max_num_batched_tokens
        self._prompts_are_free = settings.decode_only
        remote = [e for e in budget.capacity_pages if e != LOCAL]
        self._capacity = {
            e: budget.capacity_pages[e] * budget.page_units[e] / units * budget.page_tokens
            for e in remote or [LOCAL]
        }
        """Tokens, by executor with KV."""
        self._weights = {e: batcher.placer.weights.get(e, 1.0) for e in self._capacity}
        # A request's first token comes from its prompt, unless that is free.
        self._steps = demand.output_tokens - (0 if settings.decode_only else 1)
        self.most_tokens = batcher.max_model_len - 1
        """Of one sequence."""
        chunks = 0.0 if settings.decode_only else demand.chunks(self._max_rows)
        prompts = chunks / self._steps  # sequences in their prompts for each that decodes
        self._running = 1 + prompts
        held = demand.context + budget.page_tokens / 2 + prompts * demand.prompt_tokens
        batch = min(
            sum(self._capacity.values()) / held, settings.max_num_seqs / self._running
        )  # fmt: skip
        rows = float(self._max_rows)
        if not settings.decode_only:
            rows /= 1 + demand.prompt_tokens / self._steps
        self.most_batch = int(min(batch / depth, rows))
        """Decode rows of a micro-batch; 0: there is no room."""
        self._held = held
        self._crowded = max(1.0, rows / 2) if not settings.decode_only else self.most_batch
        """Decode rows above which prompts may find too little room in a step."""
        self._points: dict[int, Point] = {}

    def best_batch(self, most: int) -> int:
        """The batch up to `most` with the most throughput. That is not always the largest: decode
        rows can leave little of a step to prompts, and more sequences can spill over to slower
        attention workers."""
        batches = {most}
        for level in {self._capacity[e] / w for e, w in self._weights.items()}:
            tokens = sum(min(c, level * self._weights[e]) for e, c in self._capacity.items())
            batches.add(max(1, min(most, int(tokens / self._held / self._depth))))
        best = max(sorted(batches), key=lambda b: self.point(b).requests_per_s)
        while (less := int(best * _DESCENT)) > self._crowded and (
            self.point(less).requests_per_s > self.point(best).requests_per_s
        ):
            best = less
        return best

    def times(self, batch: int) -> tuple[float, float]:
        """MTIME and ATIME of a step of one micro-batch that carries no prompt."""
        cost = self._cost
        step = cost.times(self._load(batch, 0))
        attention_s = max(step.attention_s.values(), default=0.0) * cost.num_layers
        return cost.slices.seconds(batch), attention_s

    def point(self, batch: int) -> Point:
        point = self._points.get(batch)
        if point is None:
            point = self._points[batch] = self._point(batch)
        return point

    def _point(self, batch: int) -> Point:
        cost, depth = self._cost, self._depth
        load = self._load(batch, 0)
        decode = cost.times(load)
        decode_s = cost.step_s(round_s(decode, [decode] * (depth - 1), self._num_replicas))
        chunks, often = 0.0, 0.0
        step_s = chunk_s = decode_s
        if not self._prompts_are_free:
            demand, room = self._demand, self._max_rows - batch
            chunks = demand.chunks(room)
            due = batch * demand.prompt_tokens / self._steps  # prompt rows per step
            rows = min(room, max(demand.prompt_tokens / chunks, due))
            often = min(1.0, due / rows)
            with_chunk = cost.times(self._load(batch, max(1, round(rows))))
            step_s, chunk_s = self._mean_steps(decode, with_chunk, often)
        slices_s = cost.slices.seconds(batch)
        own_s = cost.step_s(decode.own_s)
        local_s = cost.local_attention_s(load)
        remote_s = max(decode.attention_s.values(), default=0.0) * cost.num_layers
        visible_s = min(remote_s, max(0.0, own_s - slices_s))
        breakdown = Breakdown(
            slices_s=slices_s,
            attention_s=local_s + visible_s,
            hops_s=max(0.0, own_s - slices_s - visible_s - local_s),
            waiting_s=max(0.0, decode_s - own_s),
            prompts_s=max(0.0, step_s - decode_s),
        )
        return Point(
            requests_per_s=depth * batch / (self._steps * step_s),
            batch=depth * batch * self._running,
            ttft_s=step_s / 2 + max(1.0, chunks) * chunk_s,
            tbt_s=step_s,
            breakdown=breakdown,
        )

    def _mean_steps(self, decode: StepTimes, chunk: StepTimes, often: float) -> tuple[float, float]:
        """Mean seconds of a step, and of one that carries a chunk, if each micro-batch carries one
        with probability `often`."""

        def step_s(own: StepTimes, num_chunks: int) -> float:
            """Of `own` while so many of the others carry chunks."""
            others = [chunk] * num_chunks + [decode] * (self._depth - 1 - num_chunks)
            return self._cost.step_s(round_s(own, others, self._num_replicas))

        decode_s = chunk_s = 0.0
        for count, probability in enumerate(_binomial(self._depth - 1, often)):
            if probability > 1e-6:
                decode_s += probability * step_s(decode, count)
                chunk_s += probability * step_s(chunk, count)
        return (1 - often) * decode_s + often * chunk_s, chunk_s

    def _load(self, batch: int, prompt_rows: int) -> StepLoad:
        demand = self._demand
        tokens = batch * demand.context
        load = StepLoad(rows=batch + prompt_rows, logit_rows=batch)
        shares = self._shares(self._depth * batch * self._held)
        for executor, share in shares.items():
            load.attending[executor] = batch * share
            load.attended[executor] = tokens * share
        if prompt_rows:
            load.logit_rows += round(prompt_rows / demand.prompt_tokens)
            load.prompts = prompt_chunks(prompt_rows, demand.prompt_context)
            load.stored = {e: prompt_rows * share for e, share in shares.items() if e != LOCAL}
        return load

    def _shares(self, tokens: float) -> Mapping[int, float]:
        """Parts of all cached tokens by executor: by weight, as far as each one's memory goes."""
        if len(self._capacity) == 1:
            return dict.fromkeys(self._capacity, 1.0)
        held: dict[int, float] = {}
        left, open_ = tokens, dict(self._weights)
        while open_:
            level = left / sum(open_.values())
            full = [e for e in open_ if self._capacity[e] < level * open_[e]]
            for e in full or list(open_):
                held[e] = self._capacity[e] if full else level * open_[e]
                left -= held[e]
                del open_[e]
        return {e: n / tokens for e, n in held.items()}


def prompt_chunks(rows: int, context: float) -> list[tuple[int, int]]:
    """Chunks of prompts (rows, tokens before) with so many rows in all, each of which attends to
    `context` tokens on average."""
    before = context - (rows + 1) / 2
    if before >= 0:
        return [(rows, round(before))]
    count = max(1, round(rows / max(1.0, 2 * context - 1)))
    return [(rows // count + (i < rows % count), 0) for i in range(count)]


@cache
def _binomial(trials: int, probability: float) -> tuple[float, ...]:
    return tuple(
        comb(trials, k) * probability**k * (1 - probability) ** (trials - k)
        for k in range(trials + 1)
    )
