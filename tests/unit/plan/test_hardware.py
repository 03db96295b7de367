"""The catalogue of devices and files of users' own."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina.errors import ConfigError
from lamina.plan.hardware import Device, find_device, load_devices

NAMED = (
    "H100", "H200", "H20", "A100 40GB", "A100 80GB", "A10", "A30", "L4", "L40S", "B200",
    "RTX 3090", "RTX 4090", "RTX 5090", "RTX 2080 Ti", "MI300X", "TPU v6e",
)  # fmt: skip
FIGURES = (
    "memory_bytes", "bandwidth_bytes_per_s", "network_bytes_per_s", "interconnect_bytes_per_s",
    "power_w", "price_per_hour",
)  # fmt: skip
UNREAD = {
    ("A30", "bandwidth_bytes_per_s"), ("A30", "interconnect_bytes_per_s"),
    ("RTX 2080 Ti", "flops.fp16"), ("RTX 2080 Ti", "interconnect_bytes_per_s"),
    ("RTX 3090", "interconnect_bytes_per_s"), ("2x EPYC 9755", "power_w"),
    ("2x Xeon 8490H", "bandwidth_bytes_per_s"),
}  # fmt: skip
"""Figures that no page was read for; the set may shrink."""


def figures(device: Device) -> list[str]:
    return [f"flops.{dtype}" for dtype in device.flops] + [
        field for field in FIGURES if getattr(device, field) is not None
    ]


def hardware_file(folder: Path, text: str) -> Path:
    path = folder / "own.toml"
    path.write_text(text)
    return path


def test_every_named_device_is_there() -> None:
    devices = load_devices()
    assert set(NAMED) <= set(devices)
    cpus = [d for d in devices.values() if d.kind == "cpu"]
    assert any("EPYC" in d.name for d in cpus)
    assert any("Xeon" in d.name for d in cpus)


@pytest.mark.parametrize("device", load_devices().values(), ids=lambda d: d.name)
def test_every_figure_says_where_it_is_from(device: Device) -> None:
    for figure in figures(device):
        source = device.source_of(figure)
        kind = source.partition(":")[0]
        assert kind in ("https", "http", "computed", "assumed", "unread"), f"{figure}: {source}"
        if kind == "assumed":
            assert figure == "network_bytes_per_s" or (
                device.kind == "cpu" and figure == "memory_bytes"
            ), f"{figure} must have a source"
        assert (kind == "unread") == ((device.name, figure) in UNREAD), figure


def test_the_papers_devices_have_the_papers_figures() -> None:
    devices = load_devices()
    table = {
        "H100": (989e12, 80e9, 3.35e12, 700, 450e9, 400e9, 11.06),
        "H20": (148e12, 96e9, 4.0e12, 400, 450e9, 400e9, 4.63),
        "TPU v6e": (918e12, 32e9, 1.64e12, None, 448e9, 200e9, 2.70),
    }
    for name, (bf16, memory, bandwidth, power, interconnect, network_bits, price) in table.items():
        device = devices[name]
        assert device.flops["bf16"] == bf16
        assert device.memory_bytes == memory
        assert device.bandwidth_bytes_per_s == bandwidth
        assert device.power_w == power
        assert device.interconnect_bytes_per_s == interconnect
        assert device.network_bytes_per_s == network_bits / 8
        assert device.price_per_hour == price


@pytest.mark.parametrize(
    ("name", "gigabytes_per_s"),
    [("2x EPYC 7763", 2 * 204.8), ("2x EPYC 9654", 2 * 460.8), ("2x Xeon 8592+", 2 * 358.4)],
)
def test_the_bandwidth_of_a_cpu_machine_follows_from_its_channels(
    name: str, gigabytes_per_s: float
) -> None:
    assert load_devices()[name].bandwidth_bytes_per_s == pytest.approx(gigabytes_per_s * 1e9)


def test_arithmetic_of_a_missing_type_is_done_in_another() -> None:
    devices = load_devices()
    assert devices["RTX 2080 Ti"].flops_for("bf16") == devices["RTX 2080 Ti"].flops["fp16"]
    assert devices["2x EPYC 7763"].flops_for("bf16") == devices["2x EPYC 7763"].flops["fp32"]
    assert devices["A100 80GB"].flops_for("fp8") == 312e12
    with pytest.raises(ConfigError, match=r"no figure for fp32.*flops\.fp32"):
        devices["TPU v6e"].flops_for("fp32")
    with pytest.raises(ConfigError, match="dtype must be one of"):
        devices["H100"].flops_for("fp5")


@pytest.mark.parametrize("name", ["rtx4090", "RTX-4090", "Rtx 4090"])
def test_spelling_does_not_matter(name: str) -> None:
    assert find_device(name, load_devices()).name == "RTX 4090"


@pytest.mark.parametrize(
    ("name", "nearest"), [("A100", "A100 40GB or A100 80GB"), ("RTX 4091", "RTX 4090")]
)
def test_unknown_devices_are_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{name}' is unknown; did you mean {nearest}"):
        find_device(name, load_devices())


def test_a_name_like_no_other_is_answered_with_all() -> None:
    with pytest.raises(ConfigError, match=r"known are H100, .*TPU v6e"):
        find_device("zzzz", load_devices())


def test_users_add_devices(tmp_path: Path) -> None:
    path = hardware_file(
        tmp_path,
        '["Home box"]\nkind = "cpu"\nflops = { fp32 = 1e12 }\nmemory_bytes = 512e9\n'
        "network_bytes_per_s = 3.125e9\n"
        "dram = { sockets = 1, channels_per_socket = 8, megatransfers_per_s = 3200 }\n",
    )
    device = load_devices(path)["Home box"]
    assert device.bandwidth_bytes_per_s == 204.8e9
    assert device.memory_bytes == 512 * 10**9
    assert device.price_per_hour is None
    assert device.source_of("memory_bytes") == str(path)


def test_users_replace_single_figures(tmp_path: Path) -> None:
    path = hardware_file(tmp_path, "[h100]\nprice_per_hour = 2.5\n")
    devices = load_devices(path)
    assert set(devices) == set(load_devices())
    assert devices["H100"].price_per_hour == 2.5
    assert devices["H100"].memory_bytes == 80 * 10**9
    assert devices["H100"].source_of("price_per_hour") == str(path)
    assert devices["H100"].source_of("memory_bytes").startswith("https://")


def test_new_channels_bring_new_bandwidth(tmp_path: Path) -> None:
    path = hardware_file(
        tmp_path,
        '["2x EPYC 9654"]\n'
        "dram = { sockets = 2, channels_per_socket = 6, megatransfers_per_s = 4800 }\n",
    )
    assert load_devices(path)["2x EPYC 9654"].bandwidth_bytes_per_s == pytest.approx(460.8e9)


COMPLETE = (
    '[X]\nkind = "gpu"\nflops = { bf16 = 1e12 }\nmemory_bytes = 1\nbandwidth_bytes_per_s = 1.0\n'
    "network_bytes_per_s = 1.0\n"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            COMPLETE + "memroy_bytes = 2\n",
            r"device 'X': .*unknown field `memroy_bytes`.*fields are",
        ),
        ("[H100]\nprice = 2\n", r"device 'H100': .*unknown field `price`"),
        ('[X]\nkind = "gpu"\n', r"device 'X': .*missing required field `flops`"),
        (COMPLETE.replace("gpu", "npu"), r"device 'X': Invalid enum value 'npu'"),
        (COMPLETE.replace("bf16", "bf17"), r"device 'X': flops must be of .*'bf17'"),
        (COMPLETE + "power_w = -1\n", r"device 'X': power_w must be positive, got -1"),
        (COMPLETE + "price_per_hour = -1\n", r"price_per_hour must be at least 0"),
        (COMPLETE + 'name = "Y"\n', "the table's own name is the device's"),
        (COMPLETE + 'sources = { memory = "x" }\n', r"sources must be of .*'memory'"),
        (
            COMPLETE + "dram = { sockets = 0, channels_per_socket = 8, megatransfers_per_s = 1 }\n",
            r"dram\.sockets must be at least 1",
        ),
        (COMPLETE + "dram = { sockets = 1, chanels = 8 }\n", r"unknown field `chanels`"),
        ("price_per_hour = 3\n", "price_per_hour must be a table"),
        ("[X\n", "own.toml is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_devices(hardware_file(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        load_devices(tmp_path / "none.toml")
