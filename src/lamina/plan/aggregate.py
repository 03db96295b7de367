"""An engine in simulated time without its batcher: many alike steps at once.

Between two events nothing is decided: all running sequences get a token per step, and contexts grow
by one. So many steps pass as one stretch, at the speed in its middle. Events are arrivals, steps
with rows of prompts, sequences that end, and memory that is full. Pages are counted as tokens with
half a page per sequence more, micro-batches as equal parts of all rows, and the local memory of
prompts in progress beside remote executors not at all. docs/planner.md says how far that is from
the exact simulation.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from dataclasses import dataclass, field

from lamina.plan.build import Settings, Site
from lamina.plan.step import StepCost, StepLoad, round_s
from lamina.types import LOCAL

_BIN = math.log(1.005)
"""Times between tokens are counted in bins that are this much apart."""


@dataclass(slots=True)
class Totals:
    """What happened in some instances, together. Times in seconds."""

    ttft_s: list[float] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)
    gaps: Counter[int] = field(default_factory=Counter)
    """Tokens by the bin of the time since their sequence's last one; see `gap_s`."""
    num_tokens: int = 0
    num_tokens_while_arriving: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    last_token_s: float = 0.0
    sequence_s: float = 0.0
    """Running sequences over time."""
    kv_token_s: float = 0.0
    """Cached tokens over time."""
    model_work: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """FLOPs, bytes of memory, bytes over the network of the model workers."""
    attention_work: dict[int, list[float]] = field(default_factory=dict)
    """The same of each executor."""

    def add(self, other: Totals) -> None:
        """Of other instances."""
        self.ttft_s += other.ttft_s
        self.queue_s += other.queue_s
        self.gaps.update(other.gaps)
        for name in ("num_tokens", "num_tokens_while_arriving", "num_steps", "num_preemptions",
                     "sequence_s", "kv_token_s"):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.last_token_s = max(self.last_token_s, other.last_token_s)
        _add(self.model_work, other.model_work, 1)
        for executor, work in other.attention_work.items():
            _add(self.attention_work.setdefault(executor, [0.0, 0.0, 0.0]), work, 1)


def gap_s(index: int) -> float:
    """The time that a bin of `Totals.gaps` stands for."""
    return math.exp(index * _BIN)


class Facts:
    """What all instances of a deployment have in common."""

    def __init__(
        self, site: Site, settings: Settings, *, num_replicas: int, last_arrival_s: float
    ) -> None:
        batcher = site.instance.batcher
        budget, placer = batcher.budget, batcher.placer
        self.cost: StepCost = site.instance.cost
        self.depth = batcher.num_micro_batches
        self.num_replicas = num_replicas
        self.decode_only = settings.decode_only
        self.max_num_seqs = settings.max_num_seqs
        self.max_rows = settings.max_num_batched_tokens
        self.page_tokens = settings.block_size
        self.last_arrival_s = last_arrival_s
        remote = [e for e in budget.capacity_pages if e != LOCAL]
        units = placer.units
        tokens = {
            e: budget.capacity_pages[e] * budget.page_tokens * budget.page_units[e] / units
            for e in remote or [LOCAL]
        }
        self.capacity_tokens = sum(tokens.values())
        self.shares = attention_shares(site)


def attention_shares(site: Site) -> dict[int, float]:
    """Of each executor that an instance's decode rows attend on."""
    weights = site.instance.batcher.placer.weights or {LOCAL: 1.0}
    total = sum(weights.values())
    return {e: weight / total for e, weight in weights.items()}


@dataclass(slots=True, eq=False)
class _Request:
    """A request, or what is left of one that was preempted."""

    arrival_s: float
    prompt: int
    output: int
    """Tokens still to generate."""
    joined: int = 0
    """Steps of the instance when it began to decode."""
    done: int = 0
    """Rows of the prompt that are computed."""
    has_begun: bool = False
    has_token: bool = False
    is_out: bool = False
    """It was preempted, so its end in the heap is none."""


class AggregateInstance:
    """One engine. Give it requests in the order of their arrival, each after `run_until`."""

    def __init__(self, facts: Facts, totals: Totals) -> None:
        """
        Args:
            totals: to add to.
        """
        self._facts = facts
        self._totals = totals
        self._now_s = 0.0
        self._steps = 0
        self._waiting: deque[_Request] = deque()
        self._prompts: list[_Request] = []
        self._running: list[_Request] = []  # in the order of their admission
        self._ends: list[tuple[int, int, _Request]] = []
        self._num_added = 0
        self._tokens = 0  # cached, of those that decode
        self._prompt_tokens = 0  # of the prompts in progress

    @property
    def num_outstanding(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting) + len(self._prompts) + len(self._running)

    def add(self, arrival_s: float, prompt: int, output: int) -> None:
        """A request arrives."""
        self._waiting.append(_Request(arrival_s, prompt, output))
        if self._now_s < arrival_s:
            assert not self._running + self._prompts, "run_until comes before add"
            self._now_s = arrival_s

    def run_until(self, time_s: float) -> None:
        """Let steps begin until that time; the last one may end later."""
        while self._now_s < time_s:
            self._admit()
            if self._prompts:
                self._prompt_step()
            elif self._running:
                self._stretch(time_s)
            else:
                return

    def _admit(self) -> None:
        facts, page = self._facts, self._facts.page_tokens
        while self._waiting:
            count = len(self._running) + len(self._prompts)
            request = self._waiting[0]
            # As the batcher does, leave everybody's next page free.
            held = self._tokens + self._prompt_tokens + 1.5 * page * count
            if count and (
                count >= facts.max_num_seqs
                or held + request.prompt + 1.5 * page > facts.capacity_tokens
            ):
                return
            if not facts.decode_only:
                rows = len(self._running) + sum(p.prompt - p.done for p in self._prompts)
                if self._prompts and rows >= facts.max_rows * facts.depth:
                    return
            self._waiting.popleft()
            if not request.has_begun:
                request.has_begun = True
                self._totals.queue_s.append(self._now_s - request.arrival_s)
            if facts.decode_only:
                self._join(request)
            else:
                self._prompts.append(request)
                self._prompt_tokens += request.prompt

    def _join(self, request: _Request) -> None:
        """It decodes from now on; its prompt is cached."""
        request.joined = self._steps
        self._running.append(request)
        self._tokens += request.prompt
        self._num_added += 1
        heapq.heappush(self._ends, (self._steps + request.output, self._num_added, request))

    def _load(self, rows: float, tokens: float) -> StepLoad:
        """Of one micro-batch without prompts."""
        load = StepLoad(rows=math.ceil(rows), logit_rows=math.ceil(rows))
        for executor, share in self._facts.shares.items():
            load.attending[executor] = rows * share
            load.attended[executor] = tokens * share
        return load

    def _prompt_step(self) -> None:
        """One step of every micro-batch, with rows of prompts in as few of them as hold them."""
        facts, totals = self._facts, self._totals
        count = len(self._running)
        cost, depth = facts.cost, facts.depth
        loads: list[StepLoad] = []
        ended: list[_Request] = []
        pending = iter(self._prompts)
        request: _Request | None = next(pending)
        for _ in range(depth):
            load = self._load(count / depth, (self._tokens + count) / depth)
            while request is not None and load.rows < facts.max_rows:
                self._add_rows(load, request)
                if request.done < request.prompt:
                    break
                load.logit_rows += 1
                ended.append(request)
                request = next(pending, None)
            if load.rows:
                loads.append(load)
        times = [cost.times(load) for load in loads]
        seconds = cost.step_s(round_s(times[0], times[1:], facts.num_replicas))
        for load in loads:
            self._work(load, 1)
        self._pass(seconds, 1, len(loads))
        del self._prompts[: len(ended)]
        for request in ended:
            self._prompt_tokens -= request.prompt
            if not request.has_token:
                request.has_token = True
                totals.ttft_s.append(self._now_s - request.arrival_s)
            request.output -= 1
            self._count(1)
            if request.output:
                self._join(request)

    def _add_rows(self, load: StepLoad, request: _Request) -> None:
        """As many rows of its prompt as the step still takes."""
        rows = min(self._facts.max_rows - load.rows, request.prompt - request.done)
        load.prompts.append((rows, request.done))
        load.rows += rows
        request.done += rows
        for executor, share in self._facts.shares.items():
            if executor != LOCAL:
                load.stored[executor] = load.stored.get(executor, 0.0) + rows * share

    def _stretch(self, time_s: float) -> None:
        """Steps of decode rows alone, up to the next event."""
        facts = self._facts
        count = len(self._running)
        depth = min(facts.depth, count)
        self._drop_ends()
        steps = self._ends[0][0] - self._steps
        room = facts.capacity_tokens - self._tokens - 0.5 * facts.page_tokens * count
        if room < count * steps and count > 1:
            steps = int(room / count)
            if steps < 1:
                self._preempt()
                return
        step_s = self._step_s(count, depth, self._tokens + count * (steps + 1) / 2)
        fitting = (time_s - self._now_s) / step_s
        if fitting < steps:
            steps = max(1, math.ceil(fitting))
            step_s = self._step_s(count, depth, self._tokens + count * (steps + 1) / 2)
        middle = (self._tokens + count * (steps + 1) / 2) / depth
        self._work(self._load(count / depth, middle), steps * depth)
        self._pass(step_s, steps, depth)

    def _step_s(self, count: int, depth: int, tokens: float) -> float:
        cost = self._facts.cost
        times = cost.times(self._load(count / depth, tokens / depth))
        return cost.step_s(round_s(times, [times] * (depth - 1), self._facts.num_replicas))

    def _pass(self, step_s: float, steps: int, depth: int) -> None:
        """All running sequences get a token per step."""
        totals, count = self._totals, len(self._running)
        seconds = step_s * steps
        totals.sequence_s += (count + len(self._prompts)) * seconds
        cached = self._tokens + self._prompt_tokens + count * steps / 2
        totals.kv_token_s += cached * seconds
        totals.num_steps += steps * depth
        first = [r for r in self._running if not r.has_token] if self._facts.decode_only else []
        for request in first:
            request.has_token = True
            totals.ttft_s.append(self._now_s + step_s - request.arrival_s)
        self._now_s += seconds
        self._steps += steps
        self._tokens += count * steps
        if count:
            self._count(count * steps)
            totals.gaps[round(math.log(step_s) / _BIN)] += count * steps - len(first)
        self._drop_ends()

    def _count(self, tokens: int) -> None:
        totals = self._totals
        totals.num_tokens += tokens
        totals.last_token_s = max(totals.last_token_s, self._now_s)
        if self._now_s <= self._facts.last_arrival_s:
            totals.num_tokens_while_arriving += tokens

    def _drop_ends(self) -> None:
        """Forget the sequences that have ended."""
        ends = self._ends
        while ends and (ends[0][2].is_out or ends[0][0] <= self._steps):
            request = heapq.heappop(ends)[2]
            if not request.is_out:
                self._leave(request)

    def _leave(self, request: _Request) -> None:
        self._running.remove(request)
        self._tokens -= self._context(request)

    def _context(self, request: _Request) -> int:
        return request.prompt + self._steps - request.joined

    def _preempt(self) -> None:
        """The youngest gives its memory back and will be computed again."""
        request = self._running[-1]
        context = self._context(request)
        left = request.output - (self._steps - request.joined)
        self._leave(request)
        request.is_out = True
        self._totals.num_preemptions += 1
        again = _Request(request.arrival_s, context, left)
        again.has_begun, again.has_token = True, True
        self._waiting.appendleft(again)

    def _work(self, load: StepLoad, steps: int) -> None:
        cost, totals = self._facts.cost, self._totals
        work = cost.model_work(load)
        network = 0.0
        for executor in self._facts.shares:
            if executor == LOCAL:
                continue
            own = cost.attention_work(load, executor)
            hop = cost.hop_bytes(load, executor)
            network += hop
            kept = totals.attention_work.setdefault(executor, [0.0, 0.0, 0.0])
            _add(kept, (own.flops, own.num_bytes, hop), steps)
        _add(totals.model_work, (work.flops, work.num_bytes, network), steps)


def _add(to: list[float], values: tuple[float, ...] | list[float], times: int) -> None:
    for index, value in enumerate(values):
        to[index] += times * value
