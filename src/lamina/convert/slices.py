"""SlicedModel: a model as n + 1 slices around its n attention ops.

A slice runs in stages, each one call of a program with a prebuilt argument list:

    begin           the step constants (rotary tables and the like), once per step
    slice i < n     run_q -> q   |   run_kv -> k, v   |   run_deferred
    slice n         run_last -> logits

Between slices the caller computes attention and sets `state.attention_output`. Values live in a
flat list of slots in the SliceState; a slot is emptied after the last stage that reads it.

Replicas of the model may take turns within a step: each begins it with a state of its own; who ran
slice i exports its context, who runs slice i + 1 imports that.

Shapes: T rows, R rows that yield logits, Hq query and Hkv KV heads, Dk and Dv head sizes, V
vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from lamina.attention.spec import AttentionSpec
from lamina.convert.context import (
    ContextValue,
    context_bytes,
    context_values,
    pack_context,
    unpack_context,
)
from lamina.convert.cut import CannotCut, SliceOrder, cut
from lamina.convert.dataflow import Values, read_values
from lamina.convert.passes import Passes
from lamina.convert.program import ProgramTable, Stage
from lamina.convert.trace import Trace, qkv_of
from lamina.errors import ConversionError

if TYPE_CHECKING:
    from lamina._native import ThreadPool
    from lamina.convert.explain import Explanation


_LOGIT_ROWS_SLOT = 2
"""The slots of a state begin with the step's inputs: token ids, positions, logit rows."""


class SliceState:
    """One micro-batch between its slices. The caller owns it; it is used by one step only."""

    __slots__ = ("attention_output", "num_rows", "values")

    def __init__(self, num_slots: int, num_rows: int) -> None:
        self.values: list[Any] = [None] * num_slots
        self.num_rows = num_rows
        self.attention_output: torch.Tensor | None = None
        """[T, Hq, Dv] of the last attention op, set before the next slice runs."""


@dataclass(frozen=True)
class BoundStage:
    """A stage with slots for its values and, once bound, its weights."""

    stage: Stage
    run: Callable[..., tuple[Any, ...]]
    reads: tuple[int, ...]
    writes: tuple[tuple[int, int], ...]
    """(slot, output) of what later stages read; the other outputs are the caller's."""
    drops: tuple[int, ...]
    weights: tuple[Any, ...]
    """Tensors, and after `SlicedModel.optimize` functions that hold packed weights."""

    def __call__(self, values: list[Any]) -> tuple[Any, ...]:
        outputs = self.run(*[values[slot] for slot in self.reads], *self.weights)
        for slot in self.drops:
            values[slot] = None
        for slot, output in self.writes:
            values[slot] = outputs[output]
        return outputs


@dataclass(frozen=True)
class Slice:
    """What runs between two attention ops. The last slice has only `q`, which gives the logits."""

    index: int
    q: BoundStage
    kv: BoundStage | None
    deferred: BoundStage | None
    """None when nothing is left to do after k and v."""
    carried: tuple[fx.Node, ...]
    """Values of this or earlier slices that later ones use."""
    attention_slot: int | None
    """Where the previous attention op's output goes; None in slice 0."""


@dataclass(frozen=True)
class Structure:
    """A cut model without weights; every tensor argument is a node of the trace."""

    trace: Trace
    values: Values
    prologue: Stage
    orders: tuple[SliceOrder, ...]
    stages: tuple[tuple[Stage, Stage | None, Stage | None], ...]
    num_programs: int
    specs: tuple[AttentionSpec, ...]


def build_structure(trace: Trace) -> Structure:
    """Cut a trace. Raises ConversionError for an attention op that no finite cut passes."""
    values = read_values(trace)
    try:
        orders = cut(values.flow)
    except CannotCut as error:
        raise ConversionError("what its attention needs cannot be separated from what follows",
                              model=trace.name, layer=error.index) from None  # fmt: skip
    table = ProgramTable((*trace.weights, *trace.constants, *values.folded))
    parts = [
        [
            values.with_constants([values.rows[v] for v in part])
            for part in (order.q, order.kv, order.deferred)
        ]
        for order in orders
    ]
    used = {
        n: None
        for part in (p for three in parts for p in three)
        for node in part
        for n in node.all_input_nodes
    }
    step_constants = set(values.step_constants)
    prologue = table.stage(
        values.with_constants(values.step_constants), [n for n in used if n in step_constants]
    )
    stages: list[tuple[Stage, Stage | None, Stage | None]] = []
    for i, (order, (q, kv, deferred)) in enumerate(zip(orders, parts, strict=True)):
        if i == len(trace.attention):
            stages.append((table.stage(q, (trace.logits,)), None, None))
            continue
        carried = tuple(values.rows[v] for v in order.carried)
        attention = trace.attention[i]
        q_node, k_node, v_node = qkv_of(attention)
        needs_later = _inputs((*kv, *deferred)) | set(carried)
        q_stage = table.stage(q, (*(n for n in q if n in needs_later), q_node))
        needs_later = _inputs(deferred) | set(carried)
        kv_stage = table.stage(kv, (*(n for n in kv if n in needs_later), k_node, v_node))
        rest = set(carried)
        deferred_stage = table.stage(deferred, [n for n in deferred if n in rest])
        stages.append((q_stage, kv_stage, deferred_stage if deferred else None))
    return Structure(
        trace=trace,
        values=values,
        prologue=prologue,
        orders=orders,
        stages=tuple(stages),
        num_programs=len(table),
        specs=attention_specs(trace),
    )


def _inputs(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    return {n for node in nodes for n in node.all_input_nodes}


def attention_specs(trace: Trace) -> tuple[AttentionSpec, ...]:
    """What each attention op of the trace computes."""
    return tuple(_spec(layer, node) for layer, node in enumerate(trace.attention))


def _spec(layer: int, attention: fx.Node) -> AttentionSpec:
    q, k, v = (node.meta["val"] for node in qkv_of(attention))
    _, num_query_heads, head_dim_k = q.shape
    _, num_kv_heads, head_dim_v = v.shape
    assert k.shape[1:] == (num_kv_heads, head_dim_k), "q, k and v of one layer fit together"
    scale, window, softcap, sinks = attention.args[4:8]
    return AttentionSpec(
        layer=layer,
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_dim_k=head_dim_k,
        head_dim_v=head_dim_v,
        scale=scale,  # type: ignore[arg-type]
        window=window,  # type: ignore[arg-type]
        softcap=softcap,  # type: ignore[arg-type]
        has_sinks=sinks is not None,
    )


class SlicedModel:
    """A model cut at its attention ops. Reusable by any number of states, one stage at a time.

    Made by `lamina.convert.convert` (with weights) or `convert_structure` (without: only its
    description can be used).
    """

    def __init__(
        self,
        structure: Structure,
        *,
        config: Any,
        dtype: torch.dtype,
        architecture: str,
        eos_token_ids: tuple[int, ...],
        tensors: dict[fx.Node, torch.Tensor] | None,
    ) -> None:
        """`tensors`: values of the weight and constant nodes; None: a model without weights."""
        text = config.get_text_config()
        self.name = structure.trace.name
        self.architecture = architecture
        self.config = config
        self.dtype = dtype
        self.vocab_size: int = structure.trace.logits.meta["val"].shape[-1]
        self.max_model_len: int | None = getattr(text, "max_position_embeddings", None)
        self.eos_token_ids = eos_token_ids
        self.attention_specs = structure.specs
        self.structure = structure
        self.passes: Passes | None = None
        """What rewrote the stages; None before `optimize`."""
        self._has_weights = tensors is not None
        self.sinks = tuple(_sinks(node, tensors) for node in structure.trace.attention)
        self._bind(structure, tensors or {})

    def _bind(self, structure: Structure, tensors: dict[fx.Node, torch.Tensor]) -> None:
        trace = structure.trace
        stages = [structure.prologue, *(s for three in structure.stages for s in three if s)]
        last_reader: dict[fx.Node, Stage] = {}
        for stage in stages:
            last_reader.update(dict.fromkeys(stage.values, stage))
        slots: dict[fx.Node, int] = {
            node: i
            for i, node in enumerate((trace.input_ids, trace.position_ids, trace.logit_rows))
        }

        def bind(stage: Stage) -> BoundStage:
            kept = [(n, i) for i, n in enumerate(stage.outputs) if n in last_reader]
            for node in (*stage.values, *(n for n, _ in kept)):
                slots.setdefault(node, len(slots))
            return BoundStage(
                stage=stage,
                run=stage.program.run,
                reads=tuple(slots[n] for n in stage.values),
                writes=tuple((slots[n], i) for n, i in kept),
                drops=tuple(slots[n] for n in stage.values if last_reader[n] is stage),
                weights=tuple(tensors[n] for n in stage.weights) if self._has_weights else (),
            )

        self._prologue = bind(structure.prologue)
        slices = []
        for i, (q, kv, deferred) in enumerate(structure.stages):
            if i:
                slots.setdefault(trace.attention[i - 1], len(slots))
            slices.append(
                Slice(
                    index=i,
                    q=bind(q),
                    kv=bind(kv) if kv else None,
                    deferred=bind(deferred) if deferred else None,
                    carried=tuple(structure.values.rows[v] for v in structure.orders[i].carried),
                    attention_slot=slots[trace.attention[i - 1]] if i else None,
                )
            )
        self.slices: tuple[Slice, ...] = tuple(slices)
        self._num_slots = len(slots)
        self._slots = slots
        self._contexts: dict[int, tuple[ContextValue, ...]] = {}

    @property
    def num_layers(self) -> int:
        """Attention ops, n; there are n + 1 slices."""
        return len(self.attention_specs)

    @property
    def num_programs(self) -> int:
        """Distinct programs; does not grow with the number of equal layers."""
        return self.structure.num_programs

    def with_sinks(self, sinks: Sequence[torch.Tensor | None]) -> SlicedModel:
        """The same model with sinks that are known from elsewhere, for one without weights."""
        model = copy.copy(self)
        model.sinks = tuple(sinks)
        return model

    def optimize(self, pool: ThreadPool, *, compile: bool = False, isa: str | None = None) -> None:
        """Rewrite all stages to run in native code on the pool's threads, with packed weights.

        Results stay the same up to rounding. Plain weights that no torch op reads any more are
        freed as soon as they are packed. Blocks for about as long as it takes to copy the weights.

        Args:
            pool: must be used by this model's slices only while no other native call needs it.
            compile: let Inductor generate all but the linears, at each program's first call. It
                needs a C++ compiler and takes seconds per program, not per layer.
            isa: an instruction set level other than the active one.
        """
        assert self._has_weights, "a model from convert_structure has no weights to pack"
        assert self.passes is None, "a model is optimized once"
        passes = self.passes = Passes(pool, compile=compile, isa=isa)
        self._prologue = passes.rewrite(self._prologue)
        slices, self.slices = list(self.slices), ()
        for i, part in enumerate(slices):
            slices[i] = replace(
                part,
                q=passes.rewrite(part.q),
                kv=passes.rewrite(part.kv) if part.kv else None,
                deferred=passes.rewrite(part.deferred) if part.deferred else None,
            )
        self.slices = tuple(slices)

    def begin(
        self, input_ids_T: torch.Tensor, position_ids_T: torch.Tensor, logit_rows_R: torch.Tensor
    ) -> SliceState:
        """Start a step of T rows.

        Args:
            input_ids_T: [T] int64, T >= 1.
            position_ids_T: [T] int64, each row's position in its own sequence.
            logit_rows_R: [R] int64 in [0, T), the rows whose logits `run_last` returns; R may be 0.
        """
        assert self._has_weights, "a model from convert_structure has no weights to run with"
        state = SliceState(self._num_slots, len(input_ids_T))
        state.values[: _LOGIT_ROWS_SLOT + 1] = (
            input_ids_T.unsqueeze(0),
            position_ids_T.unsqueeze(0),
            logit_rows_R,
        )
        self._prologue(state.values)
        return state

    def run_q(self, layer: int, state: SliceState) -> torch.Tensor:
        """The first stage of slice `layer`: q, [T, Hq, Dk] contiguous; the caller owns it.

        For layer > 0 `state.attention_output` must hold the previous layer's output; it is taken.
        """
        q: torch.Tensor = self._enter(layer, state)[-1]
        return q

    def run_kv(self, layer: int, state: SliceState) -> tuple[torch.Tensor, torch.Tensor]:
        """k [T, Hkv, Dk] and v [T, Hkv, Dv], contiguous; the caller owns them."""
        stage = self.slices[layer].kv
        assert stage is not None, "the last slice has no k and v"
        outputs = stage(state.values)
        return outputs[-2], outputs[-1]

    def run_deferred(self, layer: int, state: SliceState) -> None:
        """What is left of slice `layer` and does not wait for its attention output."""
        stage = self.slices[layer].deferred
        if stage is not None:
            stage(state.values)

    def run_last(self, state: SliceState) -> torch.Tensor:
        """The last slice: logits [R, V] in the model's dtype; the caller owns them.

        Free when R is 0.
        """
        if state.values[_LOGIT_ROWS_SLOT].shape[0] == 0:
            return torch.empty(0, self.vocab_size, dtype=self.dtype)
        logits: torch.Tensor = self._enter(self.num_layers, state)[-1]
        return logits.squeeze(0)

    def context_bytes(self, layer: int, num_rows: int) -> int:
        """Size of what `export_context` takes out of a state of `num_rows` rows.

        Raises:
            ConversionError: a value cannot be moved between replicas.
        """
        return context_bytes(self._context(layer), num_rows)

    def export_context(self, layer: int, state: SliceState) -> list[torch.Tensor]:
        """What later slices need of slice `layer` and those before it, taken out of the state.

        Called after `run_deferred`. The tensors are contiguous and the caller's.
        """
        return pack_context(self._context(layer), state.values)

    def import_context(self, layer: int, state: SliceState, payload: torch.Tensor) -> None:
        """Continue after slice `layer`, which another replica ran, with what it exported.

        Args:
            payload: uint8 [context_bytes], the exported tensors one after the other; not changed,
                and in use until this state's next export or import.
        """
        unpack_context(self._context(layer), state.values, payload, state.num_rows)

    def _context(self, layer: int) -> tuple[ContextValue, ...]:
        edge = self._contexts.get(layer)
        if edge is None:
            edge = context_values(self.structure.trace, self.slices[layer].carried, self._slots)
            self._contexts[layer] = edge
        return edge

    def _enter(self, layer: int, state: SliceState) -> tuple[Any, ...]:
        part = self.slices[layer]
        if part.attention_slot is not None:
            assert state.attention_output is not None, "set state.attention_output between slices"
            state.values[part.attention_slot] = state.attention_output
            state.attention_output = None
        return part.q(state.values)

    def explain(self) -> Explanation:
        """What is carried, sent and deferred per layer, in bytes per token."""
        from lamina.convert.explain import explain

        return explain(self)


def _sinks(attention: fx.Node, tensors: dict[fx.Node, torch.Tensor] | None) -> torch.Tensor | None:
    node = attention.args[7]
    if node is None or tensors is None:
        return None
    assert isinstance(node, fx.Node)
    return tensors[node].detach().float().reshape(-1).contiguous()
