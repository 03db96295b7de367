"""Which micro-batch a sequence runs in: even numbers of decode rows and cached tokens.

Rows set how long a micro-batch's slices take, cached tokens how long its attention does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lamina.sched.sequence import Sequence


def rebalance(
    running: Iterable[Sequence], depth: int, may_move: Callable[[Sequence, int], bool]
) -> None:
    """Move sequences out of micro-batches that have more than their fair share of decode rows, or
    are not in use any more.

    Args:
        depth: micro-batches in use.
        may_move: whether a sequence may move to another micro-batch now.
    """
    decoding: list[list[Sequence]] = [[] for _ in range(depth)]
    for sequence in running:
        if sequence.micro_batch >= depth:
            targets = [m for m in range(depth) if may_move(sequence, m)]
            if not targets:
                continue
            sequence.micro_batch = min(targets, key=lambda m: (len(decoding[m]), m))
        if not sequence.prefilling:
            decoding[sequence.micro_batch].append(sequence)
    sizes = [len(group) for group in decoding]
    if max(sizes) - min(sizes) < 2:
        return
    tokens = [sum(s.num_tokens for s in group) for group in decoding]
    while True:
        most = max(range(depth), key=lambda m: (len(decoding[m]), tokens[m]))
        least = min(range(depth), key=lambda m: (len(decoding[m]), tokens[m]))
        if len(decoding[most]) - len(decoding[least]) < 2:
            return
        movable = [s for s in decoding[most] if may_move(s, least)]
        if not movable:
            return
        half = (tokens[most] - tokens[least]) / 2
        sequence = min(movable, key=lambda s: abs(s.num_tokens - half))
        sequence.micro_batch = least
        decoding[most].remove(sequence)
        decoding[least].append(sequence)
        tokens[most] -= sequence.num_tokens
        tokens[least] += sequence.num_tokens


def best_for_newcomer(
    running: Iterable[Sequence], depth: int, num_rows: int, max_num_rows: int, *, asking: int
) -> int | None:
    """The micro-batch where a prompt of `num_rows` rows disturbs the fewest decode rows; then one
    whose next step can take it whole, then that with the fewest cached tokens.

    Args:
        max_num_rows: most rows of one step.
        asking: is preferred among equals.

    Returns:
        None if every micro-batch has prompts enough to fill its next step.
    """
    num_decoding, tokens, prompt_rows = [0] * depth, [0] * depth, [0] * depth
    for sequence in running:
        micro_batch = sequence.micro_batch
        if micro_batch >= depth:
            continue
        if sequence.prompt_rows_left:
            prompt_rows[micro_batch] += sequence.prompt_rows_left
        else:
            num_decoding[micro_batch] += 1
            tokens[micro_batch] += sequence.num_tokens
    room = [max_num_rows - num_decoding[m] - prompt_rows[m] for m in range(depth)]
    return min(
        (m for m in range(depth) if room[m] > 0),
        key=lambda m: (num_decoding[m], room[m] < num_rows, tokens[m], m != asking, m),
        default=None,
    )
