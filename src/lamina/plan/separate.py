"""Steady state of prefill-decode deployments."""

from __future__ import annotations

from lamina.plan.build import Builder
from lamina.plan.colocated import Breakdown, Point, prompt_chunks
from lamina.plan.cost import link_bytes_per_s
from lamina.plan.demand import Demand
from lamina.plan.deployment import PrefillDecode
from lamina.plan.offloading import OWN, OffloadPlacer
from lamina.plan.step import StepLoad
from lamina.types import LOCAL


class Separate:
    """Prefill instances and a decode instance, by its decode rows."""

    def __init__(self, builder: Builder, deployment: PrefillDecode, demand: Demand) -> None:
        """
        Raises:
            CapacityError: the weights do not fit on one side, or no executor fits beside a prefill
                instance.
        """
        settings = builder.settings
        decode = builder.decode(deployment)
        prefill = builder.prefill(deployment, lambda *_: None)
        batcher = decode.instance.batcher
        budget, placer = batcher.budget, batcher.placer
        assert isinstance(placer, OffloadPlacer), "decode instances place by the policy"
        self._demand = demand
        self._model = builder.model
        self._cost = decode.instance.cost
        self._num_prefill = deployment.num_prefill_instances
        self._executors = [e for e in budget.capacity_pages if e not in (LOCAL, OWN)]
        self.most_tokens = min(
            batcher.max_model_len - 1, prefill.instance.batcher.max_model_len - 1
        )
        held = demand.context + budget.page_tokens / 2
        page = budget.page_tokens
        self._most_own = budget.capacity_pages[OWN] * page / held
        self._most_offloaded = sum(budget.capacity_pages[e] * page / held for e in self._executors)
        self._ratio = placer.bounds.ratio if self._executors else 0.0
        offloaded = min(self._ratio * self._most_own, self._most_offloaded)
        self.most_batch = int(min(self._most_own + offloaded, settings.max_num_seqs))
        """Decode rows; 0: there is no room."""
        cost = prefill.instance.cost
        full = settings.max_num_batched_tokens
        chunks = demand.chunks(full)
        rows = max(1, min(full, round(demand.prompt_tokens / chunks)))

        def prefill_s(rows: int) -> float:
            load = StepLoad(rows=rows, logit_rows=max(1, round(rows / demand.prompt_tokens)))
            load.prompts = prompt_chunks(rows, demand.prompt_context)
            return cost.step_s(cost.times(load).own_s)

        num_bytes = self._model.kv_bytes(demand.prompt_tokens)
        e, near = settings.efficiency, deployment.in_one_machine
        rate = min(
            link_bytes_per_s(deployment.prefill.device, e, near) * deployment.prefill_ranks,
            link_bytes_per_s(deployment.decode.device, e, near) * deployment.decode.count,
        )
        self.link_bytes_per_s = rate
        """From each prefill instance to the decode instance."""
        last_s = num_bytes / rate / len(self._model.layers) + settings.efficiency.hop_latency_s
        self._ready_s = chunks * prefill_s(rows) + last_s
        """From a request's start to its KV on the decode instance."""
        self._kv_bytes = num_bytes
        computed = self._num_prefill * full / (demand.prompt_tokens * prefill_s(full))
        self.most_requests_per_s = min(computed, self._num_prefill * rate / num_bytes)
        """That prompts are computed and moved."""
        self._points: dict[int, Point] = {}

    def best_batch(self, most: int) -> int:
        """The least batch up to `most` with the most throughput: the prefill side may be the
        bound."""
        low, high = 0, most
        target = min(self.most_requests_per_s, self._decoded_per_s(most))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._decoded_per_s(middle) >= target else (middle, high)
        return high

    @property
    def may_offload(self) -> bool:
        """Whether there are executors beside the prefill instances."""
        return bool(self._executors)

    def offloaded(self, batch: int) -> float:
        """Sequences of a batch whose attention runs there."""
        return self._split(batch)[1]

    def needed_link(self, batch: int) -> float:
        """Bytes per second of each prefill instance's link: KV, and what offloaded rows send."""
        point = self.point(batch)
        kv = point.requests_per_s * self._kv_bytes
        offloaded = self.offloaded(batch)
        hops = offloaded * self._model.hop_bytes_per_row / point.tbt_s
        return (kv + hops) / self._num_prefill

    def point(self, batch: int) -> Point:
        point = self._points.get(batch)
        if point is None:
            point = self._points[batch] = self._point(batch)
        return point

    def _point(self, batch: int) -> Point:
        cost = self._cost
        load = self._load(batch)
        times = cost.times(load)
        step_s = cost.step_s(times.own_s)
        slices_s, local_s = cost.slices.seconds(batch), cost.local_attention_s(load)
        rest_s = max(0.0, step_s - slices_s - local_s)
        remote_s = max(times.attention_s.values(), default=0.0) * cost.num_layers
        attention_s = min(rest_s, max(0.0, remote_s - local_s))
        return Point(
            requests_per_s=min(
                batch / (self._demand.output_tokens * step_s), self.most_requests_per_s
            ),
            batch=float(batch),
            ttft_s=self._ready_s + 1.5 * step_s,
            tbt_s=step_s,
            breakdown=Breakdown(
                slices_s=slices_s,
                attention_s=local_s + attention_s,
                hops_s=rest_s - attention_s,
                waiting_s=0.0,
                prompts_s=0.0,
            ),
        )

    def _decoded_per_s(self, batch: int) -> float:
        """Requests that the decode instance could serve."""
        return batch / (self._demand.output_tokens * self.point(batch).tbt_s)

    def _split(self, batch: int) -> tuple[float, float]:
        """Local and offloaded sequences."""
        offloaded = min(batch * self._ratio / (1 + self._ratio), self._most_offloaded)
        if self._ratio == float("inf"):
            offloaded = min(float(batch), self._most_offloaded)
        offloaded = max(offloaded, batch - self._most_own)
        return batch - offloaded, offloaded

    def _load(self, batch: int) -> StepLoad:
        local, offloaded = self._split(batch)
        context = self._demand.context
        load = StepLoad(rows=batch, logit_rows=batch)
        load.attending[LOCAL], load.attended[LOCAL] = local, local * context
        for executor in self._executors if offloaded else ():
            rows = offloaded / len(self._executors)
            load.attending[executor], load.attended[executor] = rows, rows * context
        return load
