"""The engine's process as the front end sees it: started with one line, ended in three steps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence

from lamina.config import THREAD_ENVIRONMENT

_TERMINATE_S = 2.0
"""How long the process has between SIGTERM and SIGKILL."""


class EngineProcess:
    """A child process that lives no longer than its standard input is open."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Use `EngineProcess.start`."""
        self._process = process

    @classmethod
    async def start(cls, command: Sequence[str], line: bytes) -> EngineProcess:
        """Start `command` and write `line` to its standard input, which then stays open.

        Its standard output joins the errors: ours belongs to whoever uses the engine.
        """
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=2,
            env={**THREAD_ENVIRONMENT, **os.environ},
        )
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it is gone already; `wait` tells
            process.stdin.write(line + b"\n")
            await process.stdin.drain()
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """The exit code, negative for a signal, once the process has ended."""
        return await self._process.wait()

    async def stop(self, grace_s: float) -> int:
        """Wait `grace_s` for the process to end by itself, then SIGTERM, then SIGKILL."""
        process = self._process
        for wait_s, escalate in ((grace_s, process.terminate), (_TERMINATE_S, process.kill)):
            try:
                await asyncio.wait_for(process.wait(), wait_s)
                break
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    escalate()
        code = await process.wait()
        if process.stdin is not None:
            process.stdin.close()
            with contextlib.suppress(ConnectionError):
                await process.stdin.wait_closed()
        return code


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
