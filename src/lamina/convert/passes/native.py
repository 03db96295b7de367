"""One call of native code: a sequence of operations on rows, and what it takes and returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from lamina._native import BoundDenseProgram, DenseProgram, DenseWorkspace, PackedLinear


class LinearWeights(NamedTuple):
    """A linear's weights as indices of the program's arguments."""

    weight: int
    bias: int | None
    is_transposed: bool


class OutputMemory(NamedTuple):
    """How one result is made: memory of its own, or a view of an earlier result's memory."""

    leading: tuple[int, ...]
    """Sizes before the rows."""
    trailing: tuple[int, ...]
    """Sizes after the rows; the tensor is contiguous."""


class OutputView(NamedTuple):
    """A result that is a strided view of the memory of result `source`."""

    source: int
    sizes: tuple[int | None, ...]
    """None stands for the number of rows."""
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Region:
    """Operations that run as one native call, before weights are bound to them."""

    program: DenseProgram
    row_input: tuple[int, int]
    """Which input, and which of its dimensions, tells the number of rows."""
    dtype: torch.dtype
    outputs: tuple[OutputMemory, ...]
    """New tensors, in the order of the program's arguments after the inputs."""
    views: tuple[OutputView, ...]
    linears: tuple[LinearWeights, ...]
    vectors: tuple[int, ...]
    """Norm weights and biases as indices of the program's arguments."""
    num_ops: int = field(default=0)

    def bind(
        self,
        workspace: DenseWorkspace,
        linears: Sequence[PackedLinear],
        vectors: Sequence[torch.Tensor],
    ) -> BoundRegion:
        """The region with one stage's weights."""
        values = [v.detach().float().flatten().tolist() for v in vectors]
        bound = BoundDenseProgram(self.program, workspace, list(linears), values)
        return BoundRegion(self, bound)


class BoundRegion:
    """A function of row tensors. It blocks while the workspace's threads compute."""

    __slots__ = ("_dtype", "_outputs", "_row_dim", "_row_input", "_run", "_views", "region")

    def __init__(self, region: Region, bound: BoundDenseProgram) -> None:
        self.region = region
        self._run = bound.run
        self._row_input, self._row_dim = region.row_input
        self._dtype = region.dtype
        self._outputs = region.outputs
        self._views = region.views

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """`region.outputs` and then `region.views`, new tensors that the caller owns."""
        num_rows = inputs[self._row_input].shape[self._row_dim]
        inputs = tuple([x if x.is_contiguous() else x.contiguous() for x in inputs])
        results = [
            torch.empty((*leading, num_rows, *trailing), dtype=self._dtype)
            for leading, trailing in self._outputs
        ]
        self._run(num_rows, [x.data_ptr() for x in (*inputs, *results)])
        for source, sizes, strides, offset in self._views:
            shape = [num_rows if size is None else size for size in sizes]
            results.append(results[source].as_strided(shape, strides, offset))
        return results
