"""The model worker's end of each link to an attention executor.

Which rows and heads go where is resolved once per step (`Route`); per layer, native code packs them
straight from the slices' tensors into mailbox slots and puts outputs at their place.

Shapes: T rows of the step; Hq, Hkv heads of the layer that this model worker has.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from lamina import _native
from lamina.attention.partition import head_units
from lamina.attention.spec import AttentionSpec
from lamina.transport.native import NativeLink
from lamina.transport.topology import step_mailboxes
from lamina.types import ExecutorPlan, StepPlan


class ExecutorEnd:
    """The model worker's end of the link to one attention executor."""

    def __init__(
        self,
        executor: int,
        link: NativeLink,
        specs: Sequence[AttentionSpec],
        *,
        dtype: torch.dtype,
        max_rows: int,
        page_units: int,
        num_micro_batches: int = 1,
        first_unit: int = 0,
        num_units: int | None = None,
        out_link: NativeLink | None = None,
    ) -> None:
        """
        Args:
            specs: every layer, with all heads that this model worker has.
            dtype: of q, k, v and the output.
            max_rows: most rows of one step.
            page_units: head units of each of the executor's lanes.
            first_unit, num_units: which of the model's head units this model worker has; None:
                all there are.
            out_link: where outputs come from, if not from `link`.
        """
        self.executor = executor
        self.link = link
        self.dtype = dtype
        self.first_unit = first_unit
        self.num_units = head_units(specs) if num_units is None else num_units
        self.native = _native.ExecutorEnd(
            link.native,
            (out_link or link).native,
            layer_units(specs, self.num_units, dtype),
            self.num_units,
            page_units,
            step_mailboxes(specs, dtype.itemsize, max_rows, num_micro_batches),
        )


class Route:
    """What goes to and comes from one executor in each layer of one step."""

    def __init__(
        self, end: ExecutorEnd, part: ExecutorPlan, first_rows: dict[int, int], num_rows: int
    ) -> None:
        """
        Args:
            part: the executor's part of the step's plan.
            first_rows: `first_rows` of that plan.
            num_rows: of the step.
        """
        attending: list[tuple[int, int, int, int]] = []
        stored: list[tuple[int, int, int, int]] = []
        first_unit, stop_unit = end.first_unit, end.first_unit + end.num_units
        for span in part.spans:
            start, stop = max(span.unit_start, first_unit), min(span.unit_stop, stop_unit)
            if start >= stop:
                continue
            row, unit, num_units = first_rows[span.sequence], start - first_unit, stop - start
            if span.num_attending:
                attending.append((row, span.num_attending, unit, num_units))
            if span.num_stored:
                # The share may begin in the middle of the rows.
                row += max(0, -span.first_position)
                stored.append((row, span.num_stored, unit, num_units))
        self.executor = end.executor
        self.native = end.native
        self.attends = bool(attending)
        self.stores = bool(stored)
        self.is_partial = part.is_partial
        self._micro_batch = part.micro_batch
        self._dtype = end.dtype
        self._views: dict[tuple[int, torch.Size], torch.Tensor] = {}
        end.native.begin(part.micro_batch, attending, stored, part.is_partial)
        self.attends_whole = not part.is_partial and end.native.attends_whole(
            part.micro_batch, num_rows
        )
        """All heads of all rows attend here: the output is that of the layer, as it lies."""

    def post_q(self, layer: int, number: int, q_THD: torch.Tensor, deadline: float) -> None:
        """Send what attends there of q [T, Hq, Dk], contiguous."""
        self.native.post_q(self._micro_batch, layer, number, q_THD.data_ptr(), deadline)

    def post_kv(
        self, layer: int, number: int, k_THD: torch.Tensor, v_THD: torch.Tensor, deadline: float
    ) -> None:
        """Send what is stored there of k [T, Hkv, Dk] and v [T, Hkv, Dv], contiguous."""
        self.native.post_kv(
            self._micro_batch, layer, number, k_THD.data_ptr(), v_THD.data_ptr(), deadline
        )

    def has_out(self, number: int) -> bool:
        """Whether the executor's output is here, or none will come. Never blocks."""
        return self.native.has_out(self._micro_batch, number)

    def awaited_out(self, number: int) -> tuple[_native.Inbox, int]:
        """The message that brings the executor's output."""
        return self.native.out_inbox(self._micro_batch), number

    def view_out(self, layer: int, number: int, shape: torch.Size, deadline: float) -> torch.Tensor:
        """The output of an executor with `attends_whole`, in the mailbox: valid until the next
        layer's."""
        address = self.native.wait_out(self._micro_batch, layer, number, deadline)
        view = self._views.get((address, shape))
        if view is None:
            memory = (ctypes.c_char * (shape.numel() * self._dtype.itemsize)).from_address(address)
            view = torch.frombuffer(memory, dtype=self._dtype).view(shape)
            self._views[address, shape] = view
        return view

    def collect_out(self, layer: int, number: int, out_THD: torch.Tensor, deadline: float) -> None:
        """Copy an output that is not partial to its rows and heads of the layer's [T, Hq, Dv]."""
        self.native.collect_out(self._micro_batch, layer, number, out_THD.data_ptr(), deadline)


def first_rows(plan: StepPlan) -> dict[int, int]:
    """The first row of every sequence's span."""
    rows: dict[int, int] = {}
    row = 0
    for span in plan.spans:
        rows[span.sequence] = row
        row += span.num_rows
    return rows


def layer_units(
    specs: Sequence[AttentionSpec], num_units: int, dtype: torch.dtype
) -> list[tuple[int, int, int, int, int, int]]:
    """Sizes of one head unit in each layer, as the native side wants them."""
    units = []
    for spec in specs:
        num_query, num_kv = spec.num_query_heads // num_units, spec.num_kv_heads // num_units
        units.append(
            (
                num_query * spec.head_dim_k * dtype.itemsize,
                num_kv * spec.head_dim_k * dtype.itemsize,
                num_kv * spec.head_dim_v * dtype.itemsize,
                num_query * spec.head_dim_v * dtype.itemsize,
                num_query,
                spec.head_dim_v,
            )
        )
    return units
