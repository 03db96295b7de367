"""How many micro-batches to have in flight: a model's guess, corrected by trying. Pure.

The guess: with R decode rows in all, n micro-batches have R / n rows each; a slice takes a + b R /
n seconds, an attention op c times its cached tokens; `pipeline.round_s` says how long a round is. A
pipeline of n yields R tokens per `num_slices` rounds. Where model and attention share cores or a
memory bus, the guess is wrong by what they slow each other down, so that what was measured at a
depth scales the guesses for it from then on; and now and then a neighbouring depth is tried for a
few steps and kept if it is more than 3 % faster. Where a profile of the machine is at hand, its own
guess (`Prior`) takes the model's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from lamina.sched.pipeline import round_s

_BETTER = 1.03
"""A depth must be this much faster to be preferred to the one in use."""
_WINDOW_STEPS = 16
"""Steps whose tokens per second are measured."""
_FIRST_STEPS = 4
"""Decode steps before the first guess."""
_TRIAL_STEPS = (64, 4096)
"""Steps between two trials; doubled, up to the larger one, with every trial that changed
nothing."""
_LOAD_CHANGE = 1.25
"""If rows or cached tokens are off by this factor, the depth is guessed anew."""
_ALPHA = 0.1


Prior = Callable[[int, int, float], float]
"""Tokens per second at a depth, with so many decode rows in all, of so many cached tokens each."""


class StepSample(msgspec.Struct, frozen=True, kw_only=True):
    """A step that was applied."""

    now_s: float
    """When it was applied."""
    num_rows: int
    """Its decode rows."""
    num_prompt_rows: int
    num_tokens: int
    """Cached tokens that its decode rows attended to."""
    slice_s: float
    """Mean seconds of its slices, computing only."""
    attention_s: float
    """Mean seconds from the end of a slice's work to the attention output, without waiting behind
    other micro-batches."""
    num_decoding: int
    """Decode rows of all micro-batches together, now."""


class DepthPolicy:
    """Chooses the number of micro-batches in flight from what steps take."""

    def __init__(
        self,
        max_depth: int,
        *,
        num_replicas: int = 1,
        shares_cores: bool = False,
        fixed: int | None = None,
        prior: Prior | None = None,
    ) -> None:
        """
        Args:
            max_depth: largest depth to use.
            shares_cores: model and attention compute on the same cores, so neither works while the
                other does (where they only disturb each other, trials find out).
            fixed: the depth that the user gave.
            prior: what a profile says, instead of the model of slices and attention.
        """
        self._prior = prior
        self._max_depth = max_depth
        self._num_replicas = num_replicas
        self._shares_cores = shares_cores
        self._fixed = fixed
        self._times = _StepTimes()
        self._scale: dict[int, float] = {}  # measured over guessed, of each depth that was in use
        # Replicas without a micro-batch are of no use; with fewer rows some just stay empty.
        self._least = min(num_replicas, max_depth)
        self._depth = self._least if fixed is None else fixed
        self._trial: int | None = None
        self._baseline = 0.0  # tokens per second before the trial
        self._window = _Window(skip=0)
        self._num_steps = 0
        self._next_trial = 0
        self._patience = _TRIAL_STEPS[0]
        self._load = (0, 0.0)  # decode rows, and cached tokens of one, at the last guess
        self._last_trial = 0

    @property
    def depth(self) -> int:
        """Micro-batches to have in flight now."""
        return self._depth if self._trial is None else self._trial

    def observe(self, sample: StepSample) -> int:
        """Take note of a step.

        Returns:
            The depth from now on: at most one micro-batch per decode row, at least one per replica.
        """
        if self._fixed is not None:
            return self._fixed
        if sample.num_rows == 0 or sample.num_decoding == 0:
            self._window = _Window(skip=2 * self.depth)
            return self.depth
        self._num_steps += 1
        if not sample.num_prompt_rows:
            self._times.observe(sample)
        if self._prior is None and self._times.num_observed < _FIRST_STEPS:
            return self.depth
        if self._has_load_changed(sample):
            self._guess(sample)
        elif rate := self._window.observe(sample, _WINDOW_STEPS):
            self._conclude(rate, sample)
        elif self._window.is_hopeless:
            self._switch(self._depth, None)
        return self.depth

    def _candidates(self, sample: StepSample) -> range:
        most = max(self._least, min(self._max_depth, sample.num_decoding))
        return range(self._least, most + 1)

    def _has_load_changed(self, sample: StepSample) -> bool:
        rows, tokens = self._load
        if self.depth not in self._candidates(sample):
            return True
        return any(
            not 1 / _LOAD_CHANGE <= (now + 1) / (before + 1) <= _LOAD_CHANGE
            for now, before in (
                (sample.num_decoding, rows),
                (sample.num_tokens / sample.num_rows, tokens),
            )
        )

    def _guess(self, sample: StepSample) -> None:
        """Take the depth that the model, as corrected so far, says is best for the load of now."""
        self._load = (sample.num_decoding, sample.num_tokens / sample.num_rows)
        candidates = self._candidates(sample)
        current = min(self._depth, candidates[-1])
        best = self._best(candidates, sample)
        is_better = self._expected(best, sample) > _BETTER * self._expected(current, sample)
        self._patience = _TRIAL_STEPS[0]
        self._next_trial = self._num_steps + self._patience
        self._switch(best if is_better else current, None)

    def _best(self, depths: Iterable[int], sample: StepSample) -> int:
        return max(depths, key=lambda n: (self._expected(n, sample), -n))

    def _expected(self, depth: int, sample: StepSample) -> float:
        """Tokens per second per slice, up to a factor that is the same for all depths."""
        known = self._scale.get(depth)
        if known is None:
            # As wrong as it is at the nearest depth that was measured.
            nearest = min(self._scale, key=lambda n: abs(n - depth), default=None)
            known = 1.0 if nearest is None else self._scale[nearest]
        return known * self._guessed(depth, sample)

    def _guessed(self, depth: int, sample: StepSample) -> float:
        rows = sample.num_decoding
        depth = min(depth, rows)
        if self._prior is not None:
            return self._prior(depth, rows, sample.num_tokens / sample.num_rows)
        slice_s = self._times.slice_s(rows / depth)
        attention_s = self._times.attention_s(sample.num_tokens / sample.num_rows * rows / depth)
        if self._shares_cores:
            busy = depth * (slice_s / self._num_replicas + attention_s)
            return rows / max(busy, slice_s + attention_s)
        return rows / round_s(depth, self._num_replicas, slice_s, attention_s)

    def _conclude(self, rate: float, sample: StepSample) -> None:
        """A window was measured."""
        guessed = self._guessed(self.depth, sample)
        measured = rate / guessed
        known = self._scale.get(self.depth, measured)
        self._scale[self.depth] = known + 0.5 * (measured - known)
        if self._trial is not None:
            if rate > _BETTER * self._baseline:
                self._patience = _TRIAL_STEPS[0]
                self._next_trial = self._num_steps + self._patience
                self._switch(self._trial, None)
            else:
                self._switch(self._depth, None)
            return
        self._baseline = rate
        self._window = _Window(skip=0)
        if self._num_steps >= self._next_trial:
            self._start_trial(sample)

    def _start_trial(self, sample: StepSample) -> None:
        candidates = self._candidates(sample)
        neighbours = [n for n in (self._depth - 1, self._depth + 1) if n in candidates]
        self._next_trial = self._num_steps + self._patience
        self._patience = min(2 * self._patience, _TRIAL_STEPS[1])
        if not neighbours:
            return
        # In turn where there are two.
        others = [n for n in neighbours if n != self._last_trial]
        self._last_trial = self._best(others or neighbours, sample)
        self._switch(self._depth, self._last_trial)

    def _switch(self, depth: int, trial: int | None) -> None:
        before = self.depth
        self._depth, self._trial = depth, trial
        # The steps in flight, and those that fill the new pipeline, belong to neither.
        self._window = _Window(skip=2 * max(before, self.depth) if before != self.depth else 0)


class _Window:
    """Tokens per second of some steps in a row without prompts."""

    def __init__(self, skip: int) -> None:
        self._skip = self._left = skip
        self._num_broken = 0
        self._start_s: float | None = None
        self._num_steps = 0
        self._num_tokens = 0

    @property
    def is_hopeless(self) -> bool:
        """Prompts come too often for a measurement."""
        return self._num_broken > 2 * _WINDOW_STEPS

    def observe(self, sample: StepSample, num_steps: int) -> float:
        """Tokens per second once `num_steps` were seen, else 0."""
        if sample.num_prompt_rows:
            self._num_broken += 1
            self._left, self._start_s = self._skip, None
            return 0.0
        if self._left > 0:
            self._left -= 1
            return 0.0
        if self._start_s is None:
            self._start_s, self._num_steps, self._num_tokens = sample.now_s, 0, 0
            return 0.0
        self._num_steps += 1
        self._num_tokens += sample.num_rows
        elapsed = sample.now_s - self._start_s
        return self._num_tokens / elapsed if self._num_steps >= num_steps and elapsed > 0 else 0.0


class _StepTimes:
    """Seconds of a slice by rows, and of an attention op by cached tokens."""

    def __init__(self) -> None:
        self.num_observed = 0
        # Decaying means: rows, seconds, rows * rows, rows * seconds.
        self._x = self._y = self._xx = self._xy = 0.0
        self._tokens = self._attention_s = 0.0

    def observe(self, sample: StepSample) -> None:
        alpha = max(_ALPHA, 1 / (self.num_observed + 1))
        self.num_observed += 1
        x, y = sample.num_rows, sample.slice_s
        self._x += alpha * (x - self._x)
        self._y += alpha * (y - self._y)
        self._xx += alpha * (x * x - self._xx)
        self._xy += alpha * (x * y - self._xy)
        self._tokens += alpha * (sample.num_tokens - self._tokens)
        self._attention_s += alpha * (sample.attention_s - self._attention_s)

    def slice_s(self, num_rows: float) -> float:
        """a + b rows, fitted; while all steps are alike, half of the time is taken to be a."""
        prior = self._y / (2 * self._x)
        spread = max(0.0, self._xx - self._x * self._x)
        ridge = 0.01 * self._x * self._x
        covariance = self._xy - self._x * self._y
        slope = (covariance + ridge * prior) / (spread + ridge)
        slope = min(max(slope, 0.0), self._y / self._x)
        return max(0.0, self._y + slope * (num_rows - self._x))

    def attention_s(self, num_tokens: float) -> float:
        """In proportion to the cached tokens."""
        return self._attention_s * num_tokens / max(self._tokens, 1.0)
