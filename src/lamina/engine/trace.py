"""Writes the timeline as a trace that Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

The format is the JSON array of the Trace Event Format: complete events (`X`) in microseconds, flow
events (`s`, `t`, `f`), and metadata (`M`) that names the tracks. A worker is a process of the
trace, a micro-batch a thread of it. Arrows lead from a slice over its attention to the next one.

A record goes to the file in one write, so the file is a readable prefix at all times: the format
does not ask for the closing bracket, which `close` adds. Nothing is kept in memory but the names of
the tracks. With 28 layers and one attention worker a step takes about 40 kB.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from lamina.engine.events import AttentionMark, ModelMark, Phase, StepRecord, step_events
from lamina.errors import ConfigError

logger = logging.getLogger("lamina.engine")

_CATEGORIES = {
    Phase.SEND_Q: "hop",
    Phase.SEND_KV: "hop",
    Phase.WAIT: "wait",
    Phase.ATTEND: "attention",
    Phase.FINISH: "attention",
    Phase.PLAN: "engine",
    Phase.SAMPLE: "engine",
}


class TraceWriter:
    """One trace file. Not for several threads at once."""

    def __init__(self, file: str | Path) -> None:
        """Creates the file, or empties it.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._file = os.open(file, flags, 0o644)
        except OSError as error:
            raise ConfigError(f"trace cannot be written to {file}: {error.strerror}") from None
        self._pids: dict[str, int] = {}
        self._threads: set[tuple[int, int]] = set()
        self._start_s: float | None = None
        self._failed = False
        self._write("[")
        self._separator = "\n"

    def write(self, record: StepRecord) -> None:
        """Append a step: its events, and the arrows between them.

        When the disk is full the trace ends with a line in the log, and nothing else does.
        """
        if self._start_s is None:
            self._start_s = record.begin_s
        lines: list[str] = []
        for event in step_events(record):
            pid, tid = self._track(event.worker, event.micro_batch, lines)
            name = f"{event.phase} {event.layer}" if event.layer >= 0 else str(event.phase)
            begin_ns, end_ns = self._ns(event.begin_s), self._ns(event.end_s)
            # A difference of rounded times, so that an event never outlasts the next one's begin.
            lines.append(
                f'{{"name":"{name}","cat":"{_CATEGORIES.get(event.phase, "model")}","ph":"X",'
                f'"ts":{begin_ns / 1000:.3f},"dur":{(end_ns - begin_ns) / 1000:.3f},'
                f'"pid":{pid},"tid":{tid},"args":{{"step":{event.step}}}}}'
            )
        self._add_arrows(record, lines)
        self._write(self._separator + ",\n".join(lines))
        self._separator = ",\n"

    def close(self) -> None:
        """End the array. The file is then JSON for everybody."""
        self._write("\n]\n")
        os.close(self._file)

    def _ns(self, time_s: float) -> int:
        assert self._start_s is not None
        return round((time_s - self._start_s) * 1e9)

    def _track(self, worker: str, micro_batch: int, lines: list[str]) -> tuple[int, int]:
        """Process and thread of a worker's micro-batch; new ones are named first."""
        pid = self._pids.get(worker)
        if pid is None:
            pid = self._pids[worker] = len(self._pids) + 1
            _add_metadata(lines, "process", pid, 0, worker, pid)
        tid = micro_batch + 1
        if (pid, tid) not in self._threads:
            self._threads.add((pid, tid))
            _add_metadata(lines, "thread", pid, tid, f"micro-batch {micro_batch}", tid)
        return pid, tid

    def _add_arrows(self, record: StepRecord, lines: list[str]) -> None:
        """One flow per layer and attention worker: q -> attend -> append, merge -> next slice."""
        if not record.model:
            return
        slices = [_slice_begins(record, row) for row in range(len(record.model[0].times))]
        for worker, times in record.attention:
            for layer, row in enumerate(times.tolist()):
                if row[AttentionMark.ATTEND_BEGIN] == 0.0:
                    continue  # it only stored k and v
                points = (
                    ("s", *slices[layer]),
                    ("t", worker, row[AttentionMark.ATTEND_BEGIN]),
                    ("t", worker, row[AttentionMark.FINISH_BEGIN]),
                    ("f", *slices[layer + 1]),
                )
                for kind, place, time_s in points:
                    pid, tid = self._track(place, record.micro_batch, lines)
                    lines.append(
                        f'{{"name":"attention","cat":"flow","ph":"{kind}",'
                        f'"id":"{record.step}.{layer}.{worker}","ts":{self._ns(time_s) / 1000:.3f},'
                        f'"pid":{pid},"tid":{tid}' + (',"bp":"e"}' if kind == "f" else "}")
                    )

    def _write(self, text: str) -> None:
        data = text.encode()
        try:
            while data and not self._failed:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            self._failed = True
            logger.error("the trace ends here: %s", error.strerror)


def _slice_begins(record: StepRecord, row: int) -> tuple[str, float]:
    """The worker that ran a slice (of several ranks the first) and when it began."""
    begins = ((worker, float(times[row, ModelMark.BEGIN])) for worker, times in record.model)
    return next(begin for begin in begins if begin[1] > 0.0)


def _add_metadata(
    lines: list[str], kind: str, pid: int, tid: int, name: str, sort_index: int
) -> None:
    for event, arguments in (
        (f"{kind}_name", {"name": name}),
        (f"{kind}_sort_index", {"sort_index": sort_index}),
    ):
        record = {"name": event, "ph": "M", "pid": pid, "tid": tid, "args": arguments}
        lines.append(json.dumps(record))
