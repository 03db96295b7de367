"""What a workload asks for on average: what estimates need of it, without its order in time."""

from __future__ import annotations

import numpy

from lamina.errors import ConfigError
from lamina.plan.arrivals import Workload

_NUM_QUANTILES = 512


class Demand:
    """Means over the requests of a workload."""

    def __init__(self, workload: Workload) -> None:
        """
        Raises:
            ConfigError: every request generates one token, so that nothing is decoded.
        """
        summary = workload.summary()
        if summary.mean_output_tokens <= 1:
            raise ConfigError(
                f"workload {workload.name} generates one token per request: there is no decoding "
                "to plan for; give one with longer outputs"
            )
        self.name = workload.name
        self.num_requests = summary.num_requests
        self.rate = summary.rate
        """Requests per second; 0 if all come at once."""
        self.prompt_tokens = summary.mean_prompt_tokens
        self.output_tokens = summary.mean_output_tokens
        self.longest = summary.max_total_tokens
        self.context = summary.mean_decode_context
        """Of a decode row."""
        prompts = numpy.asarray([a.prompt_tokens for a in workload.arrivals], dtype=float)
        self.prompt_context = float((prompts * (prompts + 1) / 2).sum() / prompts.sum())
        """Tokens that a row of a prompt attends to."""
        if len(prompts) > _NUM_QUANTILES:
            prompts = numpy.quantile(prompts, (numpy.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES)
        self._prompts = prompts
        self._chunks: dict[int, float] = {}

    def chunks(self, most_rows: int) -> float:
        """Mean number of steps that a prompt takes in chunks of at most so many rows."""
        chunks = self._chunks.get(most_rows)
        if chunks is None:
            chunks = self._chunks[most_rows] = float(numpy.ceil(self._prompts / most_rows).mean())
        return chunks
