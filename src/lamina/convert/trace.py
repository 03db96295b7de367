"""A transformers causal LM -> one exported graph whose attention is `lamina::attention`.

The model is built on the meta device and traced with batch size 1 and a dynamic number of rows T:
the graph's inputs are input_ids [1, T], position_ids [1, T] and logit_rows [R], its result is the
logits [1, R, V]. There is no cache and no mask in it: rows may belong to many sequences, and only
the attention op may mix them. What would mix them elsewhere is refused.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lamina.convert import experts
from lamina.convert.collectives import TensorParallel
from lamina.convert.functional import make_functional
from lamina.convert.graph import simplify
from lamina.convert.independence import find_row_mixing
from lamina.convert.op import attention as attention_op
from lamina.convert.shard import Shard
from lamina.errors import ConversionError

_IMPLEMENTATION = "lamina"
_TRACED_ROWS = 7
_TRACED_LOGIT_ROWS = 3

_MASK_PARTS = {
    "and_masks",
    "causal_mask_function",
    "sliding_window_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
    "add_offsets_to_mask_function",
}
"""Mask functions of transformers that say no more than `AttentionSpec` can: causal, window."""


@dataclass(frozen=True)
class Trace:
    """One exported model. Nodes belong to `graph` and appear in topological order."""

    name: str
    graph: fx.Graph
    input_ids: fx.Node
    position_ids: fx.Node
    logit_rows: fx.Node
    logits: fx.Node
    attention: tuple[fx.Node, ...]
    """The `lamina::attention` calls in order; their arguments are those of `op.attention`."""
    weights: dict[fx.Node, str]
    """Placeholders of parameters and buffers -> the name in the transformers model."""
    constants: dict[fx.Node, torch.Tensor]
    """Placeholders of tensors that the model's code created."""
    shards: dict[fx.Node, Shard] = field(default_factory=dict)
    """The weights that are a part of the named tensor, and which part; of the others it is all."""
    parallel: TensorParallel | None = None
    """Which rank's graph it is; None: the whole model's."""


def qkv_of(attention: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The q, k and v arguments of a `lamina::attention` node."""
    q, k, v = attention.args[:3]
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    assert isinstance(v, fx.Node)
    return q, k, v


class _Refusal(Exception):
    def __init__(self, reason: str, layer: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.layer = layer


@dataclass
class _Hooks:
    """What transformers calls during one trace in place of attention and of mask creation."""

    mask_windows: set[int | None] = field(default_factory=set)

    def attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """query, key, value: [1, heads, T, head size]; returns [1, T, heads, head size]."""
        layer = getattr(module, "layer_idx", None)
        if attention_mask is not None:
            raise _Refusal("it builds an attention mask of its own", layer)
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise _Refusal("its attention is not causal", layer)
        known = ("position_ids", "cache_position")
        for name, argument in others.items():
            if isinstance(argument, torch.Tensor) and name not in known:
                raise _Refusal(f"its attention takes {name}, which Lamina does not know", layer)
        q, k, v = (x.transpose(1, 2).squeeze(0).contiguous() for x in (query, key, value))
        out = attention_op(
            q,
            k,
            v,
            -1 if layer is None else layer,
            float(scaling if scaling is not None else query.shape[-1] ** -0.5),
            sliding_window or None,
            softcap or None,
            s_aux,
        )
        return out.unsqueeze(0), None

    def mask(
        self, *_: Any, mask_function: Callable[..., Any], local_size: int | None = None, **__: Any
    ) -> None:
        for part in _mask_parts(mask_function):
            if part not in _MASK_PARTS:
                raise _Refusal(f"its attention mask ({part}) is neither causal nor a window")
        self.mask_windows.add(local_size)


def _mask_parts(function: Any) -> Iterator[str]:
    """Names of the transformers functions that a mask function is composed of."""
    yield function.__qualname__.split(".")[0]
    for cell in getattr(function, "__closure__", None) or ():
        contents = cell.cell_contents
        for part in contents if isinstance(contents, tuple) else (contents,):
            if callable(part) and hasattr(part, "__qualname__"):
                yield from _mask_parts(part)


_LOCK = threading.Lock()


@contextmanager
def _installed(hooks: _Hooks) -> Iterator[None]:
    """transformers looks implementations up by name in global tables: one trace at a time."""
    with _LOCK:
        AttentionInterface.register(_IMPLEMENTATION, hooks.attention)
        AttentionMaskInterface.register(_IMPLEMENTATION, hooks.mask)
        ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, experts.experts_forward)
        yield


class _Rows(torch.nn.Module):
    """The forward pass with exactly the inputs that a step has."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.model_keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        keep = {"logits_to_keep": logit_rows} if self.model_keeps_rows else {}
        logits: torch.Tensor = self.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **keep
        ).logits
        return logits if self.model_keeps_rows else logits[:, logit_rows]


def trace_model(config: Any, *, dtype: torch.dtype, name: str) -> Trace:
    """Export the model of a transformers config.

    Raises:
        ConversionError: the model cannot be expressed as row-independent slices around attention.
    """
    hooks = _Hooks()
    try:
        _check_config(config)
        with _installed(hooks), _quiet(), torch.no_grad():
            model = _build(config, dtype)
            program = _export(model)
        return _read(program, config, hooks, name)
    except _Refusal as refusal:
        raise ConversionError(refusal.reason, model=name, layer=refusal.layer) from None


def _check_config(config: Any) -> None:
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise _Refusal("it is an encoder-decoder model; Lamina serves decoder-only models")
    if getattr(config, "quantization_config", None) is not None:
        raise _Refusal("its weights are quantized; use a float32, bfloat16 or float16 checkpoint")
    for layer, kind in enumerate(getattr(text, "layer_types", None) or ()):
        if kind not in ("full_attention", "sliding_attention"):
            raise _Refusal(f"the layer is of type {kind}, not causal attention", layer)
    rope = getattr(text, "rope_parameters", None) or {}
    for rope_type in {rope.get("rope_type"), *(r.get("rope_type") for r in rope.values()
                                               if isinstance(r, dict))}:  # fmt: skip
        if rope_type == "longrope" and not _longrope_is_static(text):
            raise _Refusal(
                "its rotary scaling (longrope) switches on the sequence length, so that a token's "
                "key depends on how many tokens follow it; use a checkpoint of the family "
                "whose context is not extended that way"
            )


def _longrope_is_static(text: Any) -> bool:
    original = text.rope_parameters.get("original_max_position_embeddings")
    return original is not None and text.max_position_embeddings <= original


def _build(config: Any, dtype: torch.dtype) -> torch.nn.Module:
    try:
        with torch.device("meta"):
            model: torch.nn.Module = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),  # the model writes its settings into it
                dtype=dtype,
                attn_implementation=_IMPLEMENTATION,
                experts_implementation=_IMPLEMENTATION,
            ).eval()
    except KeyError as error:  # a table of the model's own instead of the interface
        if error.args == (_IMPLEMENTATION,):
            raise _Refusal(
                "its attention does not go through transformers' attention interface"
            ) from error
        raise _Refusal(f"transformers cannot build it: missing {error}") from error
    except Exception as error:  # whatever a model's constructor makes of a config
        raise _Refusal(f"transformers cannot build it: {_first_line(error)}") from error
    for module in model.modules():
        rope_type: Any = getattr(module, "rope_type", None)
        if isinstance(rope_type, str):
            setattr(module, "rope_type", _static(rope_type))  # noqa: B010
        elif isinstance(rope_type, dict):
            setattr(  # noqa: B010
                module, "rope_type", {layer: _static(kind) for layer, kind in rope_type.items()}
            )
    return model


def _static(rope_type: str) -> str:
    """Up to the model's length limit these kinds keep the frequencies that they begin with (see
    `_check_config`), and longer sequences are not accepted: no need to look at the positions."""
    return "default" if rope_type in ("dynamic", "longrope") else rope_type


def _export(model: torch.nn.Module) -> torch.export.ExportedProgram:
    ids = torch.zeros(1, _TRACED_ROWS, dtype=torch.long, device="meta")
    rows = torch.zeros(_TRACED_LOGIT_ROWS, dtype=torch.long, device="meta")
    auto = torch.export.Dim.AUTO
    try:
        program = torch.export.export(
            _Rows(model),
            (ids, ids.clone(), rows),
            dynamic_shapes=({1: auto}, {1: auto}, {0: auto}),
            strict=False,
        )
        if not make_functional(program.graph):
            program.graph_module.recompile()
            program = program.run_decompositions({})
    except _Refusal:
        raise
    except Exception as error:  # torch.export has no common base for what it cannot trace
        raise _Refusal(f"torch.export cannot trace it: {_first_line(error)}") from error
    return program


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _read(program: torch.export.ExportedProgram, config: Any, hooks: _Hooks, name: str) -> Trace:
    graph = program.graph
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    signature = program.graph_signature
    if signature.buffers_to_mutate:
        changed = next(iter(signature.buffers_to_mutate.values())).removeprefix("model.")
        raise _Refusal(f"it changes {changed} while it runs")
    input_ids, position_ids, logit_rows = (placeholders[n] for n in signature.user_inputs)
    simplify(graph, num_rows_of=position_ids)

    attention = tuple(n for n in graph.nodes if n.target is torch.ops.lamina.attention.default)
    _check_attention(attention, config, hooks)
    if (mixing := find_row_mixing(graph, (input_ids, position_ids), logit_rows)) is not None:
        raise _Refusal(mixing.reason, mixing.layer)

    state = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {
        placeholders[n]: program.constants[target]
        for n, target in signature.inputs_to_lifted_tensor_constants.items()
    }
    if any(tensor.is_meta for tensor in constants.values()):
        raise _Refusal("its forward pass makes a tensor whose values are not known when tracing")
    output = next(n for n in graph.nodes if n.op == "output")
    (logits,) = output.args[0]
    return Trace(
        name=name,
        graph=graph,
        input_ids=input_ids,
        position_ids=position_ids,
        logit_rows=logit_rows,
        logits=logits,
        attention=attention,
        weights={placeholders[n]: fqn.removeprefix("model.") for n, fqn in state.items()},
        constants=constants,
    )


def _check_attention(attention: tuple[fx.Node, ...], config: Any, hooks: _Hooks) -> None:
    if not attention:
        raise _Refusal("no attention op reached transformers' attention interface (recurrent "
                       "models and attention of its own kind cannot be cut)")  # fmt: skip
    layers = {node.args[3] for node in attention}
    for expected in range(config.get_text_config().num_hidden_layers):
        if expected not in layers and -1 not in layers:
            raise _Refusal("it has no attention op, so its tokens mix in some other way", expected)
    for node in attention:
        layer: Any = node.args[3]
        window = node.args[5]
        if hooks.mask_windows and window not in hooks.mask_windows:
            raise _Refusal(
                f"its attention says window {window}, its mask "
                f"{sorted(hooks.mask_windows, key=str)}",
                layer,
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence notes of torch.export and transformers that a user can do nothing about."""
    logger = logging.getLogger("transformers")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
