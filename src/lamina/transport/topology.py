"""Which mailboxes a link has, and how large they are. Pure functions, no torch.

Between the model worker and each attention executor:

    model worker  --PLAN-->  executor     ExecutorPlan, msgpack; numbered 1, 2, 3, ... per link
    model worker  --Q----->  executor     q    [attending rows, query heads, head_dim_k]
    model worker  --KV---->  executor     k, v [all rows, KV heads, head_dim_k], [.., head_dim_v]
    executor      --OUT--->  model worker out  [attending rows, query heads, head_dim_v]

Heads are those of the executor's share. Q, KV and OUT are numbered by `message_number`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from lamina.attention.spec import AttentionSpec


class MailboxId(IntEnum):
    """Mailboxes of a link."""

    PLAN = 1
    Q = 2
    KV = 3
    OUT = 4


PLAN_BYTES_PER_SPAN = 64
PLAN_BASE_BYTES = 4096


def message_number(step: int, layer: int, num_layers: int) -> int:
    """Number of a layer's Q, KV and OUT messages in a step; both sides know it."""
    return step * num_layers + layer


def mailbox_capacity_bytes(
    specs: Sequence[AttentionSpec], itemsize: int, max_rows: int, max_spans: int
) -> dict[MailboxId, int]:
    """Capacity of each mailbox for the executor whose share `specs` describes.

    Args:
        specs: every layer's spec, already cut to the executor's heads.
        itemsize: bytes per element of q, k, v and out.
        max_rows: most rows of one step.
        max_spans: most sequences of one step, and most releases.
    """
    return {
        MailboxId.PLAN: PLAN_BASE_BYTES + 2 * PLAN_BYTES_PER_SPAN * max_spans,
        MailboxId.Q: max_rows * itemsize * max(s.num_query_heads * s.head_dim_k for s in specs),
        MailboxId.KV: max_rows * itemsize * max(s.kv_elements_per_token() for s in specs),
        MailboxId.OUT: max_rows * itemsize * max(s.num_query_heads * s.head_dim_v for s in specs),
    }
