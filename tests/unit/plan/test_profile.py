from __future__ import annotations

from pathlib import Path

import pytest

from lamina.errors import ConfigError
from lamina.plan.profile import (
    AttentionTime,
    Curve,
    HopTime,
    Profile,
    SlicesTime,
    Surface,
    read_profile,
    write_profile,
)

CURVE = Curve(sizes=(1, 4, 16), values=(2.0, 5.0, 29.0))


def test_curve() -> None:
    assert CURVE.at(1) == 2
    assert CURVE.at(0) == 2, "below the grid it stays"
    assert CURVE.at(2) == 3
    assert CURVE.at(10) == 17
    assert CURVE.at(28) == 53, "beyond the grid the last piece goes on"
    assert Curve(sizes=(8,), values=(3.0,)).at(100) == 3


def test_surface() -> None:
    surface = Surface(sizes=(1, 3), contexts=(0, 100), seconds=((1, 2), (3, 6)))
    assert surface.at(1, 0) == 1
    assert surface.at(3, 100) == 6
    assert surface.at(2, 50) == 3
    assert surface.at(5, 0) == 5
    assert surface.at(1, 200) == 3
    assert Surface(sizes=(1,), contexts=(5,), seconds=((4,),)).at(9, 9) == 4


def test_wrong_grids() -> None:
    with pytest.raises(ConfigError, match="increasing"):
        Curve(sizes=(4, 1), values=(1, 2))
    with pytest.raises(ConfigError, match="as many as sizes"):
        Curve(sizes=(1, 4), values=(1,))
    with pytest.raises(ConfigError, match="2 rows"):
        Surface(sizes=(1, 2), contexts=(1,), seconds=((1,),))


def test_profiles_are_found_by_device_and_transport(tmp_path: Path) -> None:
    profile = Profile(
        model="demo",
        slices=(SlicesTime(device="CPU", seconds=CURVE),),
        attention=(
            AttentionTime(device="CPU", decode=Surface(sizes=(1,), contexts=(1,), seconds=((1,),))),
        ),
        hops=(
            HopTime(transport="shm", latency_s=1e-6, bandwidth_bytes_per_s=1e10),
            HopTime(transport="tcp", latency_s=2e-5, bandwidth_bytes_per_s=1e9),
        ),
        step_overhead_s=1e-4,
    )
    file = tmp_path / "profile.json"
    write_profile(profile, file)
    again = read_profile(file)
    assert again == profile
    assert again.slices_on("CPU", 1) == CURVE
    assert again.slices_on("CPU", 2) is None
    assert again.attention_on("GPU") is None
    assert again.hop(None) == profile.hops[0]
    assert again.hop("tcp") == profile.hops[1]
    assert again.hop("nixl") is None


def test_unreadable_profiles(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profile(tmp_path / "none.json")
    file = tmp_path / "profile.json"
    file.write_text('{"model": "demo", "speed": 3}')
    with pytest.raises(ConfigError, match="lamina calibrate"):
        read_profile(file)
    file.write_text('{"model": "demo", "version": 99}')
    with pytest.raises(ConfigError, match="version 99"):
        read_profile(file)
