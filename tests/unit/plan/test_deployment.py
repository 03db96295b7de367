from __future__ import annotations

import pytest

from lamina.errors import ConfigError
from lamina.plan.deployment import (
    Disaggregated,
    PrefillDecode,
    parse_deployment,
    power_w,
    price_per_hour,
)
from lamina.plan.hardware import load_devices

DEVICES = load_devices()


@pytest.mark.parametrize(
    "text",
    [
        "mono:4xH100",
        "dop:2xH100/4xH20,depth=2",
        "dop:4xH100/2xH20+2xL40S,depth=3,replicas=2",
        "dop:1xH100/2xH20,depth=1,partition=requests,early_q=no",
        "pd:1xA100 80GB/1xA100 80GB",
        "pd:2xH100/2xH100,prefill_ranks=2,offload=auto",
        "pd:1xH100/1xH100,offload=0.7",
    ],
)
def test_a_deployment_says_what_it_was_parsed_from(text: str) -> None:
    deployment = parse_deployment(text, DEVICES)
    assert str(deployment) == text
    assert parse_deployment(str(deployment), DEVICES) == deployment


def test_defaults() -> None:
    deployment = parse_deployment("dop:h100/4 x h20", DEVICES)
    assert isinstance(deployment, Disaggregated)
    assert (deployment.model.count, deployment.depth, deployment.replicas) == (1, 2, 1)
    rotating = parse_deployment("dop:2xH100/4xH20,replicas=2", DEVICES)
    assert isinstance(rotating, Disaggregated)
    assert (rotating.depth, rotating.num_ranks) == (3, 1)


def test_a_device_whose_name_begins_like_a_count() -> None:
    deployment = parse_deployment("dop:H100/2x EPYC 9654", DEVICES)
    assert deployment.pools[1].count == 1
    assert deployment.pools[1].device.name == "2x EPYC 9654"
    assert parse_deployment("dop:H100/3x2x EPYC 9654", DEVICES).pools[1].count == 3


def test_prices_and_power() -> None:
    lamina = parse_deployment("dop:2xH100/4xH20", DEVICES)
    assert price_per_hour(lamina) == pytest.approx(40.64)
    assert power_w(lamina) == pytest.approx(2 * 700 + 4 * 400)


def test_offload_options() -> None:
    deployment = parse_deployment(
        "pd:1xH100/1xH100,offload=auto,compute_share=0.3,bandwidth_share=0.7", DEVICES
    )
    assert isinstance(deployment, PrefillDecode)
    assert deployment.offload is not None
    assert deployment.offload.ratio is None
    assert deployment.offload.compute_share == 0.3
    assert deployment.offload.bandwidth_share == 0.7


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("4xH100", "must be such as"),
        ("monolithic:4xH100", "kind of deployment .* mono"),
        ("mono:4xH10", "did you mean H100"),
        ("mono:2xH100/2xH20", "must be such as"),
        ("dop:2xH100", "must be such as"),
        ("dop:H100+H20/H20", "only attention workers"),
        ("dop:H100/H20,dept=2", "did you mean depth"),
        ("dop:H100/H20,depth=two", "depth must be a number"),
        ("dop:H100/H20,depth=99", "depth"),
        ("dop:3xH100/H20,replicas=2", "must divide"),
        ("dop:H100/H20,partition=rows", "partition must be"),
        ("dop:H100/H20,early_q=maybe", "yes or no"),
        ("dop:H100/H20,depth", "an option such as"),
        ("mono:0xH100", "at least 1"),
        ("mono:H100,depth=2", "there are none"),
        ("pd:H100/H100,compute_share=0.3", "need offload"),
        ("pd:H100/H100,offload=-1", "at least 0"),
        ("pd:H100/H100,offload=much", "must be a number"),
        ("pd:H100/H100,offload=auto,compute_share=1", "between 0 and 1"),
        ("pd:3xH100/H100,prefill_ranks=2", "must divide"),
    ],
)
def test_wrong_deployments(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_deployment(text, DEVICES)
