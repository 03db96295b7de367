"""The runner's side of each subject: a process of its own, stopped while others have their turn."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rows import Row

_END_GRACE_S = 10.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class SubjectFailed(RuntimeError):
    """A subject did not answer; the message names it and its log."""


class Subject(Protocol):
    """What the runner asks of a subject. Times are seconds, without loading and starting."""

    name: str
    version: str

    def prefill(self, row: Row, seed: int) -> float:
        """Compute the row's prompts until each has its first token, forgetting earlier ones."""

    def prepare(self, row: Row, seed: int) -> None:
        """Be ready to decode from the row's context."""

    def decode(self, num_steps: int) -> float:
        """Generate `num_steps` more tokens of every sequence."""

    def cpu_s(self) -> float:
        """CPU seconds that its processes have used so far."""

    def close(self) -> None:
        """End its processes."""


def group_cpu_s(group: int) -> float:
    """CPU seconds that the living processes of a process group have used."""
    ticks = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group:
                    ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_S


def machine_cpu_s() -> float:
    """Seconds that all cores together were busy (or taken by the hypervisor) since the boot."""
    fields = [int(text) for text in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    user, nice, system, _idle, _wait, interrupt, soft_interrupt, steal = fields
    return (user + nice + system + interrupt + soft_interrupt + steal) / _TICKS_PER_S


class ServedSubject:
    """A Python subject behind `serving.serve`, with its own interpreter and environment."""

    def __init__(
        self,
        name: str,
        python: Path,
        script: str,
        settings: Mapping[str, Any],
        environment: Mapping[str, str],
        *,
        log: Path,
        vocab_size: int,
        freeze: bool,
    ) -> None:
        """Blocks until it is loaded.

        Args:
            script: the file beside this one to run.
            log: receives everything that the subject prints.
            freeze: stop the whole process group (SIGSTOP) between its turns.
        """
        self.name, self.version = name, ""
        self._log, self._vocab_size, self._freeze = log, vocab_size, freeze
        path = Path(__file__).parent / script
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [str(python), str(path), json.dumps(dict(settings))],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                bufsize=1,
                start_new_session=True,
            )
        try:
            self.version = str(self._receive())
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def cpu_s(self) -> float:
        return group_cpu_s(self._process.pid)

    def prefill(self, row: Row, seed: int) -> float:
        seconds = self._call("prefill", row.batch, row.context, self._vocab_size, seed)
        assert isinstance(seconds, float)
        return seconds

    def prepare(self, row: Row, seed: int) -> None:
        self.prefill(row, seed)

    def decode(self, num_steps: int) -> float:
        seconds = self._call("decode", num_steps)
        assert isinstance(seconds, list), "one number per step"
        return float(sum(seconds))

    def close(self) -> None:
        """Blocks up to ten seconds; a subject in the middle of a turn is killed then."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # also helpers that it left behind
        self._process.wait()

    def _call(self, method: str, *arguments: int) -> object:
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
        result = self._receive()
        self._signal(signal.SIGSTOP)
        return result

    def _receive(self) -> object:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SubjectFailed(f"{self.name} ended; see the end of {self._log}")
        message = json.loads(line)
        if "error" in message:
            raise SubjectFailed(f"{self.name}: {message['error']}; see the end of {self._log}")
        return message["result"]

    def _signal(self, number: signal.Signals) -> None:
        if self._freeze:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


class LlamaCppSubject:
    """llama.cpp's llama-batched-bench, which cannot be kept loaded: one process per turn.

    It times prompts and generation itself and leaves loading out. Its generation has no sampling,
    which every other subject's has (greedy): an advantage of microseconds.
    """

    def __init__(
        self,
        program: Path,
        model: Path,
        *,
        version: str,
        threads: int,
        options: Sequence[str],
        log: Path,
    ) -> None:
        """`options`: further arguments of llama-batched-bench; they come last and win."""
        self.name, self.version = "llama.cpp", version
        self._log, self._options = log, list(options)
        self._command = [str(program), "-m", str(model), "--output-format", "jsonl"]
        self._command += ["-t", str(threads), "-tb", str(threads), "-fa", "on"]
        self._batch = self._length = 0

    def prefill(self, row: Row, seed: int) -> float:
        """Takes the second of two rounds: the first still touches memory for the first time."""
        prompts = [str(row.context)] * 2
        return self._run(row.batch, row.context + 1, ["-npp", ",".join(prompts), "-ntg", "1"])[0]

    def prepare(self, row: Row, seed: int) -> None:
        self._batch, self._length = row.batch, row.context

    def decode(self, num_steps: int) -> float:
        # -pps: one prompt is computed and its cache copied for every sequence, which saves minutes.
        lengths = ["-npp", str(self._length), "-ntg", str(num_steps), "-pps"]
        seconds = self._run(self._batch, self._length + num_steps + 1, lengths)[1]
        self._length += num_steps
        return seconds

    def cpu_s(self) -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)  # those that have ended
        return children.ru_utime + children.ru_stime

    def close(self) -> None:
        """Nothing runs between turns."""

    def _run(self, batch: int, length: int, lengths: list[str]) -> tuple[float, float]:
        """Seconds of prompts and of generation, of the last round."""
        context = batch * -(-length // 256) * 256  # the cache is divided evenly in steps of 256
        command = [*self._command, *lengths, "-npl", str(batch), "-c", str(context)]
        with self._log.open("w") as output:
            result = subprocess.run(
                [*command, *self._options], stdout=subprocess.PIPE, stderr=output, text=True
            )
        lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
        if result.returncode or not lines:
            raise SubjectFailed(
                f"llama-batched-bench measured nothing (exit code {result.returncode}); "
                f"see {self._log}, and run: {' '.join([*command, *self._options])}"
            )
        last = json.loads(lines[-1])
        return float(last["t_pp"]), float(last["t_tg"])
