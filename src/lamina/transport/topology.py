"""Which mailboxes a link has, and how large they are. Pure functions, no torch.

Between the model worker and each attention executor:

    model worker  --PLAN-->  executor     ExecutorPlan, msgpack; numbered 1, 2, 3, ... per link
    model worker  --Q----->  executor     q    [attending rows, query heads, head_dim_k]
    model worker  --KV---->  executor     k, v [all rows, KV heads, head_dim_k], [.., head_dim_v]
    executor      --OUT--->  model worker out  [attending rows, query heads, head_dim_v]

Heads are those of the executor's share. Q, KV and OUT exist once per micro-batch in flight and are
numbered by `message_number`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lamina.attention.spec import AttentionSpec

PLAN_MAILBOX = 1
_MAILBOXES_PER_MICRO_BATCH = 3
PLAN_BYTES_PER_SPAN = 64
PLAN_BASE_BYTES = 4096


class StepMailboxes(NamedTuple):
    """Numbers and capacities in bytes of the mailboxes of one micro-batch."""

    q: int
    kv: int
    out: int
    q_bytes: int
    kv_bytes: int
    out_bytes: int


def message_number(step: int, layer: int, num_layers: int) -> int:
    """Number of a layer's Q, KV and OUT messages in a step; both sides know it."""
    return step * num_layers + layer


def plan_mailbox_bytes(max_spans: int) -> int:
    """Capacity of the PLAN mailbox.

    Args:
        max_spans: most sequences of one step, and most releases.
    """
    return PLAN_BASE_BYTES + 2 * PLAN_BYTES_PER_SPAN * max_spans


def step_mailboxes(
    specs: Sequence[AttentionSpec], itemsize: int, max_rows: int, num_micro_batches: int = 1
) -> list[StepMailboxes]:
    """The mailboxes of every micro-batch for the executor whose share `specs` describes.

    Args:
        specs: every layer's spec, already cut to the executor's heads.
        itemsize: bytes per element of q, k, v and out.
        max_rows: most rows of one step.
    """
    q_bytes = max_rows * itemsize * max(s.num_query_heads * s.head_dim_k for s in specs)
    kv_bytes = max_rows * itemsize * max(s.kv_elements_per_token() for s in specs)
    out_bytes = max_rows * itemsize * max(s.num_query_heads * s.head_dim_v for s in specs)
    return [
        StepMailboxes(first, first + 1, first + 2, q_bytes, kv_bytes, out_bytes)
        for first in (
            PLAN_MAILBOX + 1 + _MAILBOXES_PER_MICRO_BATCH * m for m in range(num_micro_batches)
        )
    ]
