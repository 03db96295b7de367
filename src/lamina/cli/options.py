"""Engine options shared by the commands that start an engine."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from lamina.config import (
    EngineConfig,
    parse_attention_workers,
    parse_bytes,
    parse_cores,
    parse_count,
    parse_memory,
    parse_weights,
)
from lamina.demo import demo_model_path

_ENGINE = "Engine"
_ATTENTION = "Attention workers"
_DEFAULT = EngineConfig(model="")


def _option(kind: object, default: object, help_text: str, panel: str) -> tuple[Any, object]:
    return Annotated[kind, typer.Option(help=help_text, rich_help_panel=panel)], default


_OPTIONS: dict[str, tuple[Any, object]] = {
    "load_format": _option(
        Literal["auto", "dummy"], "auto", "dummy: random weights, for benchmarks.", _ENGINE
    ),
    "dtype": _option(
        Literal["auto", "float32", "bfloat16", "float16"],
        "auto", "Data type of weights, activations and cache; auto: the checkpoint's.", _ENGINE,
    ),
    "seed": _option(int, 0, "Seed of dummy weights.", _ENGINE),
    "max_model_len": _option(
        int | None, None, "Most tokens of prompt and output together.", _ENGINE
    ),
    "max_num_seqs": _option(
        int, _DEFAULT.max_num_seqs, "Most sequences that run at once.", _ENGINE
    ),
    "max_num_batched_tokens": _option(
        int, _DEFAULT.max_num_batched_tokens, "Most tokens in one step.", _ENGINE
    ),
    "max_num_waiting": _option(
        int, _DEFAULT.max_num_waiting, "Most waiting requests; more are refused.", _ENGINE
    ),
    "block_size": _option(int, _DEFAULT.block_size, "Tokens per KV page.", _ENGINE),
    "num_threads": _option(int | None, None, "Threads of each model worker.", _ENGINE),
    "model_cores": _option(
        str | None, None, "Cores of the model workers, such as 0-3; default: any.", _ENGINE
    ),
    "pipeline_depth": _option(
        str, "auto", "Micro-batches in flight; auto: chosen from measured times.", _ENGINE
    ),
    "profile": _option(
        str | None, None,
        "File from lamina calibrate, for the first choice of pipeline depth and weights.", _ENGINE,
    ),
    "model_replicas": _option(
        int, 1, "Copies of the model that micro-batches rotate over.", _ENGINE
    ),
    "tensor_parallel_size": _option(
        int, 1, "Processes that each replica's heads and weights are divided among.", _ENGINE
    ),
    "compile": _option(
        bool, False, "Compile the slices with Inductor; takes a while at start-up.", _ENGINE
    ),
    "trace": _option(
        str | None, None,
        "Write a timeline of all steps to this file, some 35 kB each; Perfetto opens it.", _ENGINE,
    ),
    "attention": _option(
        Literal["local", "remote"], "remote",
        "local: monolithic, attention in the model worker's own process.", _ATTENTION,
    ),
    "attention_workers": _option(
        str, "1", "How many, or device, KV memory and threads of each: cpu:8GiB:4,cpu:4GiB.",
        _ATTENTION,
    ),
    "attention_partition": _option(
        Literal["auto", "heads", "requests", "tokens"], "auto",
        "What the workers share; auto: heads where there are enough, else requests; tokens for "
        "sequences that are too long for that.", _ATTENTION,
    ),
    "attention_weights": _option(
        str | None, None,
        "Shares of the workers as ratios, such as 2,1; default: as fast as each turns out.",
        _ATTENTION,
    ),
    "kv_cache_dtype": _option(
        Literal["auto", "int8"], "auto",
        "auto: the model's; int8: about half the bytes of bfloat16.", _ATTENTION,
    ),
    "transport": _option(
        Literal["auto", "shm", "tcp"], "auto",
        "To the attention workers; auto: shm for those of this machine.", _ATTENTION,
    ),
    "busy_poll_s": _option(
        float, _DEFAULT.busy_poll_s,
        "How long a wait for a message yields its core before it sleeps.", _ATTENTION,
    ),
    "attention_memory": _option(
        str | None, None,
        "KV memory of each attention worker, such as 8GiB; or a fraction of the machine's, such "
        "as 0.5, for all of them together.", _ATTENTION,
    ),
    "local_memory": _option(
        str | None, None, "KV memory of the model workers for prompts in progress.", _ATTENTION
    ),
    "worker_num_threads": _option(
        int | None, None, "Threads of each attention worker.", _ATTENTION
    ),
    "worker_cores": _option(
        str | None, None, "Cores of the attention workers, dealt out in order.", _ATTENTION
    ),
    "early_q": _option(
        bool, True, "Send q before k and v are computed.", _ATTENTION
    ),
    "step_deadline_s": _option(
        float, _DEFAULT.step_deadline_s, "Longest wait for a worker's answer.", _ATTENTION
    ),
    "heartbeat_timeout_s": _option(
        float, _DEFAULT.heartbeat_timeout_s, "A worker silent this long is lost.", _ATTENTION
    ),
}  # fmt: skip

ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Folder of a Hugging Face checkpoint; without it the bundled demo model."),
]


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the MODEL argument and all engine options.

    The command's first parameter receives the EngineConfig; its others stay its own options.
    """

    @functools.wraps(command)
    def run(model: str | None = None, **values: Any) -> None:
        engine = {name: values.pop(name) for name in _OPTIONS}
        command(engine_config(model, **engine), **values)

    kinds = {name: annotation for name, (annotation, _) in _OPTIONS.items()}
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(
            "model", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=ModelArgument
        ),
        *(p.replace(kind=keyword) for p in own),
        *(
            inspect.Parameter(name, keyword, default=default, annotation=kinds[name])
            for name, (_, default) in _OPTIONS.items()
        ),
    ]
    setattr(run, "__signature__", inspect.Signature(parameters))  # noqa: B010
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    del run.__wrapped__
    return run


def engine_config(
    model: str | None,
    *,
    attention_workers: str,
    attention_weights: str | None,
    pipeline_depth: str,
    attention_memory: str | None,
    local_memory: str | None,
    model_cores: str | None,
    worker_cores: str | None,
    **fields: Any,
) -> EngineConfig:
    """An EngineConfig from option values; ConfigError names what is wrong."""
    memory = parse_memory(attention_memory, "attention_memory") if attention_memory else None
    return EngineConfig(
        model=model if model is not None else str(demo_model_path()),
        attention_workers=parse_attention_workers(attention_workers),
        attention_weights=parse_weights(attention_weights) if attention_weights else None,
        pipeline_depth=parse_count(pipeline_depth, "pipeline_depth"),
        attention_memory_bytes=memory if isinstance(memory, int) else None,
        attention_memory_fraction=memory if isinstance(memory, float) else None,
        local_memory_bytes=parse_bytes(local_memory, "local_memory") if local_memory else None,
        model_cores=parse_cores(model_cores, "model_cores") if model_cores else (),
        worker_cores=parse_cores(worker_cores, "worker_cores") if worker_cores else (),
        **fields,
    )
