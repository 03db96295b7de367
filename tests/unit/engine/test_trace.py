"""The trace file against the rules of the Trace Event Format."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lamina.engine.events import step_events
from lamina.engine.trace import TraceWriter
from lamina.errors import ConfigError
from support.timelines import Durations, pipeline

RECORDS = pipeline(Durations(deferred=1e-4), num_micro_batches=2, num_layers=3, num_steps=4)


def events_of(file: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(file.read_text())
    return events


@pytest.fixture
def events(tmp_path: Path) -> list[dict[str, Any]]:
    writer = TraceWriter(tmp_path / "trace.json")
    for record in RECORDS:
        writer.write(record)
    writer.close()
    return events_of(tmp_path / "trace.json")


def test_every_phase_is_a_complete_event(events: list[dict[str, Any]]) -> None:
    complete = [e for e in events if e["ph"] == "X"]
    expected = [event for record in RECORDS for event in step_events(record)]
    assert len(complete) == len(expected)
    for event in complete:
        assert event.keys() == {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"}
        assert event["ts"] >= 0
        assert event["dur"] > 0
    q = [e for e in complete if e["name"] == "q 0"]
    assert len(q) == len(RECORDS)
    assert q[0]["dur"] == pytest.approx(2000.0, abs=0.01)
    assert {e["args"]["step"] for e in complete} == {record.step for record in RECORDS}


def test_a_track_per_worker_and_micro_batch(events: list[dict[str, Any]]) -> None:
    names: dict[str, set[str]] = defaultdict(set)
    workers = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    for event in events:
        if event["name"] == "thread_name":
            names[workers[event["pid"]]].add(event["args"]["name"])
    both = {"micro-batch 0", "micro-batch 1"}
    assert names == {"engine": both, "model": both, "attention-worker-1": both}
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] != "M"} == named


def test_events_of_a_track_follow_each_other(events: list[dict[str, Any]]) -> None:
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append((event["ts"], event["dur"]))
    for track in tracks.values():
        track.sort()
        for (begin, duration), (after, _) in pairwise(track):
            # To the nanosecond: viewers drop an event that begins in another and outlasts it.
            assert round(1000 * begin) + round(1000 * duration) <= round(1000 * after)


def test_arrows_lead_from_a_slice_to_the_next(events: list[dict[str, Any]]) -> None:
    flows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            flows[event["id"]].append(event)
    assert len(flows) == len(RECORDS) * 3
    slices = [e for e in events if e["ph"] == "X"]
    for flow in flows.values():
        assert "".join(e["ph"] for e in flow) == "sttf"
        assert len({(e["name"], e["cat"]) for e in flow}) == 1
        assert flow[-1]["bp"] == "e"  # the arrow ends in the slice around its time
        at = [e["ts"] for e in flow]
        assert at == sorted(at)
        for event in flow:  # each point lies in an event of its track
            assert any(
                s["pid"] == event["pid"]
                and s["tid"] == event["tid"]
                and s["ts"] <= event["ts"] <= s["ts"] + s["dur"]
                for s in slices
            )


def test_a_file_cut_off_is_a_readable_prefix(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    writer = TraceWriter(file)
    for record in RECORDS[:3]:
        writer.write(record)
        json.loads(file.read_text() + "]")  # as Perfetto reads an array without an end
    before = len(json.loads(file.read_text() + "]"))
    writer.write(RECORDS[3])
    writer.close()
    assert len(events_of(file)) > before


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trace cannot be written to .*No such file"):
        TraceWriter(tmp_path / "missing" / "trace.json")


def test_an_empty_trace_is_an_empty_array(tmp_path: Path) -> None:
    TraceWriter(tmp_path / "trace.json").close()
    assert events_of(tmp_path / "trace.json") == []


def test_a_full_disk_ends_the_trace_alone(caplog: pytest.LogCaptureFixture) -> None:
    writer = TraceWriter("/dev/full")
    for record in RECORDS:
        writer.write(record)
    writer.close()
    assert [r.getMessage() for r in caplog.records] == [
        "the trace ends here: No space left on device"
    ]
