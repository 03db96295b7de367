"""What decode benchmarks compare, each subject in a process of its own, all alive together."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import msgspec
import torch

from lamina.config import THREAD_ENVIRONMENT, EngineConfig
from lamina.engine.events import StepRecord
from lamina.engine.start import StartedEngine, start_engine
from lamina.errors import CapacityError, EngineDead
from lamina.types import EngineRequest, SamplingParams
from lamina.workers.process import limit_threads

PREFILL_ROWS = 512
"""Rows of one prefill step, for every subject."""


class Stretch(NamedTuple):
    """A stretch of time that was measured, and the steps that ran in it."""

    begin_s: float
    end_s: float
    num_tokens: int
    records: list[StepRecord]
    """In the order in which they ended; some began before the stretch, or ended after it."""


class WorkerShares(msgspec.Struct, frozen=True):
    """The attention workers' shares of new work."""

    num_steps: int
    """Steps of the engine so far."""
    shares: list[float]
    """Per worker, together 1."""


UNCOUNTED_STEPS = 1
"""Steps at the start of each `LaminaSubject.decode` that are not counted."""


class Subject(Protocol):
    """Something that decodes."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        """Compute the prompts, forgetting earlier ones; returns seconds."""

    def decode(self, num_steps: int) -> list[float]:
        """Generate `num_steps` tokens for every prompt, greedily; returns seconds per step."""

    def phases(self) -> dict[str, float]:
        """Seconds that phases of decoding took since the start; empty if it does not know."""

    def stretches(self) -> list[Stretch]:
        """The timelines of all calls of `decode` since the last `prefill`; empty without one."""

    def close(self) -> None:
        """Stop processes and free memory."""


class LaminaSubject:
    """An engine in this process, its remote workers in their own."""

    def __init__(self, config: EngineConfig) -> None:
        self._started: StartedEngine = start_engine(config)
        self._num_prompts = 0
        self._names: list[str] = []
        self._stretch: Stretch | None = None
        self._stretches: list[Stretch] = []
        self._records: dict[int, StepRecord] = {}

    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        self._stretch, self._stretches = None, []
        return self.replace(len(self._names), prompts)

    def replace(self, num_ended: int, prompts: Sequence[Sequence[int]]) -> float:
        """End the oldest sequences and compute new prompts in their place; returns seconds."""
        engine = self._started.engine
        for name in self._names[:num_ended]:
            engine.abort(name)
        new = [f"{self._num_prompts + index}" for index in range(len(prompts))]
        self._num_prompts += len(prompts)
        self._names = [*self._names[num_ended:], *new]
        sampling = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        start = time.perf_counter()
        for name, prompt in zip(new, prompts, strict=True):
            engine.add(
                EngineRequest(
                    request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling, seed=0
                )
            )
        waiting = set(new)
        while waiting:
            waiting -= {output.request_id for output in engine.step() if output.token_ids}
        return time.perf_counter() - start

    def weights(self) -> WorkerShares:
        """How new work is divided among the attention workers now."""
        stats = self._started.engine.stats()
        weights = [e.weight for e in stats.executors if e.weight is not None]
        return WorkerShares(stats.steps_total, [weight / sum(weights) for weight in weights])

    def decode(self, num_steps: int) -> list[float]:
        """A step is over when every sequence has one token more, however many are in flight.

        The first is not counted: what was in flight since the last call has had time enough.
        """
        counts = dict.fromkeys(self._names, 0)
        for _ in range(UNCOUNTED_STEPS):
            self._advance(counts)
        self._end_stretch()
        ends = [time.monotonic()]
        for _ in range(num_steps):
            self._advance(counts)
            ends.append(time.monotonic())
        self._stretch = Stretch(ends[0], ends[-1], num_steps * len(self._names), [])
        return [after - before for before, after in pairwise(ends)]

    def _advance(self, counts: dict[str, int]) -> None:
        """Run steps until every sequence has one token more than the last one has now."""
        engine = self._started.engine
        goal = min(counts.values()) + 1
        while min(counts.values()) < goal:
            for output in engine.step():
                if output.request_id in counts and output.finish_reason is not None:
                    raise CapacityError(
                        "a sequence reached the deployment's length while it was measured; "
                        "take fewer or shorter prompts, turns or steps"
                    )
                if output.request_id in counts:  # it may have been ended with its step in flight
                    counts[output.request_id] += len(output.token_ids)
        for record in engine.timeline.records:
            self._records[record.step] = record

    def _end_stretch(self) -> None:
        """The steps that were in flight at the end of the last stretch are through."""
        if (stretch := self._stretch) is not None:
            stretch.records.extend(
                record for record in self._records.values() if record.end_s > stretch.begin_s
            )
            self._stretches.append(stretch)
            self._stretch = None
        self._records.clear()

    def phases(self) -> dict[str, float]:
        return self._started.engine.stats().seconds

    def stretches(self) -> list[Stretch]:
        self._advance(dict.fromkeys(self._names, 0))
        self._end_stretch()
        return self._stretches

    def close(self) -> None:
        self._started.close()


class TransformersSubject:
    """transformers with SDPA and its own dynamic cache, random bfloat16 weights."""

    def __init__(self, folder: str, num_threads: int) -> None:
        import transformers

        limit_threads(num_threads)
        config = transformers.AutoConfig.from_pretrained(folder)
        model: Any = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self._model = model.eval()
        self._cache: Any = None
        self._last = torch.empty(0)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        from transformers import DynamicCache

        start = time.perf_counter()
        ids = torch.tensor(prompts)
        self._cache = DynamicCache()
        step = max(1, PREFILL_ROWS // len(prompts))
        for part in torch.split(ids, step, 1):
            logits = self._model(part, past_key_values=self._cache, logits_to_keep=1).logits
        self._last = logits[:, -1:].argmax(-1)
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, num_steps: int) -> list[float]:
        def step() -> None:
            logits = self._model(self._last, past_key_values=self._cache).logits
            self._last = logits[:, -1:].argmax(-1)

        return [_seconds(step) for _ in range(num_steps)]

    def phases(self) -> dict[str, float]:
        return {}

    def stretches(self) -> list[Stretch]:
        return []

    def close(self) -> None:
        self._model = self._cache = None


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class SubjectProcess:
    """A subject in a process of its own, with its own threads and environment."""

    def __init__(
        self,
        name: str,
        make: Callable[..., Subject],
        arguments: tuple[Any, ...],
        environment: Mapping[str, str],
    ) -> None:
        """Blocks until the subject is ready. EngineDead says why it is not."""
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        self._receive()

    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        seconds: float = self._call("prefill", prompts)
        return seconds

    def decode(self, num_steps: int) -> list[float]:
        seconds: list[float] = self._call("decode", num_steps)
        return seconds

    def replace(self, num_ended: int, prompts: Sequence[Sequence[int]]) -> float:
        seconds: float = self._call("replace", num_ended, prompts)
        return seconds

    def weights(self) -> WorkerShares:
        weights: WorkerShares = self._call("weights")
        return weights

    def phases(self) -> dict[str, float]:
        seconds: dict[str, float] = self._call("phases")
        return seconds

    def stretches(self) -> list[Stretch]:
        stretches: list[Stretch] = self._call("stretches")
        return stretches

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _call(self, method: str, *arguments: object) -> Any:
        self._pipe.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise EngineDead(f"{self.name} ended; its error stands above") from None


def _serve(pipe: Connection, make: Callable[..., Subject], arguments: tuple[Any, ...]) -> None:
    subject = make(*arguments)
    try:
        pipe.send(None)
        while True:
            method, arguments = pipe.recv()
            pipe.send(getattr(subject, method)(*arguments))
    except EOFError:
        return
    finally:
        subject.close()


def lamina_subject(name: str, config: EngineConfig) -> SubjectProcess:
    """One of our deployments, with the environment that the engine's processes have."""
    return SubjectProcess(name, LaminaSubject, (config,), THREAD_ENVIRONMENT)


def transformers_subject(folder: str, num_threads: int) -> SubjectProcess:
    """transformers as it comes."""
    return SubjectProcess("transformers", TransformersSubject, (folder, num_threads), {})
