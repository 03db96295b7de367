"""Which mailboxes a link has, and how large they are. Pure functions, no torch.

    engine        --PLAN---->  executor      ExecutorPlan, msgpack; numbered 1, 2, 3, ... per link
    model worker  --Q------->  executor      q    of the rows that attend there
    model worker  --KV------>  executor      k, v of the rows that are stored there
    executor      --OUT----->  model worker  out  of the rows that attend there
    executor      --REPORT-->  engine        when each layer of a step was served

`ExecutorPlan` says in which order the payloads' rows and heads come. Q, KV and OUT exist once per
micro-batch in flight and are numbered by `message_number`. REPORT exists once per *channel*
(micro-batch and tensor-parallel rank, `channel_of`) and is numbered by the step. Where engine and
model worker are one process, one link has all of them; otherwise the engine's link has PLAN and
REPORT, the others have Q, KV and OUT.

A channel without rows in a step has no messages in it; without rows that attend there is no Q and
OUT, without rows that are stored no KV. An executor posts no report while two of the channel's are
unread. Over tcp it cannot know: there the engine sees to it, as it looks for the reports of every
step before it posts the micro-batch's next plan.

Ranks in processes of their own (`workers/rank.py`) have two more kinds of links:

    engine        --STEP---->  rank          plan and inputs of a step, msgpack
    rank          --RESULT-->  engine        its times, its local executor's, and the logits
    rank          --CONTEXT->  next replica  what the next slice needs of those before it
    rank          --OUT----->  next replica  of the rank's local executor
    first rank    --TURN---->  others        of its replica: the micro-batch whose slice is next

Q, KV and OUT between ranks and executors are those above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lamina.attention.spec import AttentionSpec

PLAN_MAILBOX = 1
_MAILBOXES_PER_MICRO_BATCH = 4
PLAN_BYTES_PER_SPAN = 96
PLAN_BASE_BYTES = 4096
REPORT_BYTES_PER_LAYER = 32
"""Four float64, seconds of the executor's monotonic clock: attention over cached tokens began (q
was there) and ended, the rest began (k and v were there) and ended (the output was posted)."""


def rank_of(unit: int, units: int, num_ranks: int) -> int:
    """The tensor-parallel rank that has a head unit, of `units` in all."""
    return unit * num_ranks // units


def channel_of(micro_batch: int, rank: int, num_ranks: int) -> int:
    """Number of a channel; with one rank it is that of the micro-batch."""
    return micro_batch * num_ranks + rank


class StepMailboxes(NamedTuple):
    """Numbers and capacities in bytes of the mailboxes of one micro-batch, or channel."""

    q: int
    kv: int
    out: int
    report: int
    q_bytes: int
    kv_bytes: int
    out_bytes: int
    report_bytes: int


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
    """The mailboxes of every micro-batch; for the REPORTs of several ranks, of every channel.

    Args:
        specs: every layer's spec, with all heads that the model worker has (any of them may be
            placed on any executor).
        itemsize: bytes per element of q, k, v and out.
        max_rows: most rows of one step.
    """
    q_bytes = max_rows * itemsize * max(s.num_query_heads * s.head_dim_k for s in specs)
    kv_bytes = max_rows * itemsize * max(s.kv_elements_per_token() for s in specs)
    # Room for a partial output: float32, and an LSE per head.
    out_bytes = max_rows * 4 * max(s.num_query_heads * (s.head_dim_v + 1) for s in specs)
    report_bytes = REPORT_BYTES_PER_LAYER * len(specs)
    return [
        StepMailboxes(
            first, first + 1, first + 2, first + 3, q_bytes, kv_bytes, out_bytes, report_bytes
        )
        for first in (
            PLAN_MAILBOX + 1 + _MAILBOXES_PER_MICRO_BATCH * m for m in range(num_micro_batches)
        )
    ]


STEP_MAILBOX = 1
TURN_MAILBOX = 1
"""Numbered 1, 2, 3, ...; a micro-batch's number."""
TURN_BYTES = 8
_BYTES_PER_SHARE = 32
_BYTES_PER_ROW = 24
"""Token, position and logit row, int64."""
_STEP_ARRAYS_BYTES = 64


def step_mailbox_bytes(max_rows: int, max_spans: int, max_shares: int) -> int:
    """Capacity of STEP, numbered 1, 2, 3, ... per link.

    Args:
        max_shares: most shares of all spans of a step, in `attend_on` and `store_on` together.
    """
    return (
        plan_mailbox_bytes(max_spans)
        + _STEP_ARRAYS_BYTES
        + _BYTES_PER_ROW * max_rows
        + _BYTES_PER_SHARE * max_shares
    )


def result_mailbox(micro_batch: int) -> int:
    """RESULT of a micro-batch, numbered by the step."""
    return STEP_MAILBOX + 1 + micro_batch


def context_mailbox(micro_batch: int, num_micro_batches: int) -> int:
    """CONTEXT of a micro-batch, numbered by step and slice; on a ring's link, beside OUT."""
    return PLAN_MAILBOX + 1 + _MAILBOXES_PER_MICRO_BATCH * num_micro_batches + micro_batch


def context_number(step: int, slice_index: int, num_slices: int) -> int:
    """Number of the context that a slice needs."""
    return step * num_slices + slice_index
