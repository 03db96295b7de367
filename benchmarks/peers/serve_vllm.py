"""vLLM as a subject. Runs in vLLM's own environment, see setup.sh."""

from __future__ import annotations

import time
from typing import Any

import vllm
from serving import serve
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine


class VllmSubject:
    """vLLM's engine, stepped in this process as its offline interface does it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """`settings`: folder, max_length (tokens), batch, and `options` for vLLM's EngineArgs."""
        arguments = {
            "model": settings["folder"],
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            # Rounded, so that what vLLM compiled for one set of rows serves another.
            "max_model_len": -(-settings["max_length"] // 2048) * 2048,
            "max_num_seqs": settings["batch"],
            "enable_prefix_caching": False,  # every prompt must be computed
            "disable_log_stats": True,
        }
        arguments.update(settings["options"])
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._max_length = int(settings["max_length"])
        self._round = 0
        self._lengths: dict[str, int] = {}

    def prefill(self, prompts: list[list[int]]) -> float:
        if self._lengths:
            self._engine.abort_request(list(self._lengths))
        while self._engine.has_unfinished_requests():  # a step may still be in flight
            self._engine.step()
        self._round += 1
        self._lengths = {f"{self._round}-{index}": 0 for index in range(len(prompts))}
        start = time.perf_counter()
        for name, prompt in zip(self._lengths, prompts, strict=True):
            sampling = SamplingParams(
                temperature=0.0,
                max_tokens=self._max_length - len(prompt),
                ignore_eos=True,
                detokenize=False,
            )
            self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        self._step_until(1)
        return time.perf_counter() - start

    def decode(self, num_steps: int) -> list[float]:
        """A step ends when all sequences together have another token each."""
        seconds = []
        for _ in range(num_steps):
            wanted = sum(self._lengths.values()) + len(self._lengths)
            start = time.perf_counter()
            while sum(self._lengths.values()) < wanted:
                self._step()
            seconds.append(time.perf_counter() - start)
        return seconds

    def close(self) -> None:
        """Nothing outlives the process."""

    def _step_until(self, length: int) -> None:
        while min(self._lengths.values()) < length:
            self._step()

    def _step(self) -> None:
        for output in self._engine.step():
            if output.finished:
                raise RuntimeError(f"sequence {output.request_id} ended early; raise max_length")
            self._lengths[output.request_id] = len(output.outputs[0].token_ids)


if __name__ == "__main__":
    serve(VllmSubject, vllm.__version__)
