"""Replaying a workload against the real app with a deterministic engine behind it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from lamina.bench.serve import Progress, ServeFigures, prompt_token_ids, replay
from lamina.cli.bench.serve import serve as serve_command
from lamina.errors import ConfigError
from lamina.plan.workload import Arrival, Workload
from lamina.server.app import create_app
from support.fake_server import FakeEngine, Live


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FakeEngine, str]]:
    engine = FakeEngine()
    app = create_app(engine, served_model_name="org/fake", max_body_bytes=20_000)
    with Live(app) as live:
        yield engine, live.url


@pytest.fixture
def engine(server: tuple[FakeEngine, str]) -> FakeEngine:
    server[0].reset()
    server[0].reply = lambda index: "x" * 300
    return server[0]


@pytest.fixture
def url(server: tuple[FakeEngine, str], engine: FakeEngine) -> str:
    return server[1]


def workload(*requests: tuple[float, int, int]) -> Workload:
    """From (time, prompt tokens, output tokens)."""
    return Workload(
        name="w",
        arrivals=tuple(Arrival(time_s=t, prompt_tokens=p, output_tokens=o) for t, p, o in requests),
    )


def run(requests: Workload, url: str, **settings: Any) -> ServeFigures:
    return asyncio.run(replay(requests, url=url, **settings))


def test_every_request_is_sent_with_its_lengths(engine: FakeEngine, url: str) -> None:
    figures = run(workload((0.0, 5, 3), (0.01, 9, 1), (0.02, 20, 40)), url)
    assert (figures.num_requests, figures.num_completed, figures.errors) == (3, 3, {})
    assert figures.model == "org/fake"
    sent = {(len(s.ids), s.sampling.max_tokens) for s in engine.started}
    assert sent == {(5, 3), (9, 1), (20, 40)}
    assert all(s.sampling.ignore_eos and s.sampling.greedy for s in engine.started)
    assert figures.output_tokens_per_s == pytest.approx(44 / figures.duration_s)
    assert figures.prompt_tokens_per_s == pytest.approx(34 / figures.duration_s)
    assert figures.num_short == 0


def test_times_between_tokens_are_the_servers(engine: FakeEngine, url: str) -> None:
    engine.delay_s = 0.02
    figures = run(workload((0.0, 5, 11), (0.0, 5, 11)), url)
    assert figures.tbt_s is not None
    assert figures.tpot_s is not None
    assert figures.ttft_s is not None
    assert figures.latency_s is not None
    assert figures.tbt_s.count == 20
    assert 0.018 < figures.tbt_s.p50 < 0.1
    assert figures.ttft_s.count == figures.tpot_s.count == 2
    assert figures.tpot_s.mean == pytest.approx(figures.tbt_s.mean, rel=0.01)
    assert figures.ttft_s.p50 >= 0.02
    assert figures.latency_s.p50 >= 11 * 0.02


def test_requests_leave_at_their_times(engine: FakeEngine, url: str) -> None:
    requests = workload(*((i * 0.1, 5, 1) for i in range(6)))
    slow = run(requests, url)
    fast = run(requests.faster(10), url)
    assert 0.5 <= slow.duration_s < 1.5
    assert fast.duration_s < 0.3
    assert slow.lateness_s is not None
    assert slow.lateness_s.p50 < 0.05


def test_one_slow_answer_delays_no_other_request(engine: FakeEngine, url: str) -> None:
    engine.delay_s = 0.05
    figures = run(workload((0.0, 5, 20), (0.1, 5, 1)), url)
    assert figures.lateness_s is not None
    assert figures.lateness_s.max < 0.5
    assert figures.duration_s < 1.9


def test_no_more_than_the_limit_are_under_way(engine: FakeEngine, url: str) -> None:
    engine.delay_s = 0.02
    figures = run(workload(*((0.0, 5, 5) for _ in range(4))), url, max_concurrency=1)
    assert figures.num_completed == 4
    assert figures.duration_s >= 4 * 5 * 0.02
    assert figures.lateness_s is not None
    assert figures.lateness_s.max >= 3 * 5 * 0.02


def test_a_refused_request_is_counted(engine: FakeEngine, url: str) -> None:
    figures = run(workload((0.0, 5, 3), (0.0, 500, 3), (0.0, 6, 3)), url)
    assert figures.num_completed == 2
    assert figures.errors == {"HTTP 400": 1}
    assert "500 tokens, too many" in figures.error_examples["HTTP 400"]
    assert figures.ttft_s is not None
    assert figures.ttft_s.count == 2


def test_an_error_within_an_answer_is_counted(engine: FakeEngine, url: str) -> None:
    engine.fail_after = 2
    engine.fails = lambda prompt: len(prompt) == 7
    figures = run(workload((0.0, 5, 4), (0.0, 7, 4)), url)
    assert figures.num_completed == 1
    assert figures.errors == {"error in stream": 1}
    assert "attention-1 was lost" in figures.error_examples["error in stream"]


def test_a_silent_server_is_counted(engine: FakeEngine, url: str) -> None:
    engine.hang_after = 2
    figures = run(workload((0.0, 5, 8)), url, timeout_s=0.2)
    assert figures.num_completed == 0
    assert figures.errors == {"timeout": 1}
    assert figures.ttft_s is None
    assert figures.output_tokens_per_s == 0


def test_answers_shorter_than_asked_are_counted(engine: FakeEngine, url: str) -> None:
    engine.reply = lambda index: "xyz"
    figures = run(workload((0.0, 5, 8)), url)
    assert figures.num_completed == figures.num_short == 1
    assert figures.output_tokens_per_s == pytest.approx(3 / figures.duration_s)


def test_progress_counts_up(engine: FakeEngine, url: str) -> None:
    seen: list[Progress] = []
    run(workload((0.0, 5, 3), (0.01, 500, 3)), url, progress=seen.append)
    assert [p.num_done for p in seen] == [1, 2]
    assert seen[-1] == Progress(2, 1, 3)


def test_a_workload_may_begin_late(engine: FakeEngine, url: str) -> None:
    assert run(workload((3600.0, 5, 1), (3600.1, 5, 1)), url).duration_s < 2


def test_a_url_may_end_in_v1(engine: FakeEngine, url: str) -> None:
    assert run(workload((0.0, 5, 1)), f"{url}/v1/").num_completed == 1


@pytest.mark.parametrize("bad", ["nonsense", "http://", "http://127.0.0.1:99999"])
def test_a_url_that_is_none_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match="url must be such as"):
        run(workload((0.0, 5, 1)), bad)


def test_no_server_is_said_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"no server answers at .*start one with"):
            run(workload((0.0, 5, 1)), url)


def test_an_unknown_model_is_said_at_once(engine: FakeEngine, url: str) -> None:
    with pytest.raises(ConfigError, match="model must be one of org/fake, got 'other'"):
        run(workload((0.0, 5, 1)), url, model="other")


def test_keys() -> None:
    app = create_app(FakeEngine(), served_model_name="m", api_key="sesame", max_body_bytes=9999)
    with Live(app) as live:
        with pytest.raises(ConfigError, match="refuses the key; give --api-key"):
            run(workload((0.0, 5, 1)), live.url)
        assert run(workload((0.0, 5, 1)), live.url, api_key="sesame").num_completed == 1


def test_equal_prefix_hashes_are_equal_tokens() -> None:
    def ids(index: int, tokens: int, *hashes: int) -> list[int]:
        arrival = Arrival(time_s=0.0, prompt_tokens=tokens, output_tokens=1, prefix_hashes=hashes)
        return prompt_token_ids(arrival, index)

    a, b = ids(0, 1100, 7, 8, 9), ids(1, 1030, 7, 8, 10)
    assert (len(a), len(b)) == (1100, 1030)
    assert a[:1024] == b[:1024]
    assert a[1024:1030] != b[1024:1030]
    assert ids(0, 600, -1, 3) == ids(5, 600, -1, 3)
    assert ids(0, 64) == ids(0, 64) != ids(1, 64)
    assert min(a) >= 16
    assert max(a) < 256


def test_the_command_replays_a_file(engine: FakeEngine, url: str, tmp_path: Path) -> None:
    rows = "".join(f"{t},{5 + t},4\n" for t in range(10))
    (tmp_path / "w.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    app = Typer()
    app.command()(serve_command)
    arguments = ["--workload", str(tmp_path / "w.csv"), "--url", url, "--start-s", "2",
                 "--stop-s", "9", "--max-requests", "3", "--rate-scale", "50"]  # fmt: skip
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (figures["num_requests"], figures["num_completed"]) == (3, 3)
    assert sorted(len(s.ids) for s in engine.started) == [7, 8, 9]
    assert figures["ttft_s"]["count"] == 3
    assert "3 of 3 requests" in result.output
    assert "time between tokens" in result.output
    printed = CliRunner().invoke(app, [*arguments, "--json", "-"])
    assert json.loads(printed.stdout)["num_completed"] == 3


def test_the_command_fails_if_every_request_does(engine: FakeEngine, url: str) -> None:
    app = Typer()
    app.command()(serve_command)
    spec = "synthetic:requests=2,rate=100,prompt=500,output=2"
    result = CliRunner().invoke(app, ["--workload", spec, "--url", url])
    assert result.exit_code == 1
    assert "2 x HTTP 400: " in result.output
