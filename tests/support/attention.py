"""An executor beside the float32 oracle: run plans, compare every layer's output."""

from __future__ import annotations

import torch
from torch import Tensor

from lamina.attention.executor import AttentionExecutor
from lamina.attention.reference import reference_attention
from lamina.attention.spec import AttentionSpec
from lamina.types import ExecutorPlan, ExecutorSpan
from support.tolerances import ATTENTION_TOLERANCE


def make_spec(layer: int = 0, **changes: object) -> AttentionSpec:
    """A small layer: 4 query heads, 2 KV heads of 8, scale 8**-0.5, unless changed."""
    fields: dict[str, object] = {
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "head_dim_k": 8,
        "head_dim_v": 8,
        "scale": 8**-0.5,
    }
    return AttentionSpec(layer=layer, **{**fields, **changes})  # type: ignore[arg-type]


def make_sinks(specs: tuple[AttentionSpec, ...]) -> tuple[Tensor | None, ...]:
    """Random sinks for the layers that have them."""
    return tuple(torch.randn(s.num_query_heads) if s.has_sinks else None for s in specs)


class Rows:
    """Random q, k and v of one layer for the rows of a plan, in a dtype."""

    def __init__(self, spec: AttentionSpec, plan: ExecutorPlan, dtype: torch.dtype) -> None:
        # Larger q and k than usual, so that a wrong weight changes the output visibly.
        num_rows = plan.num_rows
        self.q = (2 * torch.randn(num_rows, spec.num_query_heads, spec.head_dim_k)).to(dtype)
        self.k = torch.randn(num_rows, spec.num_kv_heads, spec.head_dim_k).to(dtype)
        self.v = torch.randn(num_rows, spec.num_kv_heads, spec.head_dim_v).to(dtype)
        attends = [span.attends for span in plan.spans for _ in range(span.num_rows)]
        self.attending_q = self.q[torch.tensor(attends, dtype=torch.bool)]


def run_step(
    executor: AttentionExecutor, plan: ExecutorPlan, layers: list[Rows], *, begin: bool = True
) -> list[Tensor]:
    """Run a whole step; the output of every layer."""
    if begin:
        executor.begin(plan)
    outputs = []
    for layer, rows in enumerate(layers):
        executor.attend_cached(layer, rows.attending_q)
        outputs.append(executor.finish(layer, rows.k, rows.v))
    return outputs


class Oracle:
    """Remembers every token of every sequence and computes what an executor should give."""

    def __init__(self, specs: tuple[AttentionSpec, ...], sinks: tuple[Tensor | None, ...]) -> None:
        self.specs = specs
        self.sinks = sinks
        self.tokens: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def length(self, sequence: int) -> int:
        layers = self.tokens.get(sequence)
        return len(layers[0][0]) if layers else 0

    def run_step(self, plan: ExecutorPlan, layers: list[Rows]) -> list[Tensor]:
        for sequence in plan.releases:
            self.tokens.pop(sequence, None)
        outputs: list[list[Tensor]] = [[] for _ in self.specs]
        row = 0
        for span in plan.spans:
            rows = slice(row, row + span.num_rows)
            row += span.num_rows
            known = self.tokens.setdefault(
                span.sequence, [(new.k[:0], new.v[:0]) for new in layers]
            )
            for index, (spec, sinks, new) in enumerate(
                zip(self.specs, self.sinks, layers, strict=True)
            ):
                k = torch.cat([known[index][0][: span.context_tokens], new.k[rows]])
                v = torch.cat([known[index][1][: span.context_tokens], new.v[rows]])
                known[index] = (k, v)
                if span.attends:
                    outputs[index].append(
                        reference_attention(
                            spec, new.q[rows], k, v, context_tokens=span.context_tokens, sinks=sinks
                        ).out
                    )
        return [
            torch.cat(pieces) if pieces else torch.empty(0, s.num_query_heads, s.head_dim_v)
            for s, pieces in zip(self.specs, outputs, strict=True)
        ]


def assert_outputs_match(
    outputs: list[Tensor],
    expected: list[Tensor],
    specs: tuple[AttentionSpec, ...],
    dtype: torch.dtype,
) -> None:
    """Every layer's output is the oracle's within the one tolerance table, in the right form."""
    atol, rtol = ATTENTION_TOLERANCE[dtype]
    for spec, out, want in zip(specs, outputs, expected, strict=True):
        assert out.dtype == dtype
        assert out.is_contiguous()
        torch.testing.assert_close(
            out.float(), want, atol=atol, rtol=rtol, msg=lambda text, spec=spec: f"{spec}: {text}"
        )


def plan_of(
    *spans: tuple[int, int, int] | tuple[int, int, int, bool],
    step: int = 1,
    releases: tuple[int, ...] = (),
) -> ExecutorPlan:
    """A plan from (sequence, num_rows, context_tokens[, attends = True])."""
    return ExecutorPlan(
        step=step,
        micro_batch=0,
        spans=tuple(ExecutorSpan(*(span if len(span) == 4 else (*span, True))) for span in spans),
        releases=releases,
    )
