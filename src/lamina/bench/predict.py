"""Predicted against measured decoding, deployment by deployment.

The prediction is a simulation (`plan.simulate`) with a profile measured in the same minutes on a
model of another shape, scaled to the one that is served (`plan.scaling`); the batches and contexts
are none of those that the profile was measured at. Nothing in it is fitted to the deployments.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import torch

from lamina.bench.parts import EnginePart, PartProcess, Tokens
from lamina.bench.placements import Placement, placed_config
from lamina.bench.subjects import PREFILL_ROWS
from lamina.errors import ConfigError
from lamina.plan.arrivals import Arrival, Workload
from lamina.plan.build import Settings
from lamina.plan.deployment import parse_deployment
from lamina.plan.model import ModelCost
from lamina.plan.profile import Profile
from lamina.plan.scaling import scaled
from lamina.plan.simulate import simulate
from lamina.types import ceil_div

MEDIAN_LIMIT = 0.15
WORST_LIMIT = 0.30


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment with sequences to decode."""

    placement: str
    depth: int
    batch: int
    context: int


def _case(placement: str, depth: int, batch: int, context: int) -> Case:
    return Case(placement=placement, depth=depth, batch=batch, context=context)


CASES = (
    _case("monolithic", 1, 5, 200),
    _case("monolithic", 1, 10, 800),
    _case("shared", 1, 5, 200),
    _case("shared", 1, 10, 800),
    _case("shared", 2, 10, 400),
    _case("shared", 2, 28, 200),
    _case("pair", 1, 10, 400),
    _case("pair", 1, 28, 200),
    _case("pair", 2, 10, 400),
    _case("apart", 1, 5, 800),
    _case("apart", 1, 10, 400),
    _case("apart", 2, 28, 200),
    _case("apart", 2, 10, 700),
)


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A case, measured and predicted."""

    deployment: str
    placement: str
    batch: int
    context: int
    """Tokens of a sequence, on average over sequences and turns."""
    measured_tokens_per_s: float
    predicted_tokens_per_s: float
    measured_tbt_ms: float
    """Median over all tokens."""
    predicted_tbt_ms: float
    measured_low: float
    """Tokens per second of the slowest turn."""
    measured_high: float

    @property
    def throughput_error(self) -> float:
        """Signed, of the measured value."""
        return self.predicted_tokens_per_s / self.measured_tokens_per_s - 1

    @property
    def tbt_error(self) -> float:
        return self.predicted_tbt_ms / self.measured_tbt_ms - 1


class Errors(msgspec.Struct, frozen=True, kw_only=True):
    """Absolute errors over all figures."""

    median_throughput: float
    worst_throughput: float
    median_tbt: float
    worst_tbt: float

    @property
    def within_limits(self) -> bool:
        return (
            max(self.median_throughput, self.median_tbt) <= MEDIAN_LIMIT
            and max(self.worst_throughput, self.worst_tbt) <= WORST_LIMIT
        )


def errors(figures: Sequence[Figure]) -> Errors:
    throughput = [abs(f.throughput_error) for f in figures]
    tbt = [abs(f.tbt_error) for f in figures]
    return Errors(
        median_throughput=statistics.median(throughput),
        worst_throughput=max(throughput),
        median_tbt=statistics.median(tbt),
        worst_tbt=max(tbt),
    )


def predict(
    case: Case,
    placement: Placement,
    model: ModelCost,
    profile: Profile,
    *,
    context: int,
    num_tokens: int,
) -> tuple[float, float]:
    """Tokens per second and median seconds between tokens of a simulated run.

    Args:
        profile: of any model on this machine.
        context: tokens of every sequence at the beginning.
        num_tokens: to generate for each.
    """
    arrival = Arrival(time_s=0.0, prompt_tokens=context, output_tokens=num_tokens + 1)
    result = simulate(
        model,
        parse_deployment(placement.deployment(case.depth), profile.with_devices({})),
        Workload(name="decode", arrivals=(arrival,) * case.batch),
        Settings(
            decode_only=True, at_once=True, max_num_seqs=case.batch, profile=scaled(profile, model)
        ),
    )
    assert result.tbt_s is not None, "there are several tokens per sequence"
    return result.tokens_per_s, result.tbt_s.p50


def compare(
    case: Case,
    placement: Placement,
    model: ModelCost,
    profile: Profile,
    turns: Sequence[Tokens],
) -> Figure:
    """Put a prediction beside what was measured in some turns."""
    rate, tbt_s = predict(
        case,
        placement,
        model,
        profile,
        # Sequences are longer than their prompts: the first ones decode while others' are computed.
        context=round(turns[0].context),
        num_tokens=max(2, round(turns[-1].context - turns[0].context)),
    )
    rates = [turn.count / turn.seconds for turn in turns]
    return Figure(
        deployment=placement.deployment(case.depth),
        placement=case.placement,
        batch=case.batch,
        context=round(statistics.fmean(turn.context for turn in turns)),
        measured_tokens_per_s=statistics.median(rates),
        predicted_tokens_per_s=rate,
        measured_tbt_ms=1e3 * statistics.median(gap for turn in turns for gap in turn.gaps_s),
        predicted_tbt_ms=1e3 * tbt_s,
        measured_low=min(rates),
        measured_high=max(rates),
    )


class Deployments:
    """Engines of all cases, alive together, each with the cases that it can serve."""

    def __init__(
        self,
        folder: Path,
        cases: Sequence[Case],
        placements: Mapping[str, Placement],
        *,
        vocab_size: int,
        turns: int,
        tokens: int,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Blocks until all engines are ready.

        Args:
            folder: of the config.json.
            placements: of this machine; cases in others are left out.
            turns: of every case.
            tokens: per sequence in a turn.

        Raises:
            ConfigError: no case is left.
        """
        self._placements = placements
        self._turns, self._tokens = turns, tokens
        self._vocab_size = vocab_size
        self._progress = progress
        self._queues: dict[tuple[str, int], list[Case]] = {}
        for case in cases:
            if case.placement in placements:
                self._queues.setdefault((case.placement, case.depth), []).append(case)
        if not self._queues:
            raise ConfigError("no deployment to predict fits on this machine")
        self.measured: dict[Case, list[Tokens]] = {}
        with ExitStack() as stack:
            self._engines: dict[tuple[str, int], PartProcess] = {}
            for (name, depth), own in self._queues.items():
                config = placed_config(
                    folder,
                    placements[name],
                    depth=depth,
                    batch=max(case.batch for case in own),
                    length=max(case.context + self._margin(case) for case in own),
                    rows=PREFILL_ROWS,
                )
                engine = PartProcess(f"{name}, depth {depth}", EnginePart, config)
                stack.callback(engine.close)
                self._engines[name, depth] = engine
                progress(f"engine {name}, depth {depth}: ready")
            self._stack = stack.pop_all()

    def _margin(self, case: Case) -> int:
        """Tokens that a sequence gets while others' prompts are computed, and in the turns.

        With several micro-batches, one that only decodes overtakes one with prompts many times.
        """
        num_prompt_tokens = case.batch * case.context
        prompt_steps = ceil_div(num_prompt_tokens, PREFILL_ROWS) + case.batch
        if case.depth > 1:
            prompt_steps += num_prompt_tokens // 6
        return 2 * prompt_steps + self._turns * (self._tokens + 8)

    def measure_next(self) -> bool:
        """Measure the next case of every engine, all of them in turns; False if none was left."""
        cases = {key: queue.pop(0) for key, queue in self._queues.items() if queue}
        for key, case in cases.items():
            generator = torch.Generator().manual_seed(case.batch)
            shape = (case.batch, case.context)
            prompts = torch.randint(self._vocab_size, shape, generator=generator).tolist()
            self._engines[key].call("prefill", prompts)
            self._progress(
                f"prompts of {case.placement}, depth {case.depth}, {case.batch} x {case.context}"
            )
        for _ in range(self._turns):
            for key, case in cases.items():
                tokens: Tokens = self._engines[key].call("record", self._tokens)
                self.measured.setdefault(case, []).append(tokens)
        return bool(cases)

    def figures(self, model: ModelCost, profile: Profile) -> list[Figure]:
        """Of the cases measured so far."""
        return [
            compare(case, self._placements[case.placement], model, profile, turns)
            for case, turns in self.measured.items()
        ]

    def close(self) -> None:
        self._stack.close()
