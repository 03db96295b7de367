"""The parts of model ranks that need no process of their own."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lamina import _native
from lamina.errors import ProtocolMismatch
from lamina.sched.rotation import Turns
from lamina.transport.inproc import inproc_pair
from lamina.transport.native import NativeLink
from lamina.transport.topology import STEP_MAILBOX, step_mailbox_bytes
from lamina.types import LOCAL, Share, Span, StepPlan
from lamina.workers.model import StepInputs
from lamina.workers.rank_messages import (
    RankResult,
    pack_step,
    result_bytes,
    result_parts,
    unpack_result,
    unpack_step,
)
from lamina.workers.rank_order import FollowOrder, LeadOrder
from lamina.workers.steptimes import NUM_TIMES


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_steps_round_trip() -> None:
    plan = StepPlan(7, 1, (Span(3, 2, 5, (Share(LOCAL, 0, 6),), (Share(1, 0, 6),)),), ((1, 9),))
    sent = StepInputs(ids(11, 12), ids(5, 6), ids(1))
    got_plan, got = unpack_step(pack_step(plan, sent), "engine")
    assert got_plan == plan
    assert all(torch.equal(a, b) for a, b in zip(got, sent, strict=True))
    releases = StepPlan(8, 0, (), ((LOCAL, 3),))
    got_plan, got = unpack_step(pack_step(releases, StepInputs(ids(), ids(), ids())), "engine")
    assert got_plan == releases
    assert [len(x) for x in got] == [0, 0, 0]


def test_an_unreadable_step_is_a_mismatch() -> None:
    with pytest.raises(ProtocolMismatch, match="engine: unreadable step"):
        unpack_step(torch.tensor([0xC1, 1, 2], dtype=torch.uint8), "engine")


def test_the_largest_steps_fit() -> None:
    """Every sequence with as many shares as there may be, numbers as long as they get."""
    num_spans, num_shares = 8, 13
    big = 2**40
    shares = tuple(Share(15, u, u + 1, big, big) for u in range(num_shares))
    spans = tuple(Span(big + i, 4, big, shares, shares) for i in range(num_spans))
    releases = tuple((15, big + i) for i in range(num_spans))
    rows = torch.full((4 * num_spans,), big)
    message = pack_step(StepPlan(big, 15, spans, releases), StepInputs(rows, rows, rows))
    assert len(message) <= step_mailbox_bytes(len(rows), num_spans, 2 * num_spans * num_shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_logit_rows", [0, 2, None])
def test_results_round_trip(dtype: torch.dtype, num_logit_rows: int | None) -> None:
    times = array("d", [float(i) for i in range(NUM_TIMES * 4)])
    report = np.arange(12.0).reshape(3, 4)
    logits = None if num_logit_rows is None else torch.randn(num_logit_rows, 5).to(dtype)
    parts = result_parts(RankResult(times, report, logits))
    payload = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])
    assert len(payload) <= result_bytes(3, 2 * 5 * dtype.itemsize)
    got = unpack_result(payload, 3, (num_logit_rows or 0, 5), dtype)
    assert got.times == times
    assert np.array_equal(got.report, report)
    if num_logit_rows:
        assert logits is not None
        assert got.logits is not None
        assert torch.equal(got.logits, logits)
    else:
        assert got.logits is None


class Worker:
    """What an order sees of a model worker."""

    def __init__(self, num_micro_batches: int) -> None:
        self.turns = Turns(num_micro_batches)
        self.ready: set[int] = set()

    def is_ready(self, micro_batch: int) -> bool:
        return micro_batch in self.ready

    def missing(self, micro_batch: int) -> list[tuple[_native.Inbox, int]]:
        return []


@pytest.fixture
def pair() -> Callable[[], tuple[NativeLink, NativeLink]]:
    return lambda: inproc_pair("leader", "follower")


def test_followers_run_slices_in_the_leaders_order(
    pair: Callable[[], tuple[NativeLink, NativeLink]],
) -> None:
    leading, following = pair()
    lead, follow = LeadOrder([leading], 1.0), FollowOrder(following)
    leader, follower = Worker(3), Worker(3)
    for worker in (leader, follower):
        for micro_batch in range(3):
            worker.turns.begin(micro_batch, 4)
    follower.ready = {0, 1, 2}
    assert follow.next(follower) is None, "nothing runs that the leader has not chosen"  # type: ignore[arg-type]
    assert lead.next(leader) is None  # type: ignore[arg-type]
    leader.ready = {2}
    assert lead.next(leader) == 2  # type: ignore[arg-type]
    leader.turns.ran(2)
    follower.ready = {0, 1}
    assert follow.next(follower) is None, "its own inputs are not here yet"  # type: ignore[arg-type]
    follower.ready = {0, 1, 2}
    assert follow.next(follower) == 2  # type: ignore[arg-type]
    assert follow.next(follower) is None  # type: ignore[arg-type]


def test_a_turn_may_come_ahead_of_its_step(
    pair: Callable[[], tuple[NativeLink, NativeLink]],
) -> None:
    leading, following = pair()
    lead, follow = LeadOrder([leading], 1.0), FollowOrder(following)
    leader, follower = Worker(1), Worker(1)
    leader.turns.begin(0, 2)
    leader.ready = follower.ready = {0}
    assert lead.next(leader) == 0  # type: ignore[arg-type]
    assert follow.next(follower) is None  # type: ignore[arg-type]
    assert follow.awaited(follower) == [], "the step is waited for by whoever takes steps"  # type: ignore[arg-type]
    follower.turns.begin(0, 2)
    assert follow.next(follower) == 0  # type: ignore[arg-type]


def test_mailboxes_of_steps_exist_on_a_link(
    pair: Callable[[], tuple[NativeLink, NativeLink]],
) -> None:
    ours, theirs = pair()
    capacity = step_mailbox_bytes(16, 4, 8)
    inbox = theirs.inbox(STEP_MAILBOX, capacity)
    outbox = ours.outbox(STEP_MAILBOX, capacity)
    step = pack_step(StepPlan(1, 0, ()), StepInputs(ids(), ids(), ids()))
    outbox.post(1, step, deadline=time.monotonic() + 1)
    assert unpack_step(inbox.wait(1, time.monotonic() + 1), "engine")[0] == StepPlan(1, 0, ())
