"""What a cut model carries, sends and defers: plain data, in bytes per token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import torch
from torch import fx

from lamina.convert.dataflow import bytes_per_token
from lamina.convert.independence import module_of
from lamina.convert.program import Stage
from lamina.convert.slices import SlicedModel


class CarriedTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A value that crosses a cut beside the attention op."""

    name: str
    """The module that makes it, and the op."""
    shape: tuple[int | str, ...]
    """T stands for the number of rows."""
    dtype: str
    bytes_per_token: int


class StageSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The ops of one stage."""

    num_ops: int
    modules: tuple[str, ...]
    """The model's modules that run here, each once, in order."""


class LayerSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Slice `layer` and the cut after it, at the layer's attention op."""

    layer: int
    q: StageSummary
    """From the previous attention result to q."""
    kv: StageSummary
    """What k and v need beyond that."""
    deferred: StageSummary
    """What then runs while attention is away."""
    carried: tuple[CarriedTensor, ...]
    carried_bytes_per_token: int
    q_bytes_per_token: int
    k_bytes_per_token: int
    v_bytes_per_token: int
    out_bytes_per_token: int
    window: int | None


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `SlicedModel.explain`."""

    model: str
    architecture: str
    dtype: str
    num_layers: int
    num_programs: int
    """Distinct programs over all stages; equal layers share theirs."""
    once_per_step: StageSummary
    """Computed from the positions wherever slices run (rotary tables), never carried."""
    layers: tuple[LayerSummary, ...]
    last: StageSummary
    """From the last attention result to the logits."""
    hop_bytes_per_token: int
    """q, k, v and attention outputs of all layers."""
    carried_bytes_per_token: int
    """Over all cuts."""

    def __str__(self) -> str:
        lines = [
            f"{self.model} ({self.architecture}, {self.dtype}): {self.num_layers} attention ops, "
            f"{self.num_layers + 1} slices, {self.num_programs} programs, "
            f"{self.hop_bytes_per_token} bytes per token to and from attention"
        ]
        for layer in self.layers:
            carried = ", ".join(f"{c.name} ({c.bytes_per_token} B)" for c in layer.carried)
            lines.append(
                f"  cut {layer.layer}: carries {carried or 'nothing'}; "
                f"q {layer.q.num_ops} ops, k and v {layer.kv.num_ops}, "
                f"deferred {layer.deferred.num_ops}"
            )
        return "\n".join(lines)


def explain(model: SlicedModel) -> Explanation:
    """Describe a model, with or without weights."""
    structure = model.structure
    trace = structure.trace
    derived = set(structure.prologue.outputs)
    positions_used = [
        any(
            n is trace.position_ids or (n in derived and n.op == "call_function" and _is_tensor(n))
            for stage in three
            if stage is not None
            for n in stage.values
        )
        for three in structure.stages
    ]
    layers = []
    for spec, part, (q, kv, deferred) in zip(
        model.attention_specs, model.slices, structure.stages, strict=False
    ):
        nodes = list(part.carried)
        if any(positions_used[spec.layer + 1 :]):
            nodes.append(trace.position_ids)
        carried = tuple(
            CarriedTensor(
                name=_name(node),
                shape=tuple(_size(s) for s in node.meta["val"].shape),
                dtype=_dtype(node.meta["val"].dtype),
                bytes_per_token=bytes_per_token(trace, node),
            )
            for node in nodes
            if _is_tensor(node)
        )
        item = model.dtype.itemsize
        layers.append(
            LayerSummary(
                layer=spec.layer,
                q=_summary(q),
                kv=_summary(kv),
                deferred=_summary(deferred),
                carried=carried,
                carried_bytes_per_token=sum(c.bytes_per_token for c in carried),
                q_bytes_per_token=spec.num_query_heads * spec.head_dim_k * item,
                k_bytes_per_token=spec.num_kv_heads * spec.head_dim_k * item,
                v_bytes_per_token=spec.num_kv_heads * spec.head_dim_v * item,
                out_bytes_per_token=spec.num_query_heads * spec.head_dim_v * item,
                window=spec.window,
            )
        )
    return Explanation(
        model=model.name,
        architecture=model.architecture,
        dtype=_dtype(model.dtype),
        num_layers=model.num_layers,
        num_programs=model.num_programs,
        once_per_step=_summary(structure.prologue),
        layers=tuple(layers),
        last=_summary(structure.stages[-1][0]),
        hop_bytes_per_token=sum(
            x.q_bytes_per_token + x.k_bytes_per_token + x.v_bytes_per_token + x.out_bytes_per_token
            for x in layers
        ),
        carried_bytes_per_token=sum(x.carried_bytes_per_token for x in layers),
    )


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor)


def _name(node: fx.Node) -> str:
    if node.op == "placeholder":
        return node.name
    return f"{module_of(node)}: {node.name.rstrip('0123456789').rstrip('_')}"


def _size(size: Any) -> int | str:
    return int(size) if isinstance(size, int) else "T"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _summary(stage: Stage | None) -> StageSummary:
    nodes: Iterable[fx.Node] = stage.nodes if stage is not None else ()
    modules = tuple(dict.fromkeys(module_of(node) for node in nodes))
    return StageSummary(num_ops=stage.program.num_ops if stage else 0, modules=modules)
