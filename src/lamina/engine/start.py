"""From a config to a running engine in this process."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lamina.config import EngineConfig
from lamina.convert import SlicedModel, convert
from lamina.engine.engine import Engine
from lamina.engine.priors import read_priors
from lamina.kv.pages import cache_dtype_name
from lamina.workers.deployment import Machine, resolve
from lamina.workers.fleet import ExecutorFleet
from lamina.workers.model import ModelWorker
from lamina.workers.pipeline import LocalPipeline
from lamina.workers.process import limit_threads, pinned_pool, start_fork_server


@dataclass(frozen=True, slots=True)
class StartedEngine:
    """An engine and the executors that it uses. Close it to end the worker processes."""

    engine: Engine
    fleet: ExecutorFleet

    def close(self) -> None:
        self.fleet.close()


def start_engine(
    config: EngineConfig, *, model: SlicedModel | None = None, progress: bool = False
) -> StartedEngine:
    """Load the model, start the attention executors, and put the engine over them.

    Args:
        model: an already converted model, used as it is, instead of loading `config.model`.
        progress: show a progress bar while weights load.

    Raises:
        LaminaError: anything that keeps the engine from starting; nothing is left running.
    """
    if config.attention == "remote":
        start_fork_server()  # imports torch meanwhile
    is_given = model is not None
    if model is None:
        model = convert(
            config.model,
            dtype=config.dtype,
            load_format=config.load_format,
            seed=config.seed,
            progress=progress,
        )
    deployment = resolve(
        config,
        model.attention_specs,
        cache_dtype_name(config.kv_cache_dtype, str(model.dtype).removeprefix("torch.")),
        model.max_model_len,
        this_machine(),
    )
    priors = read_priors(config, deployment)
    limit_threads(deployment.num_threads)
    pool = pinned_pool(deployment.num_threads, config.model_cores)
    if not is_given:
        model.optimize(pool, compile=config.compile)
    fleet = ExecutorFleet.start(config, model, deployment, pool)
    worker = ModelWorker(
        model,
        fleet.ends,
        num_micro_batches=deployment.max_depth,
        early_q=config.early_q,
        step_deadline_s=config.step_deadline_s,
    )
    pipeline = LocalPipeline(
        worker,
        fleet.plan_ends,
        num_micro_batches=deployment.max_depth,
        step_deadline_s=config.step_deadline_s,
    )
    return StartedEngine(Engine(config, model, deployment, fleet, pipeline, priors), fleet)


def this_machine() -> Machine:
    """Cores that this process may use, and physical memory."""
    return Machine(
        cores=tuple(sorted(os.sched_getaffinity(0))),
        ram_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
