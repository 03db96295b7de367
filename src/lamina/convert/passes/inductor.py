"""Programs compiled by Inductor: native packed linears, and everything else generated.

torch.compile sees one program per distinct structure, whatever the number of layers. A linear's
packed weights are an opaque input: a handle tensor, so that all stages share the compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from lamina._native import BoundDenseProgram, DenseProgram, DenseWorkspace, PackedLinear
from lamina.convert.passes import ops
from lamina.convert.passes.native import LinearWeights

_ELEMENTS = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_LINEARS: list[BoundDenseProgram] = []
"""What handles stand for: a handle is an index. Bound linears live as long as the process."""


def linear_handle(packed: PackedLinear, dtype: torch.dtype, workspace: DenseWorkspace) -> Tensor:
    """An int64 tensor that stands for packed weights in calls of `packed_linear`."""
    inputs, outputs = packed.num_inputs, packed.num_outputs
    program = DenseProgram(_ELEMENTS[dtype], 2)
    program.linear((0, 0, inputs, inputs, 1, inputs), 0, (1, 0, outputs, outputs, 1, outputs))
    _LINEARS.append(BoundDenseProgram(program, workspace, [packed], []))
    return torch.tensor(len(_LINEARS) - 1)


@torch.library.custom_op("lamina::packed_linear", mutates_args=())
def packed_linear(x: Tensor, handle: Tensor, num_outputs: int) -> Tensor:
    """x @ W^T + bias.

    Args:
        x: [..., inputs] bfloat16 or float32.
        handle: from `linear_handle`.

    Returns:
        [..., num_outputs] in x's dtype.
    """
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], num_outputs)
    num_rows = x.numel() // x.shape[-1]
    _LINEARS[int(handle)].run(num_rows, [x.data_ptr(), out.data_ptr()])
    return out


@packed_linear.register_fake
def _packed_linear_fake(x: Tensor, handle: Tensor, num_outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], num_outputs)


def use_handles(graph: fx.Graph, weights: frozenset[fx.Node]) -> dict[fx.Node, LinearWeights]:
    """Replace linears over bound weights by `packed_linear`, in place.

    Returns:
        A new placeholder per linear and what its handle stands for.
    """
    arguments = [n for n in graph.nodes if n.op == "placeholder"]
    number = {node: i for i, node in enumerate(arguments)}
    last = arguments[-1]
    handles: dict[fx.Node, LinearWeights] = {}
    for node in list(graph.nodes):
        if node.target is not ops.linear or node.meta["val"].dtype not in _ELEMENTS:
            continue
        arguments_of: Any = node.args
        x, weight, bias, residual, is_transposed = arguments_of
        if weight not in weights or (bias is not None and bias not in weights):
            continue
        with graph.inserting_after(last):
            last = graph.placeholder(f"handle_{len(handles)}")
        handles[last] = LinearWeights(
            number[weight], None if bias is None else number[bias], is_transposed
        )
        num_outputs = weight.meta["val"].shape[1 if is_transposed else 0]
        with graph.inserting_before(node):
            made = graph.call_function(
                torch.ops.lamina.packed_linear.default, (x, last, num_outputs)
            )
            if residual is not None:
                made = graph.call_function(torch.ops.aten.add.Tensor, (residual, made))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    return handles


def compiled(module: fx.GraphModule) -> Callable[..., tuple[Any, ...]]:
    """The module compiled at its first call; once for one row and once for any number of rows."""
    run: Callable[..., tuple[Any, ...]] = torch.compile(module, dynamic=True, fullgraph=True)
    return run
