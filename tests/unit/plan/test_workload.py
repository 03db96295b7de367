"""Workloads: the public traces, files of any format, wrong files, and made-up ones."""

from __future__ import annotations

import gzip
import json
import statistics
from pathlib import Path

import pytest

from lamina.errors import ConfigError
from lamina.plan.workload import (
    Arrival,
    Lengths,
    Workload,
    open_workload,
    parse_lengths,
    read_azure,
    read_csv,
    read_mooncake,
    synthetic,
)
from support.traces import trace_file

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
OWN = "arrival_s,prompt_tokens,output_tokens\n"


def written(folder: Path, text: str, name: str = "w.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def times(workload: Workload) -> list[float]:
    return [a.time_s for a in workload.arrivals]


@pytest.mark.parametrize(
    ("file", "requests", "prompt", "output"),
    [
        ("azure_conv.csv.gz", 19366, 1154.7, 211.1),
        ("azure_code.csv.gz", 8819, 2047.8, 27.9),
        ("kimi_conv.csv.gz", 12031, 12035.1, 342.6),
        ("kimi_conv.jsonl.gz", 12031, 12035.1, 342.6),
    ],
)
def test_counts_and_means_of_the_papers_table(
    file: str, requests: int, prompt: float, output: float
) -> None:
    """To the printed digit; Azure-Code's 2047.848 is printed as 2047.8."""
    summary = open_workload(trace_file(file)).summary()
    assert summary.num_requests == requests
    assert summary.mean_prompt_tokens == pytest.approx(prompt, abs=0.0501)
    assert summary.mean_output_tokens == pytest.approx(output, abs=0.0501)


@pytest.mark.parametrize(
    ("file", "duration_s", "rate", "variation", "context"),
    [
        ("azure_conv.csv.gz", 3501.722, 5.530, 1.09, 1227.0),
        ("azure_code.csv.gz", 3435.948, 2.567, 13.15, 2130.9),
        ("kimi_conv.jsonl.gz", 3536.999, 3.401, 3.03, 13125.9),
        ("mooncake_synthetic.jsonl.gz", 1022.025, 3.907, 1.01, 7291.9),
    ],
)
def test_arrivals_and_load_of_the_traces(
    file: str, duration_s: float, rate: float, variation: float, context: float
) -> None:
    summary = open_workload(trace_file(file)).summary()
    assert summary.duration_s == pytest.approx(duration_s, abs=1e-3)
    assert summary.rate == pytest.approx(rate, abs=6e-4)
    assert summary.gap_variation == pytest.approx(variation, abs=6e-3)
    assert summary.mean_decode_context == pytest.approx(context, abs=0.06)


def test_prefix_hashes_of_a_trace() -> None:
    """Of Kimi-Conv, 36.6 % of the blocks are found in an unlimited cache."""
    seen: set[int] = set()
    num_blocks = num_found = 0
    for arrival in open_workload(trace_file("kimi_conv.jsonl.gz")).arrivals:
        num_blocks += len(arrival.prefix_hashes)
        num_found += sum(h in seen for h in arrival.prefix_hashes)
        seen.update(arrival.prefix_hashes)
    assert num_found / num_blocks == pytest.approx(0.366, abs=5e-4)


class TestFormats:
    def test_azure(self, tmp_path: Path) -> None:
        path = written(
            tmp_path,
            AZURE + "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n",
        )
        workload = read_azure(path)
        assert times(workload) == pytest.approx([0, 0.052], abs=1e-6)
        assert [a.prompt_tokens for a in workload.arrivals] == [4808, 3180]
        assert open_workload(path) == workload

    def test_azure_of_2024_has_time_zones(self, tmp_path: Path) -> None:
        rows = "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01.009930+00:00,2399,6\n"
        assert times(read_azure(written(tmp_path, AZURE + rows))) == pytest.approx([0, 1])

    def test_mooncake(self, tmp_path: Path) -> None:
        line = (
            '{"timestamp": 27482, "input_length": 700, "output_length": 52, "hash_ids": [46, 47]}'
        )
        path = written(tmp_path, line + "\n", "w.jsonl")
        assert read_mooncake(path).arrivals == (
            Arrival(time_s=27.482, prompt_tokens=700, output_tokens=52, prefix_hashes=(46, 47)),
        )
        assert open_workload(path) == read_mooncake(path)

    def test_our_own_as_json_lines(self, tmp_path: Path) -> None:
        rows = [{"arrival_s": 2.5, "prompt_tokens": 3, "output_tokens": 4}]
        path = written(tmp_path, "\n".join(map(json.dumps, rows)), "w.jsonl")
        assert open_workload(path).arrivals == (
            Arrival(time_s=2.5, prompt_tokens=3, output_tokens=4),
        )

    def test_our_own_csv_in_any_order_of_columns_and_rows(self, tmp_path: Path) -> None:
        path = written(
            tmp_path, "user,output_tokens,prompt_tokens,arrival_s\nann,1,2,9\n\nbob,3,4,0.5\n"
        )
        assert read_csv(path).arrivals == (
            Arrival(time_s=0.5, prompt_tokens=4, output_tokens=3),
            Arrival(time_s=9.0, prompt_tokens=2, output_tokens=1),
        )

    def test_gzip_is_seen_whatever_the_name(self, tmp_path: Path) -> None:
        path = tmp_path / "w.csv"
        path.write_bytes(gzip.compress((OWN + "1,2,3\n").encode()))
        assert times(open_workload(path)) == [1.0]

    def test_a_byte_order_mark_is_no_part_of_the_header(self, tmp_path: Path) -> None:
        path = tmp_path / "w.csv"
        path.write_bytes(b"\xef\xbb\xbf" + (OWN + "1,2,3\r\n").encode())
        assert times(open_workload(path)) == [1.0]


class TestMalformed:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("1,2", r"line 3: 2 fields, the header has 3"),
            ("1,2,3,4", r"line 3: 4 fields"),
            ("soon,2,3", r"line 3: arrival_s must be a number of at least 0, got 'soon'"),
            ("nan,2,3", r"line 3: arrival_s must be a number of at least 0, got 'nan'"),
            ("-1,2,3", r"line 3: arrival_s must be a number of at least 0, got '-1'"),
            ("1,2.5,3", r"line 3: prompt_tokens must be a whole number .*got '2.5'"),
            ("1,0,3", r"line 3: prompt_tokens must be a whole number of at least 1, got '0'"),
            ("1,2,", r"line 3: output_tokens must be a whole number of at least 1, got ''"),
            ('1,"2,3', r"line 3: "),
        ],
    )
    def test_csv(self, tmp_path: Path, row: str, message: str) -> None:
        with pytest.raises(ConfigError, match=rf"w\.csv, {message}"):
            open_workload(written(tmp_path, OWN + "0,1,1\n" + row + "\n"))

    def test_blank_lines_count(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"line 5: "):
            open_workload(written(tmp_path, OWN + "0,1,1\n\n \n1,x,1\n"))

    def test_azure_time(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"line 2: TIMESTAMP must be a time .*got 'noon'"):
            open_workload(written(tmp_path, AZURE + "noon,2,3\n"))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 2: not JSON"),
            ("[1]", r"line 2: must be an object, got '\[1\]'"),
            ('{"timestamp": 1, "input_length": 2}', "line 2: output_length is missing"),
            (
                '{"timestamp": "1s", "input_length": 2, "output_length": 3}',
                "line 2: timestamp must be a number",
            ),
            (
                '{"timestamp": true, "input_length": 2, "output_length": 3}',
                "line 2: timestamp must be a number",
            ),
            (
                '{"timestamp": 1, "input_length": 2.0, "output_length": 3}',
                "line 2: input_length must be a whole number",
            ),
            (
                '{"timestamp": 1, "input_length": 2, "output_length": 3, "hash_ids": ["a"]}',
                "line 2: hash_ids must be a list of whole numbers",
            ),
            (
                '{"timestamp": 1, "input_length": 513, "output_length": 3, "hash_ids": [1]}',
                "line 2: hash_ids has 1 entries; 513 prompt tokens are 2 blocks of 512",
            ),
        ],
    )
    def test_json_lines(self, tmp_path: Path, line: str, message: str) -> None:
        first = '{"timestamp": 0, "input_length": 1, "output_length": 1}\n'
        with pytest.raises(ConfigError, match=message):
            open_workload(written(tmp_path, first + line + "\n"))

    def test_unknown_formats(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"line 1: no known format.*got 'a,b'"):
            open_workload(written(tmp_path, "a,b\n1,2\n"))
        with pytest.raises(ConfigError, match="no known format"):
            open_workload(written(tmp_path, ""))

    def test_headers(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"header must name .*; output_tokens missing"):
            read_csv(written(tmp_path, "arrival_s,prompt_tokens\n"))

    def test_no_rows(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"w\.csv has no requests"):
            open_workload(written(tmp_path, OWN))

    def test_truncated_gzip(self, tmp_path: Path) -> None:
        path = tmp_path / "w.csv.gz"
        path.write_bytes(gzip.compress((OWN + "0,1,1\n" * 5000).encode())[:-20])
        with pytest.raises(ConfigError, match=r"w\.csv\.gz cannot be read"):
            open_workload(path)

    def test_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "w.csv"
        path.write_bytes(OWN.encode() + b"\xff\xfe\n")
        with pytest.raises(ConfigError, match="cannot be read"):
            open_workload(path)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is no file; give a CSV or JSONL file"):
            open_workload(tmp_path / "none.csv")


class TestScaling:
    workload = Workload(
        name="w",
        arrivals=tuple(
            Arrival(time_s=t, prompt_tokens=10, output_tokens=5, prefix_hashes=(t,))
            for t in range(0, 50, 10)
        ),
    )

    def test_faster(self) -> None:
        fast = self.workload.faster(2)
        assert times(fast) == [0, 5, 10, 15, 20]
        assert fast.rate == 2 * self.workload.rate
        assert [a.prefix_hashes for a in fast.arrivals] == [(t,) for t in range(0, 50, 10)]

    def test_at_a_rate(self) -> None:
        assert self.workload.at_rate(4.0).rate == pytest.approx(4.0)

    def test_slices_of_time_are_half_open_and_count_from_their_start(self) -> None:
        assert times(self.workload.between(10, 30)) == [0, 10]
        assert times(self.workload.between(15)) == [5, 15, 25]

    def test_the_first_requests(self) -> None:
        assert times(self.workload.first(2)) == [0, 10]
        assert self.workload.first(99) == self.workload

    def test_what_makes_no_sense_is_refused(self) -> None:
        for factor in (0, -1, float("inf"), float("nan")):
            with pytest.raises(ConfigError, match="must be positive"):
                self.workload.faster(factor)
            with pytest.raises(ConfigError, match="rate must be positive"):
                self.workload.at_rate(factor)
        with pytest.raises(ConfigError, match=r"no requests from 60 s to inf s; it lasts .* 40 s"):
            self.workload.between(60)
        with pytest.raises(ConfigError, match="at least 1"):
            self.workload.first(0)
        with pytest.raises(ConfigError, match="all requests of w arrive at once"):
            self.workload.first(1).at_rate(1)


class TestSynthetic:
    def made(self, **changes: object) -> Workload:
        settings: dict[str, object] = {
            "num_requests": 20_000,
            "rate": 4.0,
            "prompt": Lengths(kind="lognormal", mean=1000, spread=1.3),
            "output": Lengths(kind="exponential", mean=200),
        }
        return synthetic(**settings | changes)  # type: ignore[arg-type]

    def test_rate_and_means(self) -> None:
        summary = self.made().summary()
        assert summary.rate == pytest.approx(4.0, rel=0.02)
        assert summary.mean_prompt_tokens == pytest.approx(1000, rel=0.002)
        assert summary.mean_output_tokens == pytest.approx(200, rel=0.005)

    def test_the_same_seed_makes_the_same_workload(self) -> None:
        assert self.made(seed=3) == self.made(seed=3)
        assert self.made(seed=3) != self.made(seed=4)

    @pytest.mark.parametrize(
        ("arrivals", "variation", "expected"),
        [("poisson", 1.0, 1.0), ("gamma", 3.0, 3.0), ("gamma", 0.5, 0.5), ("even", 1.0, 0.0)],
    )
    def test_burstiness(self, arrivals: str, variation: float, expected: float) -> None:
        made = self.made(arrivals=arrivals, variation=variation).summary()
        assert made.gap_variation == pytest.approx(expected, rel=0.05, abs=1e-6)
        assert made.rate == pytest.approx(4.0, rel=0.06)

    def test_spread_of_lognormal_lengths(self) -> None:
        lengths = [a.prompt_tokens for a in self.made().arrivals]
        assert statistics.pstdev(lengths) / statistics.mean(lengths) == pytest.approx(1.3, rel=0.1)

    def test_constant_and_uniform_lengths(self) -> None:
        made = self.made(
            prompt=Lengths(kind="constant", mean=7),
            output=Lengths(kind="uniform", mean=9, spread=2),
        )
        assert {a.prompt_tokens for a in made.arrivals} == {7}
        assert {a.output_tokens for a in made.arrivals} == {7, 8, 9, 10, 11}

    def test_from_a_description(self) -> None:
        made = open_workload(
            "synthetic:requests=10,rate=2,prompt=64,output=uniform:8:4,arrivals=even,seed=5"
        )
        assert times(made) == [i / 2 for i in range(10)]
        assert all(a.prompt_tokens == 64 and 4 <= a.output_tokens <= 12 for a in made.arrivals)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("rte=1", "'rte' is no setting; there are requests, rate, "),
            ("rate", "'rate' must be a setting such as rate=4"),
            ("rate=fast", "rate must be a number, got 'fast'"),
            ("rate=0", "rate must be positive"),
            ("requests=1.5", "requests must be a whole number"),
            ("requests=0", "requests must be at least 1"),
            ("seed=-1", "seed must be a whole number of at least 0"),
            ("arrivals=never", "arrivals must be one of poisson, gamma, even, got 'never'"),
            ("arrivals=gamma,variation=0", "variation must be positive"),
            ("prompt=normal:5", "prompt must be lengths such as 512.*got 'normal:5'"),
            ("output=lognormal:5", "output must be lengths such as 512"),
            ("prompt=0", "mean length must be at least 1"),
            ("prompt=uniform:5:9", "uniform lengths must be at least 1 token"),
            ("prompt=lognormal:5:-1", "spread of lengths must be at least 0"),
        ],
    )
    def test_wrong_descriptions(self, text: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            open_workload(f"synthetic:{text}")

    def test_lengths(self) -> None:
        assert parse_lengths("12", "p") == Lengths(kind="constant", mean=12)
        assert parse_lengths("lognormal:12:0.5", "p") == Lengths(
            kind="lognormal", mean=12, spread=0.5
        )
