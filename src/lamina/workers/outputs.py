"""The attention outputs of one step at the model worker, layer by layer: [T, Hq, Dv]."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lamina import _native
from lamina.attention.spec import AttentionSpec
from lamina.types import LOCAL
from lamina.workers.routes import Route


class Outputs:
    """Waits for the executors' outputs and puts them together.

    Where one executor computes everything, its output is used where it lies; otherwise outputs are
    copied to their rows and heads, and those over a part of the tokens are merged.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        routes: Sequence[Route],
        merger: _native.ShareMerger,
        *,
        micro_batch: int,
        num_rows: int,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            specs: every layer, with all heads that this model worker has.
            routes: those of the step that attend, the local executor's last.
        """
        self._shapes = [
            torch.Size((num_rows, spec.num_query_heads, spec.head_dim_v)) for spec in specs
        ]
        self._remote = [route for route in routes if route.executor != LOCAL]
        self._whole = routes[0] if len(routes) == 1 and routes[0].attends_whole else None
        # The local executor computes when it is waited for; the others already run.
        self._copied = [route for route in reversed(routes) if not route.is_partial]
        partial = [route.native for route in reversed(routes) if route.is_partial]
        self._merger = merger if partial else None
        if partial:
            merger.begin(micro_batch, num_rows, partial)
        self._micro_batch = micro_batch
        self._dtype = dtype
        self._buffers: dict[tuple[int, torch.Size], torch.Tensor] = {}

    def are_here(self, number: int) -> bool:
        """Whether `wait` would not wait for another process. Never blocks."""
        return all(route.has_out(number) for route in self._remote)

    def missing(self, number: int) -> list[tuple[_native.Inbox, int]]:
        """The messages of other processes that `wait` would wait for. Never blocks."""
        return [r.awaited_out(number) for r in self._remote if not r.has_out(number)]

    def wait(self, layer: int, number: int, deadline: float) -> torch.Tensor:
        """The layer's output; overwritten when that of the second layer after it is waited for."""
        shape = self._shapes[layer]
        if self._whole is not None:
            return self._whole.view_out(layer, number, shape, deadline)
        key = (layer % 2, shape)
        out = self._buffers.get(key)
        if out is None:
            out = self._buffers[key] = torch.empty(shape, dtype=self._dtype)
        for route in self._copied:
            route.collect_out(layer, number, out, deadline)
        if self._merger is not None:
            self._merger.collect(self._micro_batch, layer, number, out.data_ptr(), deadline)
        return out
