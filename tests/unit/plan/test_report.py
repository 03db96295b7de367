"""Verdicts, tables, pictures, pages."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from lamina.errors import ConfigError
from lamina.plan.build import Settings
from lamina.plan.confirm import Simulations
from lamina.plan.demand import Demand
from lamina.plan.estimate import Estimator, Objectives
from lamina.plan.hardware import load_devices
from lamina.plan.inventory import parse_inventory
from lamina.plan.model import load_model
from lamina.plan.page import COLUMNS, cells, html
from lamina.plan.plots import PLOTS, svg
from lamina.plan.report import Report, report
from lamina.plan.search import Rank, search
from lamina.plan.workload import open_workload

DEVICES = load_devices()
CHAT = "synthetic:requests=300,rate=1,prompt=lognormal:600:0.5,output=lognormal:200:0.5"
LONG = "synthetic:requests=200,rate=1,prompt=lognormal:4000:0.3,output=lognormal:800:0.3"


def make(
    model: str, inventory: str, workload: str = CHAT, *, rank: Rank = "throughput",
    objectives: Objectives | None = None, simulate_s: float = 0.0, **fields: Any,
) -> Report:  # fmt: skip
    cost, requests = load_model(model), open_workload(workload)
    demand, there = Demand(requests), parse_inventory(inventory, DEVICES)
    settings = Settings(**({"max_num_seqs": 512, "max_num_batched_tokens": 1024} | fields))
    found = search(cost, there, demand, settings, objectives=objectives, rank=rank)
    simulations = Simulations(cost, requests, settings, limit_s=simulate_s)
    return report(
        found,
        Estimator(cost, demand, settings, objectives),
        there,
        rank=rank,
        simulations=simulations if simulate_s else None,
    )


def test_the_papers_equal_cost_comparison_says_disaggregate() -> None:
    made = make("LLaMA3-70B", "2 x H100, 4 x H20", LONG, decode_only=True)
    assert made.pays
    assert made.rows[0].plan == "dop:2xH100/4xH20,depth=2"
    assert made.verdict.startswith("Disaggregate attention: +")
    assert "What limits the latter is" in made.verdict
    assert made.rows[0].needed_link_bytes_per_s is not None


def test_on_a_slow_network_the_network_decides() -> None:
    made = make("LLaMA3-70B", "2 x H100, 4 x H20, 1 GbE", LONG, decode_only=True)
    assert not made.pays
    assert made.verdict.startswith("Do not disaggregate attention: -")
    found = re.search(
        r"What decides is network: it would take ([\d.]+) Gbit/s per device instead of 1 Gbit/s",
        made.verdict,
    )
    assert found is not None
    # The number is right: with it, disaggregation is as good; with a tenth more it is better.
    enough = float(found[1]) * 1.2
    assert (
        make("LLaMA3-70B", f"2 x H100, 4 x H20, {enough:.2f} Gbps", LONG, decode_only=True)
        .rows[0]
        .disaggregated
    )


def test_equal_devices_are_better_off_together() -> None:
    made = make("Llama-2-7B", "4 x A100 80GB")
    assert not made.pays
    assert made.verdict.startswith("Do not disaggregate attention")
    assert re.search(r"What (decides|holds it back) is", made.verdict)
    assert made.rows[0].plan.count("dop:") == 0


def test_a_model_that_one_side_alone_cannot_hold() -> None:
    made = make("LLaMA3-70B", "2 x H100, 1 x 2x EPYC 7763 with 64 GB", decode_only=True)
    assert made.rows
    (first,) = make("Llama-2-7B", "1 x A100 40GB").rows
    assert first.plan == "mono:1xA100 40GB"
    verdict = make("Llama-2-7B", "1 x A100 40GB").verdict
    assert verdict.startswith("Do not disaggregate attention: it is not possible here (no devices")


def test_nothing_else_serves_it() -> None:
    # The weights fill the GPU; there is no room for a long request beside them.
    made = make(
        "Llama-2-13B",
        "2 x RTX 3090, 1 CPU box, 100 GbE",
        "synthetic:requests=50,rate=1,prompt=25000,output=500",
        decode_only=True,
        objectives=Objectives(tbt_s=0.15),
    )
    assert made.pays
    assert made.verdict.startswith("Disaggregate attention")


def test_by_cost_the_verdict_compares_costs() -> None:
    made = make("Llama-2-7B", "2 x A100 80GB at $1.5, 2 x L4 at $0.4", rank="cost")
    assert "$ per million tokens" in made.verdict
    assert "tokens per dollar" in made.verdict


def test_no_price_no_cost() -> None:
    made = make("Llama-2-7B", "1 x A100 80GB at $1.5, 1 x A10", rank="cost")
    assert made.rows[0].price_per_million_tokens is not None
    assert any("there is no price for A10" in text for text in made.warnings)


def test_simulations_stand_beside_estimates_and_decide() -> None:
    made = make("Llama-2-7B", "2 x A100 40GB", simulate_s=60)
    simulated = [row.simulated for row in made.rows[:3] if row.simulated is not None]
    assert simulated
    for row in made.rows:
        if row.simulated is not None:
            assert row.simulated.tokens_per_s == pytest.approx(row.tokens_per_s, rel=0.15)
            assert row.simulated.tbt_p99_s >= row.simulated.tbt_s
    assert ", simulated" in made.verdict


def test_load_and_slowness_are_said() -> None:
    made = make("Llama-2-7B", "1 x 2x EPYC 9654", CHAT.replace("rate=1", "rate=50"))
    assert any("it cannot keep up" in note for note in made.notes)
    assert any("without an objective" in warning for warning in made.warnings)


@pytest.fixture(scope="module")
def made() -> Report:
    return make("Llama-2-13B", "2 x H100 at $2.5, 2 x H20 at $1, 1 CPU box", LONG, decode_only=True)


def test_the_report_is_json_and_back(made: Report) -> None:
    assert msgspec.json.decode(msgspec.json.encode(made), type=Report) == made


def test_cells_are_as_many_as_columns(made: Report) -> None:
    assert {len(cells(row)) for row in made.rows} == {len(COLUMNS)}


def test_breakdowns_add_up_to_the_time_between_tokens(made: Report) -> None:
    for row in made.rows:
        if row.plan == row.main:
            assert sum(row.breakdown) == pytest.approx(row.tbt_s, rel=0.02)


@pytest.mark.parametrize("name", PLOTS)
def test_pictures_are_svg_without_addresses_to_load(made: Report, name: str) -> None:
    text = svg(PLOTS[name], made)
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', text))
    assert text == svg(PLOTS[name], made), "two runs draw the same"


@pytest.mark.parametrize("name", PLOTS)
def test_pictures_of_nothing(name: str) -> None:
    bare = make("Llama-2-7B", "1 x A10")
    assert "<svg" in svg(PLOTS[name], bare)


def test_the_page_needs_no_other_files(made: Report, tmp_path: Path) -> None:
    text = html(msgspec.structs.replace(made, workload="<script>alert(1)</script>"))
    assert text.count("<svg") == 3
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r'(src|href)="(?!#)', text)
    assert not re.search(r"@import|url\((?!#)", text)
    for row in made.rows:
        assert row.plan in text


def test_without_matplotlib_it_says_what_to_install(
    made: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'lamina-serve\[plot\]'"):
        html(made)
