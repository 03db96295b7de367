"""What a profile says to an engine before it has seen a step of its own.

How deep its pipeline should be, and how fast its attention workers are.
"""

from __future__ import annotations

from collections.abc import Mapping

from lamina.errors import ConfigError
from lamina.plan.cost import Devices, Efficiency
from lamina.plan.model import ModelCost
from lamina.plan.names import find_by_name
from lamina.plan.profile import Profile
from lamina.plan.step import StepCost, StepLoad, round_s
from lamina.types import LOCAL

_CONTEXT = 1024
"""Tokens of a sequence that workers are compared with."""


class Priors:
    """A deployment as its profile sees it."""

    def __init__(
        self,
        profile: Profile,
        model: ModelCost,
        *,
        model_device: str,
        num_ranks: int,
        num_replicas: int,
        workers: Mapping[int, str],
        early_q: bool,
    ) -> None:
        """
        Args:
            profile: of the model (`plan.scaling`).
            model_device: of each model worker.
            num_ranks: tensor-parallel ones of each replica.
            workers: the device of each remote executor.

        Raises:
            ConfigError: one of the devices was not measured.
        """
        self._num_replicas = num_replicas
        measured = profile.with_devices({})

        def devices(name: str, count: int) -> Devices:
            found = find_by_name(
                name, measured, "device of the profile",
                "Write one for these threads with lamina calibrate --cores.",
            )  # fmt: skip
            return Devices(device=found, count=count)

        for name in workers.values():
            if profile.attention_on(name) is None:
                raise ConfigError(
                    f"the profile has no attention on {name}; measured are "
                    f"{', '.join(entry.device for entry in profile.attention)}"
                )
        self.bytes_per_s: dict[int, float] = {}
        """KV that each remote executor reads while it computes."""
        for executor, name in workers.items():
            attention = profile.attention_on(name)
            assert attention is not None, "checked above"
            seconds = attention.decode.at(1, _CONTEXT)
            self.bytes_per_s[executor] = model.attention_bytes(_CONTEXT) / seconds
        kinds = set(workers.values())
        executors = {e: devices(name, 1) for e, name in workers.items()}
        total = sum(self.bytes_per_s.values())
        self._shares = {e: speed / total for e, speed in self.bytes_per_s.items()} or {LOCAL: 1.0}
        if len(kinds) == 1:  # alike, so they work as one
            executors = {1: devices(kinds.pop(), len(workers))}
            self._shares = {1: 1.0}
        self._cost = StepCost(
            model,
            devices(model_device, num_ranks),
            executors,
            dtype="bf16",
            efficiency=Efficiency(),
            num_replicas=num_replicas,
            early_q=early_q,
            profile=profile,
        )

    def tokens_per_s(self, depth: int, num_rows: int, context: float) -> float:
        """Of all micro-batches, with as many rows each (`sched.depth.Prior`)."""
        rows = num_rows / depth
        load = StepLoad(rows=max(1, round(rows)), logit_rows=max(1, round(rows)))
        for executor, share in self._shares.items():
            load.attending[executor] = rows * share
            load.attended[executor] = rows * share * context
        times = self._cost.times(load)
        seconds = self._cost.step_s(round_s(times, [times] * (depth - 1), self._num_replicas))
        return num_rows / seconds
