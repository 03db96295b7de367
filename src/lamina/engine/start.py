"""From a config to a running engine in this process."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lamina.config import EngineConfig
from lamina.convert import SlicedModel, convert, convert_structure
from lamina.engine.engine import Engine
from lamina.engine.priors import read_priors
from lamina.engine.trace import TraceWriter
from lamina.kv.pages import cache_dtype_name
from lamina.plan.priors import Priors
from lamina.workers.deployment import Deployment, Machine, resolve
from lamina.workers.fleet import ExecutorFleet, worker_name
from lamina.workers.model import ModelWorker
from lamina.workers.pipeline import LocalPipeline
from lamina.workers.process import limit_threads, pinned_pool, start_fork_server
from lamina.workers.ranks import ModelRanks, max_shares
from lamina.workers.remote_pipeline import RemotePipeline


@dataclass(frozen=True, slots=True)
class StartedEngine:
    """An engine and what it uses. Close it to end the processes and the trace."""

    engine: Engine
    fleet: ExecutorFleet
    trace: TraceWriter | None = None
    ranks: ModelRanks | None = None
    """None: the slices run in this process."""

    def close(self) -> None:
        try:
            self.fleet.close()
        finally:
            if self.ranks is not None:
                self.ranks.close()
            if self.trace is not None:
                self.trace.close()


def start_engine(
    config: EngineConfig, *, model: SlicedModel | None = None, progress: bool = False
) -> StartedEngine:
    """Load the model, start the attention executors, and put the engine over them.

    With several model ranks, each in a process of its own, this process has no weights.

    Args:
        model: an already converted model, used as it is, instead of loading `config.model`. Ranks
            load it all the same.
        progress: show a progress bar while weights load.

    Raises:
        LaminaError: anything that keeps the engine from starting; nothing is left running.
    """
    trace = TraceWriter(config.trace) if config.trace is not None else None
    has_ranks = config.model_replicas * config.tensor_parallel_size > 1
    if config.attention == "remote" or has_ranks:
        start_fork_server(for_models=has_ranks)  # imports torch meanwhile
    is_given = model is not None
    if model is None and has_ranks:
        model = convert_structure(config.model, dtype=config.dtype)
    elif model is None:
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
    if has_ranks:
        return _start_over_ranks(config, model, deployment, trace, priors)
    limit_threads(deployment.num_threads)
    pool = pinned_pool(deployment.num_threads, config.model_cores)
    if not is_given:
        model.optimize(pool, compile=config.compile)
    fleet = ExecutorFleet.start(config, model, deployment, pool=pool)
    worker = ModelWorker(
        model,
        fleet.ends,
        num_micro_batches=deployment.max_depth,
        early_q=config.early_q,
        defer=config.defer,
        step_deadline_s=config.step_deadline_s,
    )
    pipeline = LocalPipeline(
        worker,
        fleet.plan_ends,
        num_micro_batches=deployment.max_depth,
        step_deadline_s=config.step_deadline_s,
    )
    engine = Engine(config, model, deployment, fleet, pipeline, trace=trace, priors=priors)
    return StartedEngine(engine, fleet, trace)


def _start_over_ranks(
    config: EngineConfig,
    model: SlicedModel,
    deployment: Deployment,
    trace: TraceWriter | None,
    priors: Priors | None,
) -> StartedEngine:
    """Start hosts, ranks and attention workers, and the engine over them."""
    limit_threads(1)  # only sampling is left to do here
    ranks = ModelRanks(config, deployment)
    fleet = None
    try:
        names = {executor: worker_name(executor) for executor in deployment.remote}
        sinks = ranks.assign(model, names)
        ranks.connect_ranks()
        fleet = ExecutorFleet.start(config, model.with_sinks(sinks), deployment, ranks=ranks)
        ranks.connect()
        pipeline = RemotePipeline(
            ranks,
            model,
            fleet.plan_ends,
            num_micro_batches=deployment.max_depth,
            max_rows=config.max_num_batched_tokens,
            max_spans=config.max_num_seqs,
            max_shares=max_shares(config, deployment.units),
            step_deadline_s=config.step_deadline_s,
        )
        ranks.wait_until_ready()
        engine = Engine(config, model, deployment, fleet, pipeline, trace=trace, priors=priors)
        return StartedEngine(engine, fleet, trace, ranks)
    except BaseException:
        if fleet is not None:
            fleet.close()
        ranks.close()
        raise


def this_machine() -> Machine:
    """Cores that this process may use, and physical memory."""
    return Machine(
        cores=tuple(sorted(os.sched_getaffinity(0))),
        ram_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
