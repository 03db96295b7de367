"""Decode speed of one shape over batch and context, deployments side by side.

All subjects live at the same time and take turns of a few steps each, so that a slow minute of the
machine hits all of them; ratios are taken turn by turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch

from lamina.config import AttentionWorkerConfig, EngineConfig
from lamina.engine.start import StartedEngine, start_engine
from lamina.types import EngineRequest, SamplingParams

_PREFILL_ROWS = 512


class Subject(Protocol):
    """Something that decodes."""

    name: str

    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        """Compute the prompts, forgetting earlier ones; returns seconds."""

    def decode(self, num_steps: int) -> float:
        """Generate `num_steps` tokens for every prompt, greedily; returns seconds."""

    def close(self) -> None:
        """Stop processes and free memory."""


class LaminaSubject:
    """An engine in this process, its remote workers in their own."""

    def __init__(self, name: str, config: EngineConfig) -> None:
        self.name = name
        self._started: StartedEngine = start_engine(config)
        self._round = 0
        self._names: list[str] = []

    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        engine = self._started.engine
        for name in self._names:
            engine.abort(name)
        self._round += 1
        self._names = [f"{self._round}-{index}" for index in range(len(prompts))]
        sampling = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        start = time.perf_counter()
        for name, prompt in zip(self._names, prompts, strict=True):
            engine.add(
                EngineRequest(
                    request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling, seed=0
                )
            )
        waiting = set(self._names)
        while waiting:
            waiting -= {output.request_id for output in engine.step() if output.token_ids}
        return time.perf_counter() - start

    def decode(self, num_steps: int) -> float:
        engine = self._started.engine
        start = time.perf_counter()
        for _ in range(num_steps):
            outputs = engine.step()
            assert len(outputs) == len(self._names), "every sequence must yield one token per step"
        return time.perf_counter() - start

    def close(self) -> None:
        self._started.close()


class TransformersSubject:
    """transformers with SDPA and its own dynamic cache."""

    name = "transformers"

    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
        self._model: Any = model.to_empty(device="cpu").eval()
        self._model.init_weights()
        self._cache: Any = None
        self._last = torch.empty(0)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        from transformers import DynamicCache

        start = time.perf_counter()
        ids = torch.tensor(prompts)
        self._cache = DynamicCache()
        step = max(1, _PREFILL_ROWS // len(prompts))
        for part in torch.split(ids, step, 1):
            logits = self._model(part, past_key_values=self._cache, logits_to_keep=1).logits
        self._last = logits[:, -1:].argmax(-1)
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, num_steps: int) -> float:
        start = time.perf_counter()
        for _ in range(num_steps):
            logits = self._model(self._last, past_key_values=self._cache).logits
            self._last = logits[:, -1:].argmax(-1)
        return time.perf_counter() - start

    def close(self) -> None:
        self._model = self._cache = None


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One subject at one batch and context."""

    subject: str
    batch: int
    context: int
    tokens_per_s: float
    """Median over the turns."""
    tokens_per_s_low: float
    tokens_per_s_high: float
    step_ms: float
    ratio: float
    """Median of the ratio to the last subject, turn by turn."""
    prefill_tokens_per_s: float


def measure(
    subjects: Sequence[Subject],
    *,
    batch: int,
    context: int,
    turns: int,
    steps_per_turn: int,
    vocab_size: int,
) -> list[Figure]:
    """Prefill every subject, then let them decode in turns. The last subject is the baseline."""
    generator = torch.Generator().manual_seed(batch * 1_000_003 + context)
    prompts = torch.randint(vocab_size, (batch, context), generator=generator).tolist()
    prefill_s = [subject.prefill(prompts) for subject in subjects]
    for subject in subjects:
        subject.decode(1)
    seconds: list[list[float]] = [[] for _ in subjects]
    for _ in range(turns):
        for subject, values in zip(subjects, seconds, strict=True):
            values.append(subject.decode(steps_per_turn))
    tokens = batch * steps_per_turn
    figures = []
    for subject, values, prompt_s in zip(subjects, seconds, prefill_s, strict=True):
        speeds = [tokens / value for value in values]
        ratios = [base / value for base, value in zip(seconds[-1], values, strict=True)]
        figures.append(
            Figure(
                subject=subject.name,
                batch=batch,
                context=context,
                tokens_per_s=statistics.median(speeds),
                tokens_per_s_low=min(speeds),
                tokens_per_s_high=max(speeds),
                step_ms=1e3 * statistics.median(values) / steps_per_turn,
                ratio=statistics.median(ratios),
                prefill_tokens_per_s=batch * context / prompt_s,
            )
        )
    return figures


def lamina_config(folder: Path, *, num_workers: int, batch: int, length: int) -> EngineConfig:
    """The engine of one deployment; 0 workers is the monolithic one."""
    return EngineConfig(
        model=str(folder),
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=length,
        max_num_seqs=batch,
        max_num_batched_tokens=max(_PREFILL_ROWS, batch),
        attention="remote" if num_workers else "local",
        attention_workers=tuple(AttentionWorkerConfig() for _ in range(num_workers)),
    )
