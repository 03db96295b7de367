from __future__ import annotations

from pathlib import Path

import pytest

from lamina.errors import ConfigError
from lamina.plan import adrenaline, paper, paper_figures
from lamina.plan.synthetic import Lengths, synthetic
from support.traces import trace_file


@pytest.fixture
def traces() -> Path:
    return trace_file("azure_conv.csv.gz").parent


def test_the_batch_ratio_of_short_outputs(traces: Path) -> None:
    """The cells that are quick to simulate; docs/planner.md has all of them."""
    (code,) = [w for w in paper.workloads(traces, 1500) if w.name == "Azure-Code"]
    cells = [paper.cell(model, code) for model in paper.MODELS]
    assert paper.mean_batch_ratio(cells) == pytest.approx(paper.BATCH_RATIO, rel=0.08)
    by_model = {c.model: c.gain for c in cells}
    assert 0.15 < by_model["LLaMA-33B"] < 0.35
    assert 0.15 < by_model["LLaMA-65B"] < 0.35
    assert all(c.num_left_out == 0 for c in cells)
    assert [c.baseline.price_per_hour for c in cells] == pytest.approx([22.12, 44.24, 44.24])
    assert [c.lamina.price_per_hour for c in cells] == pytest.approx([20.32, 40.64, 40.64])


def test_workloads_are_the_papers(traces: Path) -> None:
    """Table 4; the stand-in for Kimi-TA has its published means."""
    summaries = {w.name: w.summary() for w in paper.workloads(traces)}
    found = {
        name: (s.num_requests, s.mean_prompt_tokens, s.mean_output_tokens)
        for name, s in summaries.items()
    }
    assert found["Azure-Conv"] == pytest.approx((19366, 1154.7, 211.1), rel=1e-3)
    assert found["Azure-Code"] == pytest.approx((8819, 2047.8, 27.9), rel=1e-3)
    assert found["Kimi-Conv"] == pytest.approx((12031, 12035.1, 342.6), rel=1e-3)
    assert found[paper.STAND_IN] == pytest.approx((23608, 8560.0, 182.1), rel=1e-3)


def test_traces_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"azure_conv.csv.gz is missing"):
        next(paper.workloads(tmp_path))


def test_requests_that_do_not_fit_in_one_of_the_two_are_left_out_of_both() -> None:
    workload = synthetic(
        num_requests=40,
        rate=1.0,
        prompt=Lengths(kind="uniform", mean=45000, spread=15000),
        output=Lengths(kind="constant", mean=20),
    )
    cell = paper.cell("LLaMA-33B", workload)
    assert cell.num_left_out > 0
    assert cell.num_requests + cell.num_left_out == 40


def test_figure_2_and_3_compute_grows_with_the_batch_bandwidth_of_attention_does_not() -> None:
    points = paper_figures.utilisation()
    compute = [p.slices_compute for p in points]
    assert compute == sorted(compute)
    assert next(p for p in points if p.batch == 50).slices_compute < 0.2
    assert compute[-1] == pytest.approx(0.6)
    assert {round(p.attention_bandwidth, 3) for p in points} == {0.8}
    assert max(p.attention_compute for p in points) < 0.2


def test_figure_4_below_30_gb_per_second_up_to_batch_300() -> None:
    points = paper_figures.bandwidths(dops=((1, 1),))
    assert max(p.bytes_per_s for p in points) < 30e9
    assert max(p.batch for p in points) == 300


def test_llama3_70b_is_saturated_at_batch_800() -> None:
    points = {p.batch: p for p in paper_figures.saturation()}
    assert points[800].compute_reachable > 0.9
    assert points[1000].tokens_per_s < 1.02 * points[800].tokens_per_s
    assert points[300].compute_reachable < 0.7


def test_dop_sweep_leaves_out_what_does_not_fit() -> None:
    workload = synthetic(
        num_requests=300,
        rate=1.0,
        prompt=Lengths(kind="constant", mean=1000),
        output=Lengths(kind="constant", mean=20),
    )
    points = paper_figures.dop_sweep(workload, dops=("1/2", "2/2", "2/4"))
    assert [p.dop for p in points] == [(2, 2), (2, 4)]
    assert points[1].price_per_hour == pytest.approx(40.64)
    assert points[1].tokens_per_s > points[0].tokens_per_s


def test_adrenalines_bounds_and_what_offloading_brings() -> None:
    sweep = adrenaline.ratio_sweep(adrenaline.SHAREGPT, 120)
    assert sweep.bounds.memory == pytest.approx(0.6)
    assert 0.4 < sweep.bounds.compute < 1.2
    assert 0.4 <= sweep.best.ratio <= 0.8
    assert sweep.best.outcome.tpot_ms < sweep.without.tpot_ms
    assert sweep.best.outcome.prefill_memory > sweep.without.prefill_memory


def test_the_stand_in_holds_the_batch_that_the_baselines_figures_imply() -> None:
    """1412 tokens/s x 47.5 ms sequences fill the memory beside the weights."""
    workload = adrenaline.stand_in(adrenaline.SHAREGPT, 2.0, 3000)
    summary = workload.summary()
    model = adrenaline.load_model(adrenaline.MODEL)
    room = 0.9 * 80e9 - model.weight_bytes()
    batch = room / (model.kv_bytes_per_token * summary.mean_decode_context)
    assert batch == pytest.approx(1412 * 0.0475, rel=0.05)
    assert summary.mean_output_tokens == pytest.approx(978 / 2.0, rel=0.02)
    assert summary.max_total_tokens <= 4096
