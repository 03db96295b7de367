"""The picture of a pipeline, over a timeline of which every duration is known."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lamina.bench.picture import choose
from lamina.cli.bench.output import write_plot
from lamina.cli.bench.timeline import draw
from lamina.cli.main import app
from lamina.engine.events import Phase
from lamina.errors import ConfigError
from support.timelines import Durations, pipeline

RECORDS = pipeline(Durations(deferred=1e-3), num_micro_batches=2, num_layers=6, num_steps=5)


def test_it_shows_the_layers_in_the_middle() -> None:
    picture = choose(RECORDS, num_layers=2)
    assert picture.workers == ("model", "attention-worker-1")
    attended = {e.layer for e in picture.events if e.phase is Phase.ATTEND}
    assert {2, 3} <= attended
    (q,) = [e for e in picture.events if e.begin_s == picture.begin_s]
    assert (q.phase, q.layer) == (Phase.Q, 2)
    assert {event.micro_batch for event in picture.events} == {0, 1}
    assert {event.phase for event in picture.events} >= {Phase.Q, Phase.DEFERRED, Phase.FINISH}
    assert all(e.end_s > picture.begin_s and e.begin_s < picture.end_s for e in picture.events)
    there = [hop for hop in picture.hops if hop.sender == "model"]
    back = [hop for hop in picture.hops if hop.receiver == "model"]
    assert len(there) >= 3
    assert len(back) >= 3
    assert all(hop.end_s >= hop.begin_s for hop in picture.hops)


def test_it_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.svg"
    picture = choose(RECORDS, num_layers=3)
    write_plot(file, lambda axes: draw(picture, axes), size=(10, 3))
    assert file.read_text().startswith("<?xml")


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="layers must be at most 28, got 29"):
        CliRunner().invoke(app, ["bench", "timeline", "x.svg", "--layers", "29"],
                           catch_exceptions=False)  # fmt: skip


def test_a_disturbed_step_is_not_shown() -> None:
    disturbed = []
    for index, record in enumerate(RECORDS):
        if index in (3, 6):  # half a second away from the computer
            (model,) = record.model
            times = model.times.copy()
            times[3:] += 0.5
            record = record._replace(model=(model._replace(times=times),))
        disturbed.append(record)
    picture = choose(disturbed, num_layers=2)
    assert picture.end_s - picture.begin_s < 0.1
