"""What a cut model carries, sends and defers: plain data, in bytes per token."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec
import torch
from torch import fx

from lamina.convert.collectives import ALL_REDUCE, COLLECTIVES
from lamina.convert.dataflow import bytes_per_token
from lamina.convert.independence import module_of
from lamina.convert.program import Stage
from lamina.convert.slices import SlicedModel
from lamina.convert.trace import Trace


class CarriedTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A value that crosses a cut beside the attention op."""

    name: str
    """The module that makes it, and the op."""
    shape: tuple[int | str, ...]
    """T stands for the number of rows."""
    dtype: str
    bytes_per_token: int


class CollectiveSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One collective of a tensor-parallel rank."""

    kind: Literal["all_reduce", "all_gather"]
    module: str
    """The module whose result the ranks put together."""
    bytes_per_token: int
    """Of the result; of logits per row that yields some."""


class StageSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The ops of one stage."""

    num_ops: int
    modules: tuple[str, ...]
    """The model's modules that run here, each once, in order."""
    collectives: tuple[CollectiveSummary, ...] = ()
    """In the order in which all ranks run them."""


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

    @property
    def collectives(self) -> tuple[CollectiveSummary, ...]:
        """Those of all stages of the slice."""
        return (*self.q.collectives, *self.kv.collectives, *self.deferred.collectives)


class TensorParallelSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank of several has. All counts but the collectives' are of weights."""

    rank: int
    size: int
    sharded_bytes: int
    """Parts of weights."""
    replicated_bytes: int
    """Weights that every rank has whole."""
    replicated: tuple[str, ...]
    """The matrices among those; * stands for the layers' numbers."""
    all_reduce_bytes_per_token: int
    """Over all layers and the last slice."""


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
    tensor_parallel: TensorParallelSummary | None = None
    """Whose share it is; None: the whole model."""

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
                f"deferred {layer.deferred.num_ops}" + _reduced(layer.collectives)
            )
        if (parallel := self.tensor_parallel) is not None:
            whole = ", ".join(parallel.replicated) or "no matrix"
            lines.append(f"  logits{_reduced(self.last.collectives)}")
            lines.append(
                f"  rank {parallel.rank} of {parallel.size}: {parallel.sharded_bytes} bytes of "
                f"weights in part, {parallel.replicated_bytes} whole ({whole}); all-reduces "
                f"{parallel.all_reduce_bytes_per_token} bytes per token"
            )
        return "\n".join(lines)


def _reduced(collectives: tuple[CollectiveSummary, ...]) -> str:
    return "".join(f"; {c.kind} {c.module} ({c.bytes_per_token} B)" for c in collectives)


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
    last = _summary(structure.stages[-1][0])
    return Explanation(
        model=model.name,
        architecture=model.architecture,
        dtype=_dtype(model.dtype),
        num_layers=model.num_layers,
        num_programs=model.num_programs,
        once_per_step=_summary(structure.prologue),
        layers=tuple(layers),
        last=last,
        hop_bytes_per_token=sum(
            x.q_bytes_per_token + x.k_bytes_per_token + x.v_bytes_per_token + x.out_bytes_per_token
            for x in layers
        ),
        carried_bytes_per_token=sum(x.carried_bytes_per_token for x in layers),
        tensor_parallel=_tensor_parallel(
            trace, (*(c for x in layers for c in x.collectives), *last.collectives)
        ),
    )


def _tensor_parallel(
    trace: Trace, collectives: tuple[CollectiveSummary, ...]
) -> TensorParallelSummary | None:
    if trace.parallel is None:
        return None
    whole = {name: n.meta["val"] for n, name in trace.weights.items() if n not in trace.shards}
    return TensorParallelSummary(
        rank=trace.parallel.rank,
        size=trace.parallel.size,
        sharded_bytes=sum(n.meta["val"].nbytes for n in trace.shards),
        replicated_bytes=sum(value.nbytes for value in whole.values()),
        replicated=tuple(
            dict.fromkeys(
                re.sub(r"\.\d+\.", ".*.", name) for name, v in whole.items() if v.dim() >= 2
            )
        ),
        all_reduce_bytes_per_token=sum(
            c.bytes_per_token for c in collectives if c.kind == "all_reduce"
        ),
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
    nodes: tuple[fx.Node, ...] = stage.nodes if stage is not None else ()
    modules = tuple(dict.fromkeys(module_of(node) for node in nodes))
    return StageSummary(
        num_ops=stage.program.num_ops if stage else 0,
        modules=modules,
        collectives=tuple(
            CollectiveSummary(
                kind="all_reduce" if node.target is ALL_REDUCE else "all_gather",
                module=module_of(node),
                bytes_per_token=_bytes_per_row(node.meta["val"]),
            )
            for node in nodes
            if node.target in COLLECTIVES
        ),
    )


def _bytes_per_row(value: torch.Tensor) -> int:
    """Size of a tensor whose unknown sizes are 1."""
    count = value.dtype.itemsize
    sizes: Any = value.shape
    for size in sizes:
        if isinstance(size, torch.SymInt):
            expression = size.node.expr
            count *= int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))
        else:
            count *= size
    return count
