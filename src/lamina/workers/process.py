"""The life of worker processes: started fast, watched, ended with their parent whatever happens.

Workers are forked from a fork server that has imported torch already, so that the second one starts
in a fraction of a second. The target must be an importable function: the parent's `__main__` is
never run again in a child, so a script needs no main guard.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, util
from multiprocessing.connection import wait as wait_for_any

from lamina._native import ThreadPool

ORPHAN_EXIT_CODE = 70
"""Of a process whose parent died."""
_PRELOADED = ("torch", "lamina.workers.process", "lamina.workers.attention")
_MODEL_PRELOADED = ("lamina.workers.host",)
"""What model hosts need beyond that: transformers takes as long to import as torch."""
_PRELOADED_LAST = ("lamina.workers.frozen",)
_EXIT_GRACE_S = 2.0
"""How long children may take to end when their parent exits, before they are killed."""
_context = multiprocessing.get_context("forkserver")
# Starting a child polls all others, which must not meet a watcher that reads the same exit code.
_processes_lock = threading.RLock()


def exit_with_parent(descriptor: int) -> None:
    """End this process at once when the parent dies, even by SIGKILL.

    Args:
        descriptor: the reading end of a pipe whose only writing end the parent holds and never
            writes to, e.g. of standard input. A thread reads from it from now on.
    """

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(descriptor, 1024):
                pass
        os._exit(ORPHAN_EXIT_CODE)

    threading.Thread(target=watch, name="lamina-exit-with-parent", daemon=True).start()


def ignore_interrupts() -> None:
    """Leave Ctrl-C, which a terminal sends to all its processes, to the parent.

    SIGTERM ends this process cleanly: SystemExit(0) in the main thread. Call it from there.
    """

    def end(signal_number: int, frame: types.FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)


def limit_threads(num_threads: int) -> None:
    """Let torch (and libraries loaded later) use `num_threads` threads in this process."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(num_threads)
    import torch

    torch.set_num_threads(num_threads)


def pinned_pool(
    num_threads: int, cores: Sequence[int], pool: ThreadPool | None = None
) -> ThreadPool:
    """Threads for native work, kept to `cores`: one each while there are enough, else any of them.

    The calling thread is the pool's first, and is kept there too. No cores: nothing is pinned.

    Args:
        pool: one of one thread, made ahead of a fork, that gets the threads; None: a new one.
    """
    pool = pool or ThreadPool(1)
    if not cores:
        pool.grow(num_threads)
        return pool
    os.sched_setaffinity(0, cores)
    if len(cores) < num_threads:
        pool.grow(num_threads)
        return pool
    pool.grow(num_threads, list(cores[:num_threads]))
    os.sched_setaffinity(0, cores[:1])
    return pool


def start_fork_server(*, for_models: bool = False) -> None:
    """Start the fork server, if it does not run yet. Does not wait for it.

    It takes some seconds to import torch; call this early and do something else meanwhile.

    Args:
        for_models: model hosts will be started.
    """
    with _processes_lock, _without_main():
        models = _MODEL_PRELOADED if for_models else ()
        _context.set_forkserver_preload([*_PRELOADED, *models, *_PRELOADED_LAST])
        forkserver.ensure_running()


class WorkerProcess:
    """A child process and the thread that watches it. Methods may be called from any thread."""

    def __init__(
        self,
        name: str,
        target: Callable[..., None],
        args: tuple[object, ...] = (),
        *,
        num_threads: int | None = None,
        on_exit: Callable[[str, int], None] | None = None,
    ) -> None:
        """Start it at once; blocks for some milliseconds once the fork server runs.

        Args:
            name: for messages.
            target: a function of an importable module, called with `args` (which are pickled) in
                the child. Its return ends the child with exit code 0, SystemExit with its own code,
                any other exception with 1 and a traceback; signals as in `ignore_interrupts`.
            num_threads: threads for torch in the child; None: torch's default.
            on_exit: called once with the name and the exit code (-N: killed by signal N), from the
                watching thread, within milliseconds.
        """
        self.name = name
        self._on_exit = on_exit
        self._exitcode: int | None = None
        self._ended = threading.Event()
        assert target.__module__ != "__main__", "the target must be in an importable module"
        start_fork_server()
        self._process = _context.Process(
            target=_run_child, args=(target, args, num_threads), name=name, daemon=False
        )
        # Not daemonic, so that it may have children. When this process exits, multiprocessing would
        # wait for it forever, hence this; atexit would not do, it does not run in child processes.
        self._at_exit = util.Finalize(None, self.terminate, exitpriority=100)
        with _processes_lock, _without_main():
            self._process.start()
        assert self._process.pid is not None, "it has been started"
        self.pid: int = self._process.pid
        threading.Thread(target=self._watch, name=f"lamina-watch-{name}", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        return not self._ended.is_set()

    @property
    def exitcode(self) -> int | None:
        """None while it runs; -N if signal N killed it."""
        return self._exitcode

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the process has ended; False if it still runs after `timeout_s`."""
        return self._ended.wait(timeout_s)

    def terminate(self, grace_s: float = _EXIT_GRACE_S) -> None:
        """Send SIGTERM, and SIGKILL if it still runs after `grace_s`. Blocks until it has ended."""
        self._signal(signal.SIGTERM)
        if not self.join(grace_s):
            self._signal(signal.SIGKILL)
            self.join()

    def _signal(self, number: signal.Signals) -> None:
        # The lock keeps the watcher from noting the end between the check and the signal.
        with _processes_lock, contextlib.suppress(ProcessLookupError):
            if self._exitcode is None:
                os.kill(self.pid, number)

    def _watch(self) -> None:
        wait_for_any([self._process.sentinel])
        with _processes_lock:
            self._process.join()
            exitcode = self._process.exitcode
            assert exitcode is not None, "its sentinel said that it has ended"
            self._exitcode = exitcode
        self._at_exit.cancel()
        self._ended.set()
        if self._on_exit is not None:
            self._on_exit(self.name, exitcode)


def _run_child(
    target: Callable[..., None], args: tuple[object, ...], num_threads: int | None
) -> None:
    ignore_interrupts()
    parent = multiprocessing.parent_process()
    assert parent is not None, "only children of the fork server run this"
    exit_with_parent(parent.sentinel)
    if num_threads is not None:
        limit_threads(num_threads)
    target(*args)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hide `__main__` from multiprocessing, which would run it again in every child."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
