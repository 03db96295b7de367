"""Prefill instances before a decode instance: prompts are computed there, their KV moves over.

A prompt goes to the instance with the fewest prompt tokens to compute. Its KV leaves layer by layer
while it is computed, over one link per prefill instance, in the order in which prompts are done;
the first token is sampled by the decode instance, as in vLLM's disaggregated prefilling.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import partial

from lamina.plan.arrivals import Arrival
from lamina.plan.build import Builder, Site
from lamina.plan.cost import link_bytes_per_s
from lamina.plan.deployment import PrefillDecode
from lamina.plan.instance import Instance, engine_request
from lamina.plan.recorder import Busy


class PrefillSide:
    """All prefill instances and the KV on its way."""

    def __init__(
        self, builder: Builder, deployment: PrefillDecode, requests: Sequence[Arrival]
    ) -> None:
        self._requests = requests
        self._model = builder.model
        prefill = deployment.prefill
        e = builder.settings.efficiency
        self._rate = min(
            link_bytes_per_s(prefill.device, e, deployment.in_one_machine)
            * deployment.prefill_ranks,
            link_bytes_per_s(deployment.decode.device, e, deployment.in_one_machine)
            * deployment.decode.count,
        )
        self._latency_s = builder.settings.efficiency.hop_latency_s
        self.sites: list[Site] = []
        for number in range(deployment.num_prefill_instances):
            computed = partial(self._computed, number)
            self.sites.append(builder.prefill(deployment, computed))
        self._prompt_tokens = [0] * len(self.sites)
        self._link_free_s = [0.0] * len(self.sites)
        self._on_its_way: list[tuple[float, int]] = []

    @property
    def next_s(self) -> float:
        """When the next prompt's KV has arrived; infinity if none is on its way."""
        return self._on_its_way[0][0] if self._on_its_way else math.inf

    def pop(self) -> int:
        """The request whose KV has arrived at `next_s`."""
        return heapq.heappop(self._on_its_way)[1]

    def arrive(self, index: int, now_s: float) -> Instance:
        """A request comes; returns the instance that has it."""
        number = min(range(len(self.sites)), key=lambda n: (self._prompt_tokens[n], n))
        prompt_tokens = self._requests[index].prompt_tokens
        self._prompt_tokens[number] += prompt_tokens
        instance = self.sites[number].instance
        instance.advance(now_s)
        instance.add(engine_request(index, prompt_tokens, 1))
        return instance

    def _computed(self, number: int, index: int, now_s: float) -> None:
        prompt_tokens = self._requests[index].prompt_tokens
        self._prompt_tokens[number] -= prompt_tokens
        num_bytes = self._model.kv_bytes(prompt_tokens)
        transfer_s = num_bytes / self._rate
        # All but the last layer had time to leave while the next ones were computed, as far as the
        # link was free and fast enough for it.
        last_s = now_s + transfer_s / len(self._model.layers)
        end_s = max(last_s, self._link_free_s[number] + transfer_s)
        self._link_free_s[number] = end_s
        busy: Busy = self.sites[number].instance.model_busy
        busy.network_bytes += num_bytes
        heapq.heappush(self._on_its_way, (end_s + self._latency_s, index))
