"""How long a step of the pipeline takes, from what is in it.

A micro-batch goes through its layers one by one: slice, hop to attention, attention, hop back.
Others use the same devices meanwhile. From one slice of a micro-batch to its next (a *round*) the
longest of these passes (`sched.pipeline.round_s`, here for micro-batches that differ, and with the
links counted):

- the micro-batch's own way: its slice, then both hops and its attention;
- the slices of all micro-batches, shared out over the replicas;
- the attention of all micro-batches on the busiest attention worker;
- the messages of all micro-batches on the model workers' link;
- where a profile says what model and attention do to each other on one machine (`SideBySide`), the
  slices and the attention of all micro-batches, slowed down while both run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from lamina.plan.cost import AttentionCost, Devices, Efficiency, SliceCost, link_bytes_per_s
from lamina.plan.model import ModelCost
from lamina.plan.profile import Profile, SideBySide
from lamina.types import LOCAL


@dataclass(slots=True)
class StepLoad:
    """What is in a step. Rows and tokens of a share count as the share's part of all heads."""

    rows: int = 0
    """Through the slices."""
    logit_rows: int = 0
    attending: dict[int, float] = field(default_factory=dict)
    """Decode rows by executor."""
    attended: dict[int, float] = field(default_factory=dict)
    """Tokens that those rows attend to, by executor."""
    prompts: list[tuple[int, int]] = field(default_factory=list)
    """Chunks of prompts: rows, tokens of the sequence before them. They attend locally."""
    stored: dict[int, float] = field(default_factory=dict)
    """Rows of prompts whose k and v go to a remote executor."""


class StepTimes(NamedTuple):
    """Seconds per layer of a step alone."""

    model_s: float
    """That the replica is occupied: slices and local attention."""
    own_s: float
    """From one slice to the next if the micro-batch never waits for others."""
    attention_s: Mapping[int, float]
    """That each remote executor is occupied."""
    link_s: float
    """That the link between model and attention workers is occupied in its busier direction."""
    model_slowdown: float = 1.0
    """How many times longer the model worker takes while attention runs."""
    attention_slowdown: float = 1.0
    """How many times longer attention takes while the model worker computes."""


class Work(NamedTuple):
    """FLOPs and bytes of memory that devices move in a step."""

    flops: float
    num_bytes: float


def together_s(
    first_s: float, second_s: float, first_slowdown: float, second_slowdown: float
) -> float:
    """Two pieces of work that start together, each slowed down while the other runs.

    Args:
        first_s: of the first one alone.
        first_slowdown: how many times longer it takes beside the second.
    """
    first, second = first_s * first_slowdown, second_s * second_slowdown
    if first > second:
        return second + first_s - second / first_slowdown
    return first + second_s - first / second_slowdown


def round_s(step: StepTimes, others: Iterable[StepTimes], num_replicas: int) -> float:
    """From one slice of `step` to its next while the steps `others` are in flight as well."""
    model_s, link_s = step.model_s, step.link_s
    slowed_s = model_s * step.model_slowdown
    slowed_attention = step.attention_slowdown
    attention_s = dict(step.attention_s)
    num_steps = 1
    for other in others:
        num_steps += 1
        model_s += other.model_s
        link_s += other.link_s
        slowed_s += other.model_s * other.model_slowdown
        slowed_attention += other.attention_slowdown
        for executor, seconds in other.attention_s.items():
            attention_s[executor] = attention_s.get(executor, 0.0) + seconds
    busiest = max(attention_s.values(), default=0.0)
    if num_steps > 1 and busiest:
        model_slowdown = slowed_s / model_s if model_s else 1.0
        both_s = together_s(
            model_s / num_replicas, busiest, model_slowdown, slowed_attention / num_steps
        )
        return max(step.own_s, both_s, link_s)
    return max(step.own_s, model_s / num_replicas, busiest, link_s)


class StepCost:
    """Times and work of steps on one replica and its executors."""

    def __init__(
        self,
        model: ModelCost,
        replica: Devices,
        executors: Mapping[int, Devices],
        *,
        dtype: str,
        efficiency: Efficiency,
        num_replicas: int = 1,
        early_q: bool = True,
        profile: Profile | None = None,
        transport: str | None = None,
        in_one_machine: bool = False,
    ) -> None:
        """
        Args:
            executors: the devices of each remote one.
            in_one_machine: they are reached between chips, not over the network.
            transport: whose measured hops of the profile to use; None: its first.
        """
        self.model = model
        self.num_layers = len(model.layers)
        num_slices = self.num_layers + 1
        # A step ends when its first replica's turn has come again.
        self._rounds = self.num_layers * (num_slices + -num_slices % num_replicas) / num_slices
        self.slices = SliceCost(
            model, replica, dtype=dtype, efficiency=efficiency, profile=profile
        )  # fmt: skip
        self.attention = {
            executor: AttentionCost(
                model, devices, dtype=dtype, efficiency=efficiency, profile=profile
            )
            for executor, devices in ((LOCAL, replica), *executors.items())
        }
        self._early_q = early_q
        e = model.bytes_per_element
        self._q_bytes = e * sum(x.query_heads * x.head_dim_k for x in model.layers)
        self._out_bytes = e * sum(x.query_heads * x.head_dim_v for x in model.layers)
        self._row_bytes = model.hop_bytes_per_row
        self._kv_bytes = self._row_bytes - self._q_bytes - self._out_bytes
        # Parts of a slice: what makes k and v, which comes after q was sent, and what needs no
        # attention output and comes after k and v were sent.
        active = sum(x.active_params_per_token for x in model.layers)
        deferred = sum(x.deferred_params_per_token for x in model.layers)
        kv = model.hidden_size * sum(x.kv_elements_per_token for x in model.layers)
        self._deferred_share = deferred / active
        self._kv_share = min(kv, active - deferred) / active
        self._beside = _side_by_side(profile, replica, executors)
        hop = profile.hop(transport) if profile is not None else None
        self._latency_s = efficiency.hop_latency_s if hop is None else hop.latency_s

        def rate(devices: Devices) -> float:
            if hop is not None:
                return hop.bandwidth_bytes_per_s
            return link_bytes_per_s(devices.device, efficiency, in_one_machine) * devices.count

        self._rates = {executor: rate(devices) for executor, devices in executors.items()}
        self._model_rate = rate(replica)
        self._step_overhead_s = 0.0 if profile is None else profile.step_overhead_s
        self._row_overhead_s = 0.0 if profile is None else profile.row_overhead_s

    def compute_knee(self) -> float:
        """The rows from which on the slices are compute-bound: half of those that take twice as
        long as one row, which takes as long as reading the weights."""
        limit_s = 2 * self.slices.seconds(1)
        low, high = 1, 2**20
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.slices.seconds(middle) < limit_s else (low, middle)
        return high / 2

    def objective_batch(self, tbt_s: float | None, context: float, most: float) -> float:
        """Sequences of that context that a step with local attention serves within `tbt_s` (None:
        no objective), at most `most`."""
        if tbt_s is None:
            return most
        low, high = 0, int(most) + 1
        while high - low > 1:
            middle = (low + high) // 2
            load = StepLoad(
                rows=middle,
                logit_rows=middle,
                attending={LOCAL: float(middle)},
                attended={LOCAL: middle * context},
            )
            within = self.step_s(self.times(load).own_s) <= tbt_s
            low, high = (middle, high) if within else (low, middle)
        return float(low)

    def step_s(self, round_s: float) -> float:
        """Seconds of a step whose rounds take `round_s`."""
        return self._rounds * round_s

    def times(self, load: StepLoad) -> StepTimes:
        layers = self.num_layers
        slice_s = self.slices.seconds(load.rows, load.logit_rows) / layers
        overhead = self._step_overhead_s + load.logit_rows * self._row_overhead_s
        local_s = self.local_attention_s(load) / layers
        model_s = slice_s + local_s + overhead / layers
        attention_s = {
            executor: self.attention[executor].seconds(rows, load.attended[executor]) / layers
            for executor, rows in load.attending.items()
            if executor != LOCAL and rows
        }
        if not attention_s and not load.stored:
            return StepTimes(model_s, model_s, attention_s, 0.0)
        if self._beside is not None:
            return self._times_beside(load, slice_s, local_s, overhead / layers, attention_s)
        q_s, kv_s, out_s, link_s = self._hops(load)
        busiest = max(attention_s.values(), default=0.0)
        after_kv = slice_s * self._deferred_share + local_s
        before_kv = slice_s * (1 - self._deferred_share)
        if self._early_q:
            after_q = slice_s * self._kv_share
            trip = max(q_s + busiest, after_q + kv_s) + out_s
            own_s = before_kv - after_q + max(trip, after_q + after_kv)
        else:
            trip = q_s + kv_s - self._latency_s + busiest + out_s
            own_s = before_kv + max(trip, after_kv)
        if not attention_s:  # nothing comes back, nobody waits
            own_s = model_s
        return StepTimes(model_s, max(model_s, own_s + overhead / layers), attention_s, link_s)

    def _times_beside(
        self,
        load: StepLoad,
        slice_s: float,
        local_s: float,
        overhead_s: float,
        attention_s: Mapping[int, float],
    ) -> StepTimes:
        """Where it was measured what model and attention workers do to each other."""
        beside, layers = self._beside, len(self.model.layers)
        assert beside is not None, "called where there is one"
        num_bytes = sum(self.hop_bytes(load, e) for e in self.attention if e != LOCAL) / layers
        slowdowns = beside.slices_slowdown.at(load.rows), beside.attention_slowdown.at(load.rows)
        busiest = max(attention_s.values(), default=0.0)
        model_s = slice_s + local_s + overhead_s + beside.hop_busy_s.at(num_bytes)
        after_q = slice_s * (self._deferred_share + (self._kv_share if self._early_q else 0.0))
        after_q += local_s
        own_s = slice_s + local_s - after_q + together_s(after_q, busiest, *slowdowns)
        own_s += overhead_s + beside.hop_s.at(num_bytes)
        return StepTimes(model_s, max(model_s, own_s), attention_s, 0.0, *slowdowns)

    def local_attention_s(self, load: StepLoad) -> float:
        attention = self.attention[LOCAL]
        return attention.seconds(
            load.attending.get(LOCAL, 0.0), load.attended.get(LOCAL, 0.0)
        ) + sum(attention.prompt_seconds(rows, before) for rows, before in load.prompts)

    def _hops(self, load: StepLoad) -> tuple[float, float, float, float]:
        """Seconds per layer of the messages with q, with k and v, and with outputs; and how long
        they occupy the link of the replica."""
        layers = self.num_layers
        attending = {x: rows for x, rows in load.attending.items() if x != LOCAL}
        appended = dict(attending)
        for executor, rows in load.stored.items():
            appended[executor] = appended.get(executor, 0.0) + rows

        def transfer(rows: Mapping[int, float], bytes_per_row: float) -> tuple[float, float]:
            size = bytes_per_row / layers
            model_s = sum(rows.values()) * size / self._model_rate
            worker_s = max((n * size / self._rates[x] for x, n in rows.items()), default=0.0)
            return self._latency_s + max(model_s, worker_s), max(model_s, worker_s)

        q_s, q_link = transfer(attending, self._q_bytes)
        kv_s, kv_link = transfer(appended, self._kv_bytes)
        out_s, out_link = transfer(attending, self._out_bytes)
        return q_s, kv_s, out_s, max(q_link + kv_link, out_link)

    def hop_bytes(self, load: StepLoad, executor: int) -> float:
        """Bytes between the replica and an attention worker, both directions."""
        rows = load.attending.get(executor, 0.0)
        stored = load.stored.get(executor, 0.0)
        return rows * self._row_bytes + stored * self._kv_bytes

    def model_work(self, load: StepLoad) -> Work:
        """Of the replica: slices and local attention."""
        local = self.attention_work(load, LOCAL)
        flops, num_bytes = self.slices.work(load.rows, load.logit_rows)
        flops += local.flops
        num_bytes += local.num_bytes
        for rows, before in load.prompts:
            prompt_flops, prompt_bytes = self.attention[LOCAL].prompt_work(rows, before)
            flops += prompt_flops
            num_bytes += prompt_bytes
        return Work(flops, num_bytes)

    def attention_work(self, load: StepLoad, executor: int) -> Work:
        """Of the decode rows on one executor."""
        rows, tokens = load.attending.get(executor, 0.0), load.attended.get(executor, 0.0)
        return Work(*self.attention[executor].work(rows, tokens))


def _side_by_side(
    profile: Profile | None, replica: Devices, executors: Mapping[int, Devices]
) -> SideBySide | None:
    """What was measured of this model worker beside these attention workers, if they are alike."""
    names = {devices.device.name for devices in executors.values()}
    if profile is None or len(names) != 1:
        return None
    workers = sum(devices.count for devices in executors.values())
    return profile.beside(replica.device.name, replica.count, names.pop(), workers)
