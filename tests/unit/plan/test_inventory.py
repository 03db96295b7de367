"""Inventories: lines of text and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina.errors import ConfigError
from lamina.plan.deployment import parse_deployment
from lamina.plan.hardware import load_devices
from lamina.plan.inventory import OWN_PRICE, Inventory, open_inventory, parse_inventory

DEVICES = load_devices()


def counts(inventory: Inventory) -> dict[str, int]:
    return {pool.device.name: pool.count for pool in inventory.pools}


def test_a_line_of_text() -> None:
    inventory = parse_inventory(
        "2 x RTX 4090, 3x rtx3090 at $0.20/h, 1 CPU box with 512 GB, 25 GbE", DEVICES
    )
    assert counts(inventory) == {"RTX 4090": 2, "RTX 3090": 3, "2x EPYC 9654": 1}
    good, old, box = (pool.device for pool in inventory.pools)
    assert {d.network_bytes_per_s for d in (good, old, box)} == {25e9 / 8}
    assert good.price_per_hour == DEVICES["RTX 4090"].price_per_hour
    assert (old.price_per_hour, old.source_of("price_per_hour")) == (0.20, OWN_PRICE)
    assert box.memory_bytes == 512e9
    assert box.bandwidth_bytes_per_s == DEVICES["2x EPYC 9654"].bandwidth_bytes_per_s
    (note,) = inventory.notes
    assert note.startswith("CPU box is taken to be a 2x EPYC 9654")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("H100", {"H100": 1}),
        ("4xH100", {"H100": 4}),
        ("4 H100 for 2.5 USD/hour", {"H100": 4}),
        ("2x EPYC 9654", {"2x EPYC 9654": 1}),
        ("3 x 2x EPYC 9654", {"2x EPYC 9654": 3}),
        ("2 H20, 1 H20", {"H20": 3}),
        ("1 H20, 100 Gbps,", {"H20": 1}),
    ],
)
def test_ways_to_write_counts(text: str, expected: dict[str, int]) -> None:
    assert counts(parse_inventory(text, DEVICES)) == expected


def test_without_a_link_devices_keep_their_own() -> None:
    (pool,) = parse_inventory("8 x H100", DEVICES).pools
    assert pool.device == DEVICES["H100"]


def test_two_sizes_of_a_machine_are_two_devices() -> None:
    inventory = parse_inventory(
        "2x EPYC 9654 with 512 GB, 2x EPYC 9654 with 1 TB, 2x EPYC 9654 with 512 GB", DEVICES
    )
    assert list(counts(inventory).values()) == [2, 1]
    assert [pool.device.memory_bytes for pool in inventory.pools] == [512e9, 1e12]


def test_what_deployments_are_called_can_be_parsed_again() -> None:
    inventory = parse_inventory("2 x RTX 4090, 1 x 2x EPYC 9654", DEVICES)
    text = f"dop:{inventory.pools[0]}/{inventory.pools[1]},depth=2"
    assert str(parse_deployment(text, DEVICES)) == text


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"lab.{suffix}"
    file.write_text(
        {
            "toml": """
                link = "10 GbE"
                [[devices]]
                device = "rtx 4090"
                count = 2
                price_per_hour = 0.5
                interconnect = "25 GB/s"
                [[devices]]
                device = "2x Xeon 8490H"
                memory = "256 GiB"
                network = "100 GbE"
                """,
            "json": """{"link": "10 GbE", "devices": [
                {"device": "rtx 4090", "count": 2, "price_per_hour": 0.5,
                 "interconnect": "25 GB/s"},
                {"device": "2x Xeon 8490H", "memory": "256 GiB", "network": "100 GbE"}]}""",
        }[suffix]
    )
    gpus, machine = open_inventory(str(file), DEVICES).pools
    assert (gpus.count, machine.count) == (2, 1)
    assert gpus.device.interconnect_bytes_per_s == 25e9
    assert gpus.device.network_bytes_per_s == 1.25e9
    assert gpus.device.price_per_hour == 0.5
    assert machine.device.memory_bytes == 256 * 2**30
    assert machine.device.network_bytes_per_s == 12.5e9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 x RTX 4095", "did you mean RTX 4090"),
        ("2 x A100", "A100 40GB or A100 80GB"),
        ("", "has no devices"),
        ("25 GbE", "has no devices"),
        ("0 x H100", "at least 1, got 0"),
        ("H100, 10 GbE, 25 GbE", "speed twice"),
        ("H100 with 5 parsecs", "must be an amount such as 512 GB"),
        ("H100 with 0 GB", "must be an amount such as 512 GB"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_inventory(text, DEVICES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("devices = 3", "Expected `array`"),
        ('[[devices]]\ndevice = "H100"\nnumber = 2', "unknown field `number`"),
        ("link = ", "Invalid value"),
        ('link = "fast"\n[[devices]]\ndevice = "H100"', "link must be an amount such as 25 GbE"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "lab.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_inventory(str(file), DEVICES)


def test_a_file_that_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read"):
        open_inventory("nowhere.toml", DEVICES)
