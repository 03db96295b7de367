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
    """Random q, k and v of one layer for the rows of a plan's spans, all heads, in a dtype.

    Args:
        units, page_units: the executor's; the payloads are in the order of its lanes.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        plan: ExecutorPlan,
        dtype: torch.dtype,
        units: int = 1,
        page_units: int = 1,
    ) -> None:
        # Larger q and k than usual, so that a wrong weight changes the output visibly.
        num_rows = sum(rows_of(span) for span in plan.spans)
        self.q = (2 * torch.randn(num_rows, spec.num_query_heads, spec.head_dim_k)).to(dtype)
        self.k = torch.randn(num_rows, spec.num_kv_heads, spec.head_dim_k).to(dtype)
        self.v = torch.randn(num_rows, spec.num_kv_heads, spec.head_dim_v).to(dtype)
        self._plan, self._units, self._page_units = plan, units, page_units

    @property
    def attending_q(self) -> Tensor:
        """[A, Hq of a lane, Dk]."""
        return self.payloads()[0]

    @property
    def stored_k(self) -> Tensor:
        """[N, Hkv of a lane, Dk]."""
        return self.payloads()[1]

    @property
    def stored_v(self) -> Tensor:
        """[N, Hkv of a lane, Dv]."""
        return self.payloads()[2]

    def payloads(self, units: range | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The attending rows of q, and the stored ones of k and v, lane by lane.

        Args:
            units: of one tensor-parallel rank; None: of all.
        """
        units = range(self._units) if units is None else units
        attending = [span.num_attending for span in self._plan.spans]
        stored = [span.num_stored for span in self._plan.spans]
        return (
            self._pack(self.q, attending, units),
            self._pack(self.k, stored, units),
            self._pack(self.v, stored, units),
        )

    def _pack(self, x_THD: Tensor, counts: list[int], units: range) -> Tensor:
        heads = x_THD.shape[1] // self._units
        pieces = [x_THD[:0, : heads * self._page_units]]
        row = 0
        for span, count in zip(self._plan.spans, counts, strict=True):
            for unit in range(span.unit_start, span.unit_stop, self._page_units):
                if unit in units:
                    columns = slice(unit * heads, (unit + self._page_units) * heads)
                    pieces.append(x_THD[row : row + count, columns])
            row += rows_of(span)
        return torch.cat(pieces)


def rows_of(span: ExecutorSpan) -> int:
    """Rows of a span: those that attend, or are stored, or both."""
    return max(span.num_attending, span.num_stored)


def unpack(
    plan: ExecutorPlan, x: Tensor, page_units: int = 1, units: range | None = None
) -> list[Tensor]:
    """Per span that attends its rows with all heads of its units, from a payload lane by lane.

    Args:
        units: of one tensor-parallel rank; None: of all.
    """
    wholes = []
    row = 0
    for span in plan.spans:
        lanes = []
        for unit in range(span.unit_start, span.unit_stop, page_units):
            if units is None or unit in units:
                lanes.append(x[row : row + span.num_attending])
                row += span.num_attending
        if span.num_attending:
            empty = x.new_empty(span.num_attending, 0, x.shape[2])
            wholes.append(torch.cat([empty, *lanes], dim=1))
    assert row == len(x)
    return wholes


def run_step(
    executor: AttentionExecutor, plan: ExecutorPlan, layers: list[Rows], *, begin: bool = True
) -> list[Tensor]:
    """Run a whole step; the output of every layer."""
    if begin:
        executor.begin(plan)
    outputs = []
    for layer, rows in enumerate(layers):
        executor.attend_cached(layer, rows.attending_q)
        outputs.append(executor.finish(layer, rows.stored_k, rows.stored_v))
    return outputs


class Oracle:
    """Remembers every token of every sequence and computes what an executor should give.

    Of plans of one lane per sequence, whose rows are all stored.
    """

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
            rows = slice(row, row + span.num_stored)
            row += span.num_stored
            known = self.tokens.setdefault(
                span.sequence, [(new.k[:0], new.v[:0]) for new in layers]
            )
            for index, (spec, sinks, new) in enumerate(
                zip(self.specs, self.sinks, layers, strict=True)
            ):
                k = torch.cat([known[index][0][: span.context_tokens], new.k[rows]])
                v = torch.cat([known[index][1][: span.context_tokens], new.v[rows]])
                known[index] = (k, v)
                if span.num_attending:
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


def span_of(
    sequence: int,
    num_rows: int,
    context_tokens: int,
    attends: bool = True,
    units: tuple[int, int] = (0, 1),
) -> ExecutorSpan:
    """Rows that are stored, and attend if said so, with all that came before them."""
    return ExecutorSpan(
        sequence, *units, context_tokens, num_rows if attends else 0, num_rows, context_tokens
    )


def plan_of(
    *spans: tuple[int, int, int] | tuple[int, int, int, bool],
    step: int = 1,
    releases: tuple[int, ...] = (),
    units: tuple[int, int] = (0, 1),
) -> ExecutorPlan:
    """A plan from (sequence, num_rows, context_tokens[, attends = True])."""
    return ExecutorPlan(
        step=step,
        micro_batch=0,
        spans=tuple(span_of(*span, units=units) for span in spans),
        releases=releases,
    )
