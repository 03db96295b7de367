"""Reads what a profile says of the deployment that is about to start."""

from __future__ import annotations

from pathlib import Path

from lamina.config import EngineConfig
from lamina.plan.model import load_model
from lamina.plan.priors import Priors
from lamina.plan.profile import read_profile, thread_device
from lamina.plan.scaling import scaled
from lamina.workers.deployment import Deployment


def read_priors(config: EngineConfig, deployment: Deployment) -> Priors | None:
    """None without `config.profile`.

    Raises:
        ConfigError: the profile cannot be read, or knows nothing of these threads.
    """
    if config.profile is None:
        return None
    model = load_model(config.model)
    return Priors(
        scaled(read_profile(Path(config.profile)), model),
        model,
        model_device=thread_device(deployment.num_threads),
        num_ranks=deployment.tensor_parallel_size,
        num_replicas=deployment.num_replicas,
        workers={e: thread_device(n) for e, n in deployment.worker_num_threads.items()},
        early_q=config.early_q,
    )
