"""`lamina convert`: cut a model at its attention ops and say what that gives."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # torch takes seconds to import, which no other command should wait for
    from lamina.convert.explain import Explanation, LayerSummary, StageSummary


def convert(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint.")],
    explain: Annotated[
        bool, typer.Option("--explain", help="Show every cut; needs only config.json.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the explanation as JSON.")] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Computing and storage type; auto: the checkpoint's."),
    ] = "auto",
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="Show rank 0 of so many (with --explain or --json).")
    ] = 1,
) -> None:
    """Cut a model at its attention ops, check that its weights load, and describe the result."""
    from lamina.convert import TensorParallel, convert_structure
    from lamina.convert import convert as convert_model

    if explain or json:
        parallel = TensorParallel(rank=0, size=tensor_parallel_size)
        explanation = convert_structure(model, dtype=dtype, parallel=parallel).explain()
        if json:
            print(msgspec.json.encode(explanation).decode())
        else:
            Console().print(_table(explanation))
        return
    start_s = time.perf_counter()
    sliced = convert_model(model, dtype=dtype, progress=True)
    took_s = time.perf_counter() - start_s
    explanation = sliced.explain()
    print(
        f"{explanation.model}: {explanation.architecture} in {explanation.dtype}, "
        f"{explanation.num_layers + 1} slices around {explanation.num_layers} attention ops, "
        f"{explanation.num_programs} programs, "
        f"{_bytes(explanation.hop_bytes_per_token)} per token to and from attention, "
        f"converted in {took_s:.1f} s"
    )


def _table(explanation: Explanation) -> Table:
    table = Table(
        title=f"{explanation.model}: {explanation.architecture}, {explanation.dtype}, "
        f"{explanation.num_layers} attention ops, {explanation.num_programs} programs",
        caption="Bytes are per token. q, then k and v are sent; the deferred part runs while "
        f"attention is away. Once per step: {_stage(explanation.once_per_step)}."
        + _rank(explanation),
        show_lines=True,
    )
    for column in ("Layer", "Before q", "Before k, v", "Deferred", "Carried over the cut"):
        table.add_column(column, overflow="fold")
    table.add_column("Sent and received", no_wrap=True)
    for layers, layer in _equal_layers(explanation.layers):
        table.add_row(
            layers + (f"\nwindow {layer.window}" if layer.window else ""),
            _stage(layer.q),
            _stage(layer.kv),
            _stage(layer.deferred),
            "\n".join(f"{c.name}: {_bytes(c.bytes_per_token)}" for c in layer.carried),
            _hop((layer,)),
        )
    table.add_row("logits", _stage(explanation.last))
    table.add_row(
        "all",
        "",
        "",
        "",
        _bytes(explanation.carried_bytes_per_token),
        _hop(explanation.layers),
    )
    return table


def _rank(explanation: Explanation) -> str:
    if (parallel := explanation.tensor_parallel) is None:
        return ""
    whole = (
        f", whole on every rank: {', '.join(parallel.replicated)}" if parallel.replicated else ""
    )
    return (
        f" Rank {parallel.rank} of {parallel.size} has {_bytes(parallel.sharded_bytes)} of weights "
        f"in part and {_bytes(parallel.replicated_bytes)} whole{whole}; "
        f"{_bytes(parallel.all_reduce_bytes_per_token)} are all-reduced per token."
    )


def _hop(layers: Sequence[LayerSummary]) -> str:
    """Bytes of q, k, v and output, a line each, over all of `layers`."""
    return "\n".join(
        f"{name} {_bytes(sum(getattr(layer, f'{name}_bytes_per_token') for layer in layers))}"
        for name in ("q", "k", "v", "out")
    )


def _equal_layers(layers: tuple[LayerSummary, ...]) -> Iterator[tuple[str, LayerSummary]]:
    """Runs of layers that differ in nothing but their number, as ("3-27", layer 3)."""
    for _, run in groupby(layers, key=_shape_of):
        members = list(run)
        first, last = members[0].layer, members[-1].layer
        yield (str(first) if first == last else f"{first}-{last}"), members[0]


def _shape_of(layer: LayerSummary) -> str:
    """The layer's description with module numbers relative to its own."""
    text = repr(msgspec.structs.replace(layer, layer=0))
    return re.sub(r"\.(\d+)\b", lambda m: f".{int(m.group(1)) - layer.layer}", text)


def _stage(stage: StageSummary) -> str:
    if stage.num_ops == 0:
        return "-"
    inner = [n for n in stage.modules if not any(o.startswith(f"{n}.") for o in stage.modules)]
    # The row names the layer; what precedes its number is the same everywhere.
    short = dict.fromkeys(re.sub(r"^.*?\.\d+\.|^model\.", "", name) for name in inner)
    collectives = "".join(f"\n{c.kind}: {_bytes(c.bytes_per_token)}" for c in stage.collectives)
    return f"{stage.num_ops} ops: {', '.join(short)}{collectives}"


def _bytes(count: int) -> str:
    return f"{count} B" if count < 10 * 1024 else f"{count / 1024:.0f} KiB"
