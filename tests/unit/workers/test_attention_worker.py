"""An attention worker's process between an engine and the ranks of two replicas."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch

from lamina.attention.spec import fingerprint
from lamina.errors import PeerLost
from lamina.transport.control import ControlServer
from lamina.transport.handshake import Listener
from lamina.transport.wire import (
    Assign,
    Assigned,
    IntegrityQuery,
    IntegrityReply,
    LinkAddress,
    ShutdownWorker,
)
from lamina.workers.attention import WorkerStart, run_attention_worker
from lamina.workers.process import WorkerProcess
from support.attention import Oracle, assert_outputs_match, make_sinks, make_spec, plan_of
from support.serving import MAX_ROWS, MAX_SPANS, ModelSide

SPECS = (
    make_spec(0, num_kv_heads=4),
    make_spec(1, num_kv_heads=4, has_sinks=True),
    make_spec(2, num_kv_heads=4, window=5),
)
UNITS, NUM_REPLICAS, NUM_RANKS = 4, 2, 2
NAME = "attention-worker-1"
SECRETS = [bytes([number]) * 32 for number in range(1 + NUM_REPLICAS * NUM_RANKS)]
PRINT = fingerprint(SPECS, "float32")


def soon() -> float:
    return time.monotonic() + 60


@pytest.mark.parametrize("address", ["unix:@", "127.0.0.1:0"])
def test_it_measures_its_memory_and_serves_the_ranks_of_all_replicas(address: str) -> None:
    torch.manual_seed(0)
    sinks = make_sinks(SPECS)
    with contextlib.ExitStack() as stack:
        control = ControlServer(
            heartbeat_interval_s=0.1, heartbeat_timeout_s=10.0, on_lost=lambda name, reason: None
        )
        stack.callback(control.close)
        start = WorkerStart(
            name=NAME, address=control.address, token=control.token.line, num_threads=1, cores=(),
            startup_timeout_s=60.0,
        )  # fmt: skip
        process = WorkerProcess(
            NAME, run_attention_worker, (start,), num_threads=1, on_exit=lambda name, code: None
        )
        stack.callback(process.terminate, 0.0)
        assert control.wait_for_join(soon()).name == NAME
        listeners = [Listener(address, name=f"rank {i}") for i in range(len(SECRETS))]
        for listener in listeners:
            stack.callback(listener.close)
        addresses = [
            LinkAddress(listener.address, secret)
            for listener, secret in zip(listeners, SECRETS, strict=True)
        ]
        assign = Assign(
            executor=1, specs=SPECS,
            sinks=tuple(None if s is None else s.numpy().tobytes() for s in sinks),
            units=UNITS, page_units=1, dtype="float32", kv_cache_dtype="auto", num_pages=64,
            page_tokens=4, max_rows=MAX_ROWS, max_spans=MAX_SPANS, num_micro_batches=2,
            num_ranks=NUM_RANKS, plan_link=addresses[0], tensor_links=tuple(addresses[1:]),
            fingerprint=PRINT, step_deadline_s=10.0, busy_poll_s=0.002,
        )  # fmt: skip
        assigned = control.request(NAME, assign, soon())
        assert isinstance(assigned, Assigned)
        assert assigned.num_pages == 64
        assert 1e7 < assigned.read_bytes_per_s < 1e13
        links = [
            listener.accept({secret: (NAME, PRINT)}, soon())
            for listener, secret in zip(listeners, SECRETS, strict=True)
        ]
        model = ModelSide(
            links[0], SPECS, num_micro_batches=2, num_ranks=NUM_RANKS, units=UNITS, page_units=1,
            tensor_links=[links[1:3], links[3:5]],
        )  # fmt: skip
        oracle = Oracle(SPECS, sinks)
        for plan in (
            plan_of((1, 6, 0), units=(0, UNITS)),
            plan_of((1, 1, 6), units=(0, UNITS), step=2),
        ):
            layers = model.rows(plan)
            outputs = model.run_step(plan, layers)
            assert_outputs_match(outputs, oracle.run_step(plan, layers), SPECS, torch.float32)
            assert (model.take_report(plan, rank=1) > 0).all()
        integrity = control.request(NAME, IntegrityQuery(2), soon())
        assert isinstance(integrity, IntegrityReply)
        assert (integrity.problems, integrity.sequences) == ((), (1,))
        assert integrity.pages_used == 2 * UNITS
        control.send(NAME, ShutdownWorker())
        process.join(10.0)
        with pytest.raises(PeerLost):
            model.reports[0].wait(9, soon())
