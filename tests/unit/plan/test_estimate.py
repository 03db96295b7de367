"""Steady-state estimates: beside the simulator, their properties, their refusals."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lamina.errors import ConfigError
from lamina.plan.build import Settings
from lamina.plan.colocated import prompt_chunks
from lamina.plan.confirm import Simulations
from lamina.plan.demand import Demand
from lamina.plan.deployment import Deployment, parse_deployment
from lamina.plan.estimate import Estimate, Estimator, Misfit, Objectives
from lamina.plan.fleet import plan_of
from lamina.plan.hardware import load_devices
from lamina.plan.limits import binding, break_even
from lamina.plan.model import load_model
from lamina.plan.workload import open_workload

DEVICES = load_devices()
LIMITS = {"max_num_seqs": 1024, "max_num_batched_tokens": 2048}
SPEC = "synthetic:requests=400,rate=4,prompt=lognormal:600:0.5,output=lognormal:150:0.5"
WORKLOAD = open_workload(SPEC)


def estimator(
    model: str = "Llama-2-7B",
    workload: str = SPEC,
    objectives: Objectives | None = None,
    **fields: Any,
) -> Estimator:
    return Estimator(
        load_model(model),
        Demand(open_workload(workload)),
        Settings(**(LIMITS | fields)),
        objectives,
    )


def estimate(text: str | Deployment, **kwargs: Any) -> Estimate:
    deployment = parse_deployment(text, DEVICES) if isinstance(text, str) else text
    result = estimator(**kwargs).estimate(deployment)
    assert isinstance(result, Estimate), result
    return result


def test_demand_is_the_workloads_means() -> None:
    demand = Demand(WORKLOAD)
    summary = WORKLOAD.summary()
    assert demand.prompt_tokens == summary.mean_prompt_tokens
    assert demand.context == summary.mean_decode_context
    rows = [a.prompt_tokens for a in WORKLOAD.arrivals]
    exact = sum(n * (n + 1) / 2 for n in rows) / sum(rows)
    assert demand.prompt_context == pytest.approx(exact)
    chunks = sum(-(-n // 512) for n in rows) / len(rows)
    assert demand.chunks(512) == pytest.approx(chunks, rel=0.01)
    assert demand.chunks(10**6) == 1


def test_a_workload_without_decoding_is_refused() -> None:
    with pytest.raises(ConfigError, match="one token per request"):
        Demand(open_workload("synthetic:requests=10,rate=1,prompt=100,output=1"))


@given(rows=st.integers(1, 4096), context=st.floats(1, 1e5))
def test_prompt_chunks_attend_to_the_mean_context(rows: int, context: float) -> None:
    chunks = prompt_chunks(rows, context)
    assert sum(count for count, _ in chunks) == rows
    attended = sum(count * (before + (count + 1) / 2) for count, before in chunks) / rows
    # A whole number of chunks: 1.5 of them are taken for one or two.
    assert attended == pytest.approx(context, rel=0.5, abs=1.5)


@pytest.mark.parametrize(
    ("deployment", "fields", "tolerance"),
    [
        ("mono:1xA100 40GB", {}, 0.1),
        ("mono:1xA100 40GB", {"decode_only": True}, 0.05),
        ("dop:1xA100 40GB/1xL40S,depth=2", {}, 0.1),
        ("dop:1xA100 40GB/1xL40S,depth=1", {}, 0.1),
        ("dop:2xA100 40GB/1xL40S,depth=3,replicas=2", {"decode_only": True}, 0.05),
        ("dop:1xA100 40GB/1xL4+1xRTX 3090,depth=2", {"decode_only": True}, 0.1),
        ("pd:1xA100 40GB/1xA100 40GB", {}, 0.05),
        ("pd:2xA100 40GB/1xA100 40GB,offload=auto", {}, 0.1),
    ],
)
def test_estimates_agree_with_the_simulator(
    deployment: str, fields: dict[str, Any], tolerance: float
) -> None:
    found = estimate(deployment, **fields)
    simulations = Simulations(
        load_model("Llama-2-7B"), WORKLOAD, Settings(**LIMITS, **fields), limit_s=60
    )
    simulated = simulations.plan(plan_of([found]))
    assert simulated is not None
    assert found.tokens_per_s == pytest.approx(simulated.tokens_per_s, rel=tolerance)
    assert found.batch == pytest.approx(simulated.batch, rel=0.15)


def test_simulations_stop_when_their_time_is_up() -> None:
    simulations = Simulations(load_model("Llama-2-7B"), WORKLOAD, Settings(**LIMITS), limit_s=0)
    assert simulations.plan(plan_of([estimate("mono:1xA100 40GB")])) is None


def changed(deployment: str, side: str, **figures: float) -> Deployment:
    """The deployment with figures of the devices of one of its pools multiplied."""
    parsed = parse_deployment(deployment, DEVICES)

    def scaled(pool: Any) -> Any:
        device = pool.device
        values = {
            name: type(getattr(device, name))(getattr(device, name) * factor)
            for name, factor in figures.items()
        }
        return msgspec.structs.replace(pool, device=msgspec.structs.replace(device, **values))

    pools = getattr(parsed, side)
    new = tuple(map(scaled, pools)) if isinstance(pools, tuple) else scaled(pools)
    return msgspec.structs.replace(parsed, **{side: new})


MIXED = "dop:1xA100 40GB/1xL4+2xRTX 3090,depth=2"


@settings(max_examples=25, deadline=None)
@given(
    factors=st.lists(st.floats(0.6, 20), min_size=2, max_size=5, unique=True),
    side=st.sampled_from(["model", "attention"]),
    figure=st.sampled_from(["network_bytes_per_s", "memory_bytes", "bandwidth_bytes_per_s"]),
    deployment=st.sampled_from([MIXED, "dop:1xA100 40GB/3xL4,depth=2"]),
    objective=st.sampled_from([None, 0.08]),
)
def test_more_of_anything_is_never_worse(
    factors: list[float], side: str, figure: str, deployment: str, objective: float | None
) -> None:
    # Workers of several kinds share by memory bandwidth alone, so that a full one can relieve the
    # network link of another.
    assume((deployment, side, figure) != (MIXED, "attention", "memory_bytes"))
    which = estimator(objectives=Objectives(tbt_s=objective))
    reached = []
    for factor in sorted(factors):
        result = which.estimate(changed(deployment, side, **{figure: factor}))
        reached.append(result.tokens_per_s if isinstance(result, Estimate) else 0.0)
    assert all(less <= more * 1.002 for less, more in pairwise(reached)), reached


@settings(max_examples=20, deadline=None)
@given(objectives=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=4, unique=True))
def test_looser_objectives_are_never_worse(objectives: list[float]) -> None:
    for name in ("tbt_s", "ttft_s"):
        reached = []
        for value in sorted(objectives):
            result = estimator(objectives=Objectives(**{name: value})).estimate(
                parse_deployment("mono:1xA100 40GB", DEVICES)
            )
            if isinstance(result, Estimate):
                assert getattr(result, name) <= value
                reached.append(result.tokens_per_s)
            else:
                assert result.kind == "objective"
                assert not reached, "a tighter one was met"
        assert reached == sorted(reached)


def test_an_objective_limits_the_batch() -> None:
    free = estimate("mono:1xA100 40GB")
    held = estimate("mono:1xA100 40GB", objectives=Objectives(tbt_s=free.tbt_s / 2))
    assert held.batch < free.batch
    assert held.tbt_s <= free.tbt_s / 2


def test_a_spill_to_a_slow_worker_is_not_taken_when_it_costs() -> None:
    fast = "dop:1xA100 40GB/1xRTX 3090,depth=2"
    with_slow = "dop:1xA100 40GB/1xRTX 3090+1x2x EPYC 7763,depth=2"
    kwargs = {"decode_only": True, "max_num_seqs": 2048}
    assert estimate(with_slow, **kwargs).tokens_per_s > estimate(fast, **kwargs).tokens_per_s


@pytest.mark.parametrize(
    ("deployment", "model", "reason"),
    [
        ("mono:1xRTX 4090", "LLaMA3-70B", "141.1 GB"),
        ("dop:1xRTX 4090/1xH20,depth=2", "LLaMA3-70B", "141.1 GB"),
        ("pd:1xRTX 4090/1xH20", "LLaMA3-70B", "does not fit on"),
    ],
)
def test_weights_that_do_not_fit(deployment: str, model: str, reason: str) -> None:
    misfit = estimator(model).estimate(parse_deployment(deployment, DEVICES))
    assert isinstance(misfit, Misfit)
    assert misfit.kind == "memory"
    assert reason in misfit.reason


def test_a_request_that_is_too_long() -> None:
    long = "synthetic:requests=5,rate=1,prompt=60000,output=100"
    misfit = estimator(workload=long).estimate(parse_deployment("mono:1xA100 40GB", DEVICES))
    assert isinstance(misfit, Misfit)
    assert "the longest request has 60100" in misfit.reason


def test_objectives_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="tbt_s must be positive"):
        Objectives(tbt_s=0.0)


def test_the_needed_bandwidth_is_the_papers_formula() -> None:
    found = estimate("dop:2xH100/4xH20,depth=2", model="LLaMA3-70B", decode_only=True)
    curve = estimator("LLaMA3-70B", decode_only=True).needed_link(found.deployment)
    # (2 + 2/G) e d B L / (alpha (MTIME + ATIME)) for each of the two micro-batches.
    batch, needed = curve[0]
    weights_s = load_model("LLaMA3-70B").slice_bytes(batch / 2) / (2 * 3.35e12 * 0.8)
    cached = Demand(WORKLOAD).context * 2 * 2 * 80 * 8 * 128
    attention_s = batch / 2 * cached / (4 * 4.0e12 * 0.8)
    sent = (2 + 2 / 8) * 2 * 8192 * (batch / 2) * 80
    assert needed == pytest.approx(sent / (0.2 * (weights_s + attention_s)), rel=0.2)
    assert [batch for batch, _ in curve] == sorted(batch for batch, _ in curve)
    assert found.needed_link_bytes_per_s == pytest.approx(curve[-1][1], rel=0.05)
    assert found.link_bytes_per_s == pytest.approx(2 * 50e9 * 0.914)


@pytest.mark.parametrize(
    ("deployment", "kwargs", "limit"),
    [
        # Memory for few sequences, all else in plenty.
        ("mono:1xRTX 4090", {}, "KV memory"),
        # Long prompts and short outputs: computing them is all that counts.
        (
            "mono:1xA100 80GB",
            {"workload": "synthetic:requests=300,rate=1,prompt=1500,output=8"},
            "compute",
        ),
        # All memory full of KV that is read for every token.
        (
            "dop:1xH100/1x2x EPYC 9654,depth=2",
            {"decode_only": True, "max_num_seqs": 100_000},
            "attention bandwidth",
        ),
        (
            "mono:1xA100 80GB",
            {"objectives": Objectives(tbt_s=0.015), "decode_only": True},
            "TBT objective",
        ),
        (
            "mono:1xA100 80GB",
            {"decode_only": True, "max_num_seqs": 4},
            "batch limits",
        ),
    ],
)
def test_binding_constraints(deployment: str, kwargs: dict[str, Any], limit: str) -> None:
    which = estimator(**kwargs)
    found = which.estimate(parse_deployment(deployment, DEVICES))
    assert isinstance(found, Estimate)
    assert binding(which, found).name == limit


def test_a_slow_network_is_the_binding_constraint() -> None:
    slow = changed("dop:1xH100/2xH20,depth=2", "model", network_bytes_per_s=0.01)
    which = estimator(decode_only=True)
    found = which.estimate(slow)
    assert isinstance(found, Estimate)
    assert binding(which, found).name == "network"
    turned = break_even(which, found, 2 * found.tokens_per_s)
    assert turned is not None
    assert turned.name == "network"
    assert turned.factor == pytest.approx(2, rel=0.1)
    assert turned.have == "4 Gbit/s per device"


def test_what_cannot_be_turned() -> None:
    which = estimator(decode_only=True)
    found = which.estimate(parse_deployment("dop:1xH100/2xH20,depth=2", DEVICES))
    assert isinstance(found, Estimate)
    assert break_even(which, found, 1000 * found.tokens_per_s) is None
