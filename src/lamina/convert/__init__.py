"""Model -> slices: trace, take a rank's share, cut, bind weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lamina.convert.collectives import TensorParallel
from lamina.convert.passes.shard import shard_trace
from lamina.convert.program import evaluate
from lamina.convert.slices import (
    Slice,
    SlicedModel,
    SliceState,
    attention_specs,
    build_structure,
)
from lamina.convert.trace import trace_model
from lamina.convert.weights import (
    Dtype,
    load_tensors,
    read_config,
    read_eos_token_ids,
    resolve_dtype,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "Slice",
    "SliceState",
    "SlicedModel",
    "TensorParallel",
    "convert",
    "convert_structure",
]


def convert(
    model: str | Path,
    *,
    dtype: Dtype = "auto",
    load_format: Literal["auto", "dummy"] = "auto",
    seed: int = 0,
    progress: bool = False,
    parallel: TensorParallel | None = None,
) -> SlicedModel:
    """The checkpoint in folder `model`, cut at its attention ops, with its weights on the CPU.

    Blocks for seconds (tracing) plus the time to read the weights.

    Args:
        dtype: computing and storage type; `auto` is what the checkpoint's config names.
        load_format: `dummy` needs only config.json and makes random weights from `seed`.
        progress: show a progress bar while weights load.
        parallel: make one tensor-parallel rank's model: its heads, its part of the weights. To run
            it, `collectives.use_group` must say how it reaches the other ranks.

    Raises:
        ConfigError: the heads cannot be shared out over so many ranks.
        CheckpointError: the folder or a file in it is missing, truncated or does not fit.
        ConversionError: the model cannot be cut; names the layer and the reason.
    """
    config = read_config(model)
    return _convert(
        model,
        config,
        dtype,
        load_format=load_format,
        seed=seed,
        progress=progress,
        parallel=parallel,
    )


def convert_structure(
    model: str | Path | PretrainedConfig,
    *,
    dtype: Dtype = "auto",
    parallel: TensorParallel | None = None,
) -> SlicedModel:
    """The same without weights: enough for `explain`, specs and sizes, not to run.

    Args:
        model: a checkpoint folder (only its config.json is needed) or a transformers config.
    """
    if isinstance(model, str | Path):
        return _convert(model, read_config(model), dtype, load_format=None, parallel=parallel)
    return _convert(None, model, dtype, load_format=None, parallel=parallel)


def _convert(
    folder: str | Path | None,
    config: Any,
    dtype: Dtype,
    *,
    load_format: Literal["auto", "dummy"] | None,
    seed: int = 0,
    progress: bool = False,
    parallel: TensorParallel | None = None,
) -> SlicedModel:
    architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    torch_dtype = resolve_dtype(dtype, config)
    name = Path(folder).resolve().name if folder is not None else architecture
    eos_token_ids = read_eos_token_ids(folder, config)
    trace = trace_model(config, dtype=torch_dtype, name=name)
    if parallel is not None:
        trace = shard_trace(trace, attention_specs(trace), parallel)
    structure = build_structure(trace)
    tensors = None
    if load_format is not None and folder is not None:
        tensors = load_tensors(
            structure.trace,
            Path(folder),
            config,
            dtype=torch_dtype,
            load_format=load_format,
            seed=seed,
            progress=progress,
        )
        with torch.no_grad():
            evaluate(structure.values.folded, tensors)
    return SlicedModel(
        structure,
        config=config,
        dtype=torch_dtype,
        architecture=architecture,
        eos_token_ids=eos_token_ids,
        tensors=tensors,
    )
