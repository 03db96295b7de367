"""Puts a rewritten graph back into an order of computing."""

from __future__ import annotations

from torch import fx


def sorted_copy(graph: fx.Graph, optional: frozenset[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """The graph without what nobody uses, in an order of computing.

    Args:
        optional: placeholders that are left out when they are not used.

    Returns:
        The copy and those of the optional placeholders that it kept, in order.
    """
    output = next(n for n in graph.nodes if n.op == "output")
    order: dict[fx.Node, None] = {}
    stack: list[tuple[fx.Node, bool]] = [(output, False)]
    while stack:
        node, is_ready = stack.pop()
        if is_ready:
            order.setdefault(node)
        elif node not in order:
            stack.append((node, True))
            stack.extend((n, False) for n in reversed(node.all_input_nodes) if n not in order)
    arguments = [n for n in graph.nodes if n.op == "placeholder"]
    kept = [n for n in arguments if n in order or n not in optional]
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in (*kept, *(n for n in order if n.op != "placeholder")):
        copies[node] = copy.node_copy(node, copies.__getitem__)
    copy.lint()
    return copy, [n for n in kept if n in optional]
