"""An executor's server over several micro-batches, replicas and ranks, driven by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import msgspec
import pytest
import torch

from contract.conftest import TRANSPORTS
from lamina.attention.executor import AttentionExecutor
from lamina.attention.merge import Partial, merge
from lamina.errors import DeadlineExceeded, PeerLost
from lamina.transport.native import NativeLink
from lamina.types import ExecutorPlan, ExecutorSpan
from support.attention import (
    Oracle,
    Rows,
    assert_outputs_match,
    make_sinks,
    make_spec,
    plan_of,
    span_of,
)
from support.serving import ModelSide, Serving, make_server, serving

SPECS = (
    make_spec(0, num_query_heads=8, num_kv_heads=4),
    make_spec(1, num_query_heads=8, num_kv_heads=4, window=5),
    make_spec(2, num_query_heads=8, num_kv_heads=8, softcap=2.0, head_dim_v=12),
    make_spec(3, num_query_heads=4, num_kv_heads=4, has_sinks=True),
    make_spec(4, num_query_heads=8, num_kv_heads=4),
)
UNITS = 4
KINDS = ("inproc", "shm", "tcp")
every_kind = pytest.mark.parametrize("kind", KINDS)


class Deployment:
    """A served executor and the other ends of its links."""

    def __init__(
        self, kinds: tuple[str, str], replicas: int, ranks: int, micro_batches: int, page_units: int
    ) -> None:
        """
        Args:
            kinds: of the plan link and of the tensor links; the plan link is for all if there is
                one replica and one rank.
        """
        torch.manual_seed(0)
        self.sinks = make_sinks(SPECS)
        self.executor = AttentionExecutor(
            SPECS,
            self.sinks,
            dtype=torch.float32,
            num_pages=256,
            page_tokens=4,
            units=UNITS,
            page_units=page_units,
            num_ranks=ranks,
        )
        self.plan_link = _pair(kinds[0])
        pairs = [[_pair(kinds[1]) for _ in range(ranks)] for _ in range(replicas)]
        self.tensor_links = pairs if replicas * ranks > 1 else []
        self.server = make_server(
            self.plan_link[1],
            self.executor,
            num_micro_batches=micro_batches,
            tensor_links=[[theirs for _, theirs in links] for links in self.tensor_links],
        )
        self.model = ModelSide(
            self.plan_link[0],
            SPECS,
            num_micro_batches=micro_batches,
            num_ranks=ranks,
            tensor_links=[[ours for ours, _ in links] for links in self.tensor_links],
            units=UNITS,
            page_units=page_units,
        )
        self.oracle = Oracle(SPECS, self.sinks)

    @property
    def links(self) -> list[NativeLink]:
        pairs = [self.plan_link, *(pair for links in self.tensor_links for pair in links)]
        return [link for pair in pairs for link in pair]

    def check(self, plan: ExecutorPlan, layers: list[Rows], outputs: list[torch.Tensor]) -> None:
        wanted = self.oracle.run_step(plan, layers)
        assert_outputs_match(outputs, wanted, SPECS, torch.float32)

    def run_step(self, plan: ExecutorPlan) -> None:
        """A whole step, its outputs compared with the oracle's."""
        layers = self.model.rows(plan)
        self.check(plan, layers, self.model.run_step(plan, layers))


def _pair(kind: str) -> tuple[NativeLink, NativeLink]:
    a, b = TRANSPORTS[kind]()
    assert isinstance(a, NativeLink)
    assert isinstance(b, NativeLink)
    return a, b


@contextmanager
def deployed(
    kinds: tuple[str, str] = ("inproc", "inproc"),
    replicas: int = 1,
    ranks: int = 1,
    micro_batches: int = 1,
    page_units: int = UNITS,
) -> Iterator[tuple[Deployment, Serving]]:
    deployment = Deployment(kinds, replicas, ranks, micro_batches, page_units)
    with ExitStack() as stack:
        worker = stack.enter_context(serving(deployment.server, *deployment.links))
        yield deployment, worker


def step_plan(
    step: int, *spans: tuple[int, int, int] | tuple[int, int, int, bool], micro_batch: int = 0
) -> ExecutorPlan:
    """As `plan_of`, with all head units."""
    all_units = (0, UNITS)
    return ExecutorPlan(step, micro_batch, tuple(span_of(*span, units=all_units) for span in spans))


@every_kind
@pytest.mark.parametrize("page_units", [1, 2, UNITS])
def test_lanes_of_any_size_over_one_link(kind: str, page_units: int) -> None:
    with deployed((kind, kind), page_units=page_units) as (deployment, _):
        deployment.run_step(step_plan(1, (1, 9, 0), (2, 3, 0, False)))
        deployment.run_step(step_plan(2, (2, 1, 3), (1, 1, 9)))
        deployment.run_step(step_plan(3, (1, 5, 10), (2, 6, 4)))
        assert deployment.executor.length(1, UNITS - page_units) == 15


@every_kind
def test_two_micro_batches_interleaved_on_one_link(kind: str) -> None:
    with deployed((kind, kind), micro_batches=2) as (deployment, _):
        model = deployment.model
        deployment.run_step(step_plan(1, (1, 9, 0)))
        deployment.run_step(step_plan(2, (2, 6, 0), micro_batch=1))
        a, b = step_plan(3, (1, 1, 9)), step_plan(4, (2, 2, 6), micro_batch=1)
        rows = {plan.step: model.rows(plan) for plan in (a, b)}
        outputs: dict[int, list[torch.Tensor]] = {3: [], 4: []}
        for plan in (a, b):
            model.post_plan(plan)
        for layer in range(len(SPECS)):
            # q of one between q and kv of the other; the outputs come in either order.
            model.post_q(a, layer, rows[3][layer])
            model.post_q(b, layer, rows[4][layer])
            model.post_kv(b, layer, rows[4][layer])
            outputs[4].append(model.wait_out(b, layer, rows[4][layer]))
            model.post_kv(a, layer, rows[3][layer])
            outputs[3].append(model.wait_out(a, layer, rows[3][layer]))
        for plan in (a, b):
            deployment.check(plan, rows[plan.step], outputs[plan.step])


@pytest.mark.parametrize(
    "kinds",
    [("inproc", "inproc"), ("shm", "shm"), ("tcp", "tcp"), ("shm", "tcp"), ("tcp", "shm")],
    ids="+".join,
)
@pytest.mark.parametrize(("replicas", "ranks"), [(2, 1), (1, 2), (2, 2), (3, 1)])
def test_layers_go_round_the_replicas_and_lanes_to_their_ranks(
    kinds: tuple[str, str], replicas: int, ranks: int
) -> None:
    with deployed(kinds, replicas, ranks, micro_batches=3, page_units=1) as (deployment, _):
        model = deployment.model
        plans = [step_plan(1 + m, (m, 5 + m, 0), (9 + m, 2, 0), micro_batch=m) for m in range(3)]
        for plan in plans:
            deployment.run_step(plan)
        steps = [step_plan(4 + m, (m, 1, 5 + m), (9 + m, 1, 2), micro_batch=m) for m in range(3)]
        rows = [model.rows(plan) for plan in steps]
        for plan in steps:
            model.post_plan(plan)
        outputs: list[list[torch.Tensor]] = [[] for _ in steps]
        for layer in range(len(SPECS)):
            for plan, mine, out in zip(steps, rows, outputs, strict=True):
                out.append(model.exchange(plan, layer, mine[layer]))
        for plan, mine, out in zip(steps, rows, outputs, strict=True):
            deployment.check(plan, mine, out)
            for rank in range(ranks):
                model.take_report(plan, rank)


def test_ranks_without_lanes_in_a_step_take_no_part() -> None:
    with deployed(ranks=2, page_units=1) as (deployment, worker):
        model = deployment.model
        plan = plan_of((1, 3, 0), units=(0, 1))
        model.run_step(plan, model.rows(plan))
        model.take_report(plan, rank=0)
        with pytest.raises(DeadlineExceeded):
            model.reports[1].wait(1, time.monotonic())
        plan = plan_of((1, 2, 3), units=(0, 1), step=2)
        model.run_step(plan, model.rows(plan))
        assert worker.error is None
        assert deployment.executor.length(1, 1) == 0


@every_kind
def test_partial_outputs_of_two_executors_merge_to_the_whole(kind: str) -> None:
    """Tokens 0 to 7 on one executor, the others on another; sinks count once."""
    with (
        deployed((kind, kind), page_units=2) as (first, _),
        deployed((kind, kind), page_units=1) as (second, _),
    ):
        oracle = first.oracle
        prompt = step_plan(1, (1, 8, 0))
        layers = first.model.rows(prompt)
        first.check(prompt, layers, first.model.run_step(prompt, layers))
        context = 8
        for step, num_rows in enumerate((3, 1, 4), start=2):
            whole = step_plan(step, (1, num_rows, context))
            parts = [
                ExecutorPlan(step, 0, (ExecutorSpan(1, 0, UNITS, *numbers),), is_partial=True)
                for numbers in (
                    (8, num_rows, 0, context),
                    (context - 8, num_rows, num_rows, context - 8),
                )
            ]
            layers = first.model.rows(whole)
            outputs = []
            shares: list[list[Partial]] = [[] for _ in SPECS]
            for deployment, part in zip((first, second), parts, strict=True):
                mine = deployment.model.rows(part)
                for rows, whole_rows in zip(mine, layers, strict=True):
                    rows.q, rows.k, rows.v = whole_rows.q, whole_rows.k, whole_rows.v
                for layer, out in enumerate(deployment.model.run_step(part, mine)):
                    shares[layer].append(Partial(out[:, :, :-1], out[:, :, -1]))
            outputs = [merge(both).out for both in shares]
            wanted = oracle.run_step(whole, layers)
            assert_outputs_match(outputs, wanted, SPECS, torch.float32)
            context += num_rows


@every_kind
def test_reports_that_nobody_takes_are_left_out(kind: str) -> None:
    """Over tcp the executor cannot know; there the engine looks for every report."""
    with deployed((kind, kind)) as (deployment, worker):
        model = deployment.model
        before = time.monotonic()
        model.looks_for_reports = kind == "tcp"
        plans = [step_plan(1, (1, 5, 0))] + [step_plan(2 + i, (1, 1, 5 + i)) for i in range(6)]
        for plan in plans:
            deployment.run_step(plan)
        if kind == "tcp":
            model.take_report(plans[-1])
        else:
            times = model.take_report(plans[0])
            model.take_report(plans[1])
            deployment.run_step(last := step_plan(8, (1, 1, 11)))
            times = model.take_report(last)
            assert (times[1:, 0] >= times[:-1, 3]).all(), "layer by layer"
            assert (times.diff(dim=1) >= 0).all()
            assert before < float(times[0, 0]) < float(times[-1, -1]) < time.monotonic()
        assert worker.error is None


def test_a_report_of_rows_that_are_only_stored_has_no_attention() -> None:
    with deployed() as (deployment, _):
        plan = step_plan(1, (1, 5, 0, False))
        deployment.model.run_step(plan, deployment.model.rows(plan))
        times = deployment.model.take_report(plan)
        assert (times[:, 0] == times[:, 2]).all()
        assert (times[:, 1] == times[:, 2]).all()


@pytest.mark.parametrize("kinds", [("shm", "shm"), ("tcp", "tcp"), ("shm", "tcp")], ids="+".join)
@pytest.mark.parametrize("is_in_step", [False, True])
@pytest.mark.parametrize("lost", [(0, 1), (1, 0)])
def test_the_death_of_any_peer_ends_it(
    kinds: tuple[str, str], lost: tuple[int, int], is_in_step: bool
) -> None:
    with deployed(kinds, replicas=2, ranks=2, page_units=1) as (deployment, worker):
        if is_in_step:
            deployment.model.post_plan(step_plan(1, (1, 5, 0)))
            worker.wait_for_plans(1)
        time.sleep(0.05)
        ours, theirs = deployment.tensor_links[lost[0]][lost[1]]
        theirs.fail("no heartbeat")
        worker.thread.join(2.0)
        assert isinstance(worker.error, PeerLost)
        assert "a: no heartbeat" in str(worker.error)
        with pytest.raises(PeerLost):
            ours.inbox(99, 8).wait(1, time.monotonic() + 2)


@pytest.mark.parametrize("kinds", [("shm", "shm"), ("tcp", "tcp"), ("shm", "tcp")], ids="+".join)
def test_a_server_asleep_on_several_links_wakes_for_each(kinds: tuple[str, str]) -> None:
    with deployed(kinds, replicas=2, ranks=2, page_units=1) as (deployment, _):
        model = deployment.model
        plan = step_plan(1, (1, 3, 0))
        layers = model.rows(plan)
        time.sleep(0.05)
        model.post_plan(plan)
        outputs = []
        for layer, rows in enumerate(layers):
            time.sleep(0.03)
            model.post_q(plan, layer, rows)
            time.sleep(0.03)
            model.post_kv(plan, layer, rows)
            outputs.append(model.wait_out(plan, layer, rows))
        deployment.check(plan, layers, outputs)


@pytest.mark.parametrize("kinds", [("shm", "shm"), ("tcp", "tcp")], ids="+".join)
@pytest.mark.parametrize("num_layers_served", [0, 1, 3])
def test_a_step_given_up_is_replayed(kinds: tuple[str, str], num_layers_served: int) -> None:
    with deployed(kinds, replicas=2, micro_batches=2, page_units=1) as (deployment, worker):
        model = deployment.model
        deployment.run_step(step_plan(1, (1, 5, 0)))
        given_up = step_plan(2, (1, 1, 5))
        layers = model.rows(given_up)
        model.post_plan(given_up)
        for layer in range(num_layers_served):
            model.exchange(given_up, layer, layers[layer])
        model.post_q(given_up, num_layers_served, layers[num_layers_served])
        deployment.run_step(step_plan(3, (2, 3, 0), micro_batch=1))
        deployment.run_step(step_plan(4, (1, 1, 5)))
        deployment.run_step(step_plan(5, (1, 2, 6)))
        assert worker.error is None
        assert deployment.executor.check_integrity() == []


@pytest.mark.parametrize("kinds", [("shm", "shm"), ("tcp", "tcp")], ids="+".join)
def test_k_and_v_that_come_after_the_next_plan_are_stored(kinds: tuple[str, str]) -> None:
    """Over another link than the plan, nothing orders them; nobody waits for rows only stored."""
    with deployed(kinds, replicas=2, page_units=1) as (deployment, worker):
        model = deployment.model
        stored = step_plan(1, (1, 6, 0, False))
        layers = model.rows(stored)
        deployment.oracle.run_step(stored, layers)
        model.post_plan(stored)
        for layer in range(2):
            model.post_kv(stored, layer, layers[layer])
        decode = step_plan(2, (1, 1, 6))
        model.post_plan(decode)
        worker.wait_for_plans(2)
        for layer in range(2, len(SPECS)):
            model.post_kv(stored, layer, layers[layer])
        layers = model.rows(decode)
        outputs = [model.exchange(decode, layer, rows) for layer, rows in enumerate(layers)]
        deployment.check(decode, layers, outputs)


@pytest.mark.parametrize("kinds", [("shm", "shm"), ("tcp", "tcp")], ids="+".join)
def test_a_sequence_in_another_micro_batch_waits_for_its_late_k_and_v(
    kinds: tuple[str, str],
) -> None:
    """Layer l of the two micro-batches comes over different links."""
    with deployed(kinds, replicas=2, micro_batches=2, page_units=1) as (deployment, worker):
        model = deployment.model
        stored, decode = step_plan(1, (1, 6, 0, False)), step_plan(2, (1, 1, 6), micro_batch=1)
        late, layers = model.rows(stored), model.rows(decode)
        deployment.oracle.run_step(stored, late)
        model.post_plan(stored)
        model.post_kv(stored, 0, late[0])
        model.post_plan(decode)
        outputs = [model.exchange(decode, 0, layers[0])]
        for layer in range(1, len(SPECS)):
            model.post_q(decode, layer, layers[layer])
            model.post_kv(decode, layer, layers[layer])
            model.wait_s = 0.03
            with pytest.raises(DeadlineExceeded):
                model.wait_out(decode, layer, layers[layer])
            model.wait_s = 5.0
            model.post_kv(stored, layer, late[layer])
            outputs.append(model.wait_out(decode, layer, layers[layer]))
        deployment.check(decode, layers, outputs)
        assert worker.error is None


@pytest.mark.parametrize("how", ["released", "truncated"])
def test_late_k_and_v_do_not_touch_pages_that_others_have_now(how: str) -> None:
    with deployed(("shm", "shm"), replicas=2, micro_batches=2, page_units=1) as (deployment, _):
        model = deployment.model
        stored = step_plan(1, (1, 60, 0, False))
        layers = model.rows(stored)
        model.post_plan(stored)
        model.post_kv(stored, 0, layers[0])
        # The other micro-batch's sequences take all pages, those of the first sequence too.
        first = step_plan(2, *([(1, 1, 0)] if how == "truncated" else []), micro_batch=1)
        if how == "released":
            first = msgspec.structs.replace(first, releases=(1,))
        deployment.run_step(first)
        lengths = {2: 64, 3: 64, 4: 64, 5: 60}
        for step, (sequence, length) in enumerate(lengths.items(), start=3):
            deployment.run_step(step_plan(step, (sequence, length, 0), micro_batch=1))
        assert deployment.executor.num_free_pages <= UNITS
        for layer in range(1, len(SPECS)):
            model.post_kv(stored, layer, layers[layer])
        model.take_report(stored)
        for step, (sequence, length) in enumerate(lengths.items(), start=9):
            deployment.run_step(step_plan(step, (sequence, 1, length - 1), micro_batch=1))
