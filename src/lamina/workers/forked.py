"""Processes forked from one that has made what they share, such as a model's packed weights.

What the parent had in memory ahead of the fork is one copy for all as long as nobody writes to it.
Threads do not survive a fork, and locks that one of them held stay locked in the child: the parent
must have none that compute (a `ThreadPool(1)`, torch with one thread) and no ZeroMQ context.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait as wait_for_any

from lamina.workers.process import ORPHAN_EXIT_CODE, ignore_interrupts

_context = multiprocessing.get_context("fork")
_PR_SET_PDEATHSIG = 1


class ForkedWorkers:
    """Children that run their targets at once. Used by the thread that forked them.

    A child ends when its parent does, however that dies and even if the child is stopped (one that
    is stopped before its target runs: when it continues). Exit codes are a `WorkerProcess`'s.
    """

    def __init__(self, targets: Mapping[str, Callable[[], None]]) -> None:
        """Fork a child per name."""
        gc.collect()
        gc.freeze()  # a collection in a child would write to every object it walks
        self._children = {
            name: _context.Process(target=_run, args=(target, os.getpid()), name=name)
            for name, target in targets.items()
        }
        with warnings.catch_warnings():
            # The watcher of our own parent waits in a system call and holds no lock.
            warnings.filterwarnings(
                "ignore", "This process .* is multi-threaded", DeprecationWarning
            )
            for child in self._children.values():
                child.start()

    @property
    def pids(self) -> dict[str, int]:
        """Of the children that run."""
        return {name: child.pid for name, child in self._children.items() if child.pid is not None}

    def wait(self, timeout_s: float | None = None) -> dict[str, int]:
        """Wait until a child has ended; the exit codes of those that have, each told once.

        Empty after `timeout_s`, and when no child is left.
        """
        by_sentinel = {child.sentinel: name for name, child in self._children.items()}
        ended = {}
        for sentinel in wait_for_any(list(by_sentinel), timeout_s) if by_sentinel else ():
            assert isinstance(sentinel, int)
            child = self._children.pop(name := by_sentinel[sentinel])
            child.join()
            assert child.exitcode is not None, "its sentinel said that it has ended"
            ended[name] = child.exitcode
        return ended

    def __len__(self) -> int:
        """Children that still run, as far as `wait` has told."""
        return len(self._children)

    def terminate(self, grace_s: float) -> None:
        """Send SIGTERM, after `grace_s` SIGKILL to those that still run. Blocks until all ended."""
        for child in self._children.values():
            child.terminate()
        deadline = time.monotonic() + grace_s
        while self._children and (left_s := deadline - time.monotonic()) > 0:
            self.wait(left_s)
        for child in self._children.values():
            child.kill()
        while self._children:
            self.wait()


def _run(target: Callable[[], None], parent_pid: int) -> None:
    # The system does it, not a thread that waits for an end of file: a stopped process runs none.
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) or os.getppid() != parent_pid:
        os._exit(ORPHAN_EXIT_CODE)
    ignore_interrupts()
    target()
