"""The life of worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamina.workers.process import (
    ORPHAN_EXIT_CODE,
    WorkerProcess,
    pinned_pool,
    start_fork_server,
)

Start = Callable[..., WorkerProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[WorkerProcess] = []

    def make(code: str, **arguments: object) -> WorkerProcess:
        """A worker that runs `code`: `exec` can be imported in the child, a test's own can't."""
        started.append(WorkerProcess("worker", exec, (code,), **arguments))  # type: ignore[arg-type]
        return started[-1]

    yield make
    for process in started:
        process.terminate(0)


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"in {timeout_s} s: {what}"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def ready(path: Path) -> str:
    """Code that tells the test that the child runs."""
    return f"open({str(path)!r}, 'w').close()"


def test_second_worker_starts_fast(start: Start) -> None:
    assert start("").join(30)
    begin = time.monotonic()
    assert start("import torch").join(30)
    assert time.monotonic() - begin < 1.0


@pytest.mark.parametrize(
    ("code", "exitcode"),
    [
        ("", 0),
        ("raise SystemExit(7)", 7),
        ("import os; os._exit(9)", 9),
        ("import os; os.kill(os.getpid(), 9)", -9),
    ],
)
def test_exit_codes_reach_the_watcher(start: Start, code: str, exitcode: int) -> None:
    exits: list[tuple[str, int]] = []
    process = start(code, on_exit=lambda name, status: exits.append((name, status)))
    assert process.join(30)
    wait_for(lambda: bool(exits), "the watcher calls back")
    assert exits == [("worker", exitcode)]
    assert process.exitcode == exitcode
    assert not process.is_alive


def test_killed_worker_is_noticed_at_once(start: Start, tmp_path: Path) -> None:
    exited = threading.Event()
    code = f"{ready(tmp_path / 'ready')}; import time; time.sleep(60)"
    process = start(code, on_exit=lambda name, status: exited.set())
    wait_for((tmp_path / "ready").exists, "the child runs", 30)
    assert process.is_alive
    assert process.exitcode is None
    begin = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    assert exited.wait(5)
    assert time.monotonic() - begin < 0.5
    assert process.exitcode == -signal.SIGKILL


def test_many_exits_at_the_same_time_keep_their_codes(start: Start) -> None:
    processes = [start(f"raise SystemExit({code})") for code in range(1, 11)]
    assert all(process.join(30) for process in processes)
    assert [process.exitcode for process in processes] == list(range(1, 11))


def test_terminate_ends_cleanly(start: Start, tmp_path: Path) -> None:
    process = start(
        f"""
import time
try:
    {ready(tmp_path / "ready")}
    time.sleep(60)
finally:
    {ready(tmp_path / "cleaned up")}
"""
    )
    wait_for((tmp_path / "ready").exists, "the child runs", 30)
    process.terminate(10)
    assert process.exitcode == 0
    assert (tmp_path / "cleaned up").exists()
    process.terminate(10)


def test_terminate_kills_what_does_not_listen(start: Start, tmp_path: Path) -> None:
    process = start(
        f"""
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
{ready(tmp_path / "ready")}
time.sleep(60)
"""
    )
    wait_for((tmp_path / "ready").exists, "the child runs", 30)
    begin = time.monotonic()
    process.terminate(0.2)
    assert time.monotonic() - begin < 2
    assert process.exitcode == -signal.SIGKILL


def test_interrupts_are_the_parents_business(start: Start, tmp_path: Path) -> None:
    process = start(
        f"{ready(tmp_path / 'ready')}; import time; time.sleep(0.5); raise SystemExit(5)"
    )
    wait_for((tmp_path / "ready").exists, "the child runs", 30)
    os.kill(process.pid, signal.SIGINT)
    assert process.join(10)
    assert process.exitcode == 5


def test_threads_are_limited(start: Start) -> None:
    code = "import os, torch; os._exit(10 * torch.get_num_threads() + int(os.environ['{}']))"
    process = start(code.format("OMP_NUM_THREADS"), num_threads=2)
    assert process.join(30)
    assert process.exitcode == 22


def test_a_worker_may_have_workers(start: Start, tmp_path: Path) -> None:
    process = start(
        f"""
import time
from lamina.workers.process import WorkerProcess
inner = WorkerProcess("inner", time.sleep, (60,))
with open({str(tmp_path / "writing")!r}, "w") as file:
    file.write(str(inner.pid))
import os; os.rename({str(tmp_path / "writing")!r}, {str(tmp_path / "pid")!r})
time.sleep(60)
"""
    )
    wait_for((tmp_path / "pid").exists, "the inner worker runs", 30)
    pid = int((tmp_path / "pid").read_text())
    assert is_running(pid)
    process.terminate(10)
    assert process.exitcode == 0
    wait_for(lambda: not is_running(pid), "the inner worker ends")


_SCRIPT = """
import os, sys, time
print("script runs", flush=True)
from lamina.workers.process import WorkerProcess
workers = [WorkerProcess(f"w{i}", time.sleep, (60,)) for i in range(2)]
print(*(worker.pid for worker in workers), flush=True)
if sys.argv[1] == "stay":
    time.sleep(60)
"""


def program(folder: Path, how: str, mode: str) -> subprocess.Popen[str]:
    """A program without a main guard that has two workers, run as a script or as a module."""
    (folder / "program.py").write_text(_SCRIPT)
    arguments = {"script": ["program.py"], "module": ["-m", "program"]}[how]
    return subprocess.Popen(
        [sys.executable, *arguments, mode], stdout=subprocess.PIPE, text=True, cwd=folder
    )


@pytest.mark.parametrize(
    ("how", "end"),
    [("script", signal.SIGKILL), ("module", signal.SIGINT), ("script", signal.SIGTERM)],
)
def test_no_orphans_when_the_parent_dies(how: str, end: signal.Signals, tmp_path: Path) -> None:
    process = program(tmp_path, how, "stay")
    assert process.stdout is not None
    assert process.stdout.readline() == "script runs\n"
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    assert all(is_running(pid) for pid in pids)
    process.send_signal(end)
    wait_for(lambda: not any(is_running(pid) for pid in pids), "all workers end")
    process.communicate(timeout=10)


def test_workers_end_when_the_parent_exits(tmp_path: Path) -> None:
    process = program(tmp_path, "script", "leave")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.count("script runs") == 1
    assert not any(is_running(int(pid)) for pid in output.split("\n")[1].split())


def test_exit_with_parent_watches_standard_input() -> None:
    code = (
        "import sys, time; from lamina.workers.process import exit_with_parent;"
        "sys.stdin.readline(); exit_with_parent(sys.stdin.fileno()); print('ok', flush=True);"
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("hello\n")
    process.stdin.flush()
    assert process.stdout.readline() == "ok\n"
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(5) == ORPHAN_EXIT_CODE
    process.stdout.close()


def test_fork_server_starts_without_waiting() -> None:
    begin = time.monotonic()
    start_fork_server()
    assert time.monotonic() - begin < 0.5


def test_a_pool_is_kept_to_its_cores() -> None:
    core = min(os.sched_getaffinity(0))
    seen: list[set[int]] = []

    def pin() -> None:
        before = os.sched_getaffinity(0)
        pinned_pool(2, ())
        seen.append(os.sched_getaffinity(0) - before)
        pinned_pool(2, (core,))
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=pin)  # affinity belongs to a thread
    thread.start()
    thread.join()
    assert seen == [set(), {core}]
