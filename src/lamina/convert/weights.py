"""Checkpoint folder -> the tensors that a traced graph names.

transformers loads the model, so its conversions of checkpoints (fused experts, renamed parameters,
tied embeddings, casts) apply. Only local folders are read; remote code is never run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import fx
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lamina.convert.trace import Trace
from lamina.errors import CheckpointError, ConversionError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_RANDOM_ELEMENTS = 4_194_301
"""Random numbers drawn for dummy weights; a prime, so that repeats never align with rows."""


def read_config(model: str | Path) -> Any:
    """The transformers config of a local checkpoint folder.

    Raises:
        CheckpointError: no such folder, or no readable config.json in it.
        ConversionError: transformers does not know the architecture.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise CheckpointError(
            f"{model} is not a folder; Lamina reads local checkpoints only: download the model "
            "and give the path of the folder that holds its config.json"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{model} has no config.json; give the folder of a Hugging Face checkpoint"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each config class validates in its own way
        text = str(error)
        if "does not recognize" in text or "model_type" in text or "model type" in text:
            raise ConversionError(
                "transformers does not know this architecture; check model_type in config.json, "
                "or install a newer transformers",
                model=folder.name,
            ) from error
        raise CheckpointError(f"cannot read {folder / 'config.json'}: {_brief(error)}") from error


def resolve_dtype(dtype: Dtype, config: Any) -> torch.dtype:
    """`auto` is the dtype that the checkpoint's config names, or float32."""
    if dtype != "auto":
        return _DTYPES[dtype]
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return _DTYPES.get(str(named).removeprefix("torch."), torch.float32)


def read_eos_token_ids(model: str | Path | None, config: Any) -> tuple[int, ...]:
    """The generation config's end tokens, else the config's; sorted, possibly empty."""
    eos = None
    if model is not None and (Path(model) / "generation_config.json").is_file():
        try:
            eos = GenerationConfig.from_pretrained(model, local_files_only=True).eos_token_id
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"cannot read {Path(model) / 'generation_config.json'}: {_brief(error)}"
            ) from error
    if eos is None:
        eos = getattr(config.get_text_config(), "eos_token_id", None)
    return tuple(sorted({eos} if isinstance(eos, int) else set(eos or ())))


def load_tensors(
    trace: Trace,
    folder: Path,
    config: Any,
    *,
    dtype: torch.dtype,
    load_format: Literal["auto", "dummy"],
    seed: int,
    progress: bool,
) -> dict[fx.Node, torch.Tensor]:
    """Values of the trace's weights and constants, on the CPU, sharing the loaded model's memory.

    Of a weight that the trace has in part, a copy of that part is kept and the rest is freed,
    tensor by tensor. A part that can be a view of a tensor that is kept whole anyway is one.

    Args:
        load_format: `dummy` makes random weights from `seed` instead of reading any.

    Raises:
        CheckpointError: weights are missing, truncated or of other shapes than the config says.
    """
    if load_format == "dummy":
        model = _dummy_model(config, dtype, seed)
    else:
        model = _load_model(folder, config, dtype, progress)
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    del model
    tensors = {
        node: state[name].detach()
        for node, name in trace.weights.items()
        if node not in trace.shards
    }
    whole = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    parts: dict[str, list[fx.Node]] = {}
    for node in trace.shards:
        parts.setdefault(trace.weights[node], []).append(node)
    for name in list(state):
        tensor = state.pop(name).detach()
        is_kept = tensor.untyped_storage().data_ptr() in whole
        for node in parts.get(name, ()):
            shard = trace.shards[node]
            view = shard.view_of(tensor) if is_kept else None
            tensors[node] = shard.of(tensor) if view is None else view
    return {**tensors, **trace.constants}


def _load_model(folder: Path, config: Any, dtype: torch.dtype, progress: bool) -> Any:
    try:
        with _progress_bars(progress):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=copy.deepcopy(config),  # the model writes its settings into it
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except OSError as error:
        if "no file named" in str(error):
            raise CheckpointError(
                f"{folder} has no weights (model.safetensors or its shards); download them, or "
                "use --load-format dummy for random ones"
            ) from error
        raise CheckpointError(_unreadable(folder, error)) from error
    except Exception as error:  # safetensors and transformers raise many kinds for bad files
        if "mismatched" in str(error):
            raise CheckpointError(
                f"the weights in {folder} have other shapes than its config.json says; the config "
                "belongs to another model"
            ) from error
        raise CheckpointError(_unreadable(folder, error)) from error
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{folder} lacks weights that its config.json asks for: "
            f"{', '.join(missing[:3])}{more}; the download is incomplete or the config is "
            "another model's"
        )
    return model


def _unreadable(folder: Path, error: Exception) -> str:
    return (
        f"cannot load the weights in {folder}: {_brief(error)}; a file is truncated or does not "
        "belong to this config: download the checkpoint again"
    )


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return " ".join(lines[:2])
    return lines[0] if lines else type(error).__name__


@contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    log = transformers.utils.logging
    was_enabled = log.is_progress_bar_enabled()
    verbosity = log.get_verbosity()
    (log.enable_progress_bar if wanted else log.disable_progress_bar)()
    log.set_verbosity_error()
    try:
        yield
    finally:
        (log.enable_progress_bar if was_enabled else log.disable_progress_bar)()
        log.set_verbosity(verbosity)


def _dummy_model(config: Any, dtype: torch.dtype, seed: int) -> Any:
    """Random matrices of the config's spread, norms as the model makes them, biases of zero."""
    with transformers.initialization.no_init_weights():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    spread = getattr(config.get_text_config(), "initializer_range", 0.02)
    bank = torch.randn(_RANDOM_ELEMENTS, generator=generator).mul_(spread).to(dtype)
    start = 0
    for name, parameter in model.named_parameters():
        flat = parameter.detach().view(-1)
        if parameter.dim() >= 2 or "sink" in name:
            start = _fill(flat, bank, start)
        elif name.endswith("bias"):
            flat.zero_()
    return model


def _fill(flat: torch.Tensor, bank: torch.Tensor, start: int) -> int:
    """Copy the bank over `flat`, around and around from `start`; returns where it stopped."""
    done = 0
    while done < len(flat):
        count = min(len(flat) - done, len(bank) - start)
        flat[done : done + count] = bank[start : start + count]
        done += count
        start = (start + count) % len(bank)
    return start
