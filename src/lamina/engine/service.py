"""The engine's process: `python -m lamina.engine.service`, started by `engine.client`.

One line of JSON on standard input says what to run and where the client listens; afterwards the
pipe only has to stay open, its end tells that the client is gone. Messages: `engine.messages`.

After a failure (a lost worker, an error in a step) the process stays, so that the client can tell
people why, until it is shut down; its exit code is then 1.
"""

from __future__ import annotations

import gc
import logging
import sys
import traceback

import msgspec
import zmq

from lamina.config import EngineConfig
from lamina.engine.engine import Engine
from lamina.engine.messages import (
    Abort,
    AddRequests,
    CheckIntegrity,
    Failed,
    FromEngine,
    IntegrityReport,
    Outputs,
    Ready,
    Shutdown,
    ToEngine,
    decode_to_engine,
    encode,
)
from lamina.engine.start import StartedEngine, start_engine
from lamina.errors import EngineDead, LaminaError
from lamina.workers.process import exit_with_parent, ignore_interrupts

logger = logging.getLogger("lamina.engine")

_IDLE_POLL_MS = 50
"""How often an idle engine looks whether all its workers are alive."""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The line on standard input."""

    config: EngineConfig
    address: str
    """ZeroMQ address of the client's PAIR socket."""


class EngineService:
    """The loop between the client's socket and the engine."""

    def __init__(self, start: Start) -> None:
        self._config = start.config
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(start.address)
        self._engine: Engine | None = None
        self._started: StartedEngine | None = None
        self._failed = False

    def run(self) -> int:
        """Serve until Shutdown. Returns the process's exit code."""
        try:
            self._start_engine()
        except LaminaError as error:
            self._send(Failed(type(error).__name__, str(error)))  # whoever started us says it
            self._stop()
            return 1
        assert self._engine is not None
        # What lives now lives to the end. No collection has to walk it, the one at exit included.
        gc.freeze()
        self._send(Ready(self._engine.info, self._engine.stats()))
        shutdown = False
        while not shutdown:
            idle = self._failed or not self._engine.has_work
            shutdown = self._receive(_IDLE_POLL_MS if idle else 0)
            if not self._failed and not shutdown:
                self._advance(self._engine)
        self._stop()
        return 1 if self._failed else 0

    def _start_engine(self) -> None:
        self._started = start_engine(self._config, progress=sys.stderr.isatty())
        self._engine = self._started.engine

    def _advance(self, engine: Engine) -> None:
        assert self._started is not None
        try:
            self._started.fleet.check()
            if engine.has_work:
                outputs = engine.step()
                self._send(Outputs(tuple(outputs), engine.stats()))
        except LaminaError as error:
            self._fail(error)
        except Exception as error:
            traceback.print_exc()
            self._fail(EngineDead(f"internal error in a step: {type(error).__name__}: {error}"))

    def _receive(self, timeout_ms: int) -> bool:
        """Handle the messages that are here, waiting at most `timeout_ms`. True: shut down."""
        while self._socket.poll(timeout_ms):
            timeout_ms = 0
            if self._handle(decode_to_engine(self._socket.recv())):
                return True
        return False

    def _handle(self, message: ToEngine) -> bool:
        assert self._engine is not None
        match message:
            case AddRequests(requests):
                for request in requests if not self._failed else ():
                    self._engine.add(request)
            case Abort(request_ids):
                for request_id in request_ids if not self._failed else ():
                    self._engine.abort(request_id)
                self._send(Outputs((), self._engine.stats()))  # no step may come to tell it
            case CheckIntegrity():
                self._report_integrity(self._engine)
            case Shutdown():
                return True
        return False

    def _report_integrity(self, engine: Engine) -> None:
        try:
            problems, executors = engine.check_integrity()
        except LaminaError as error:
            problems, executors = [str(error)], []
            if not self._failed:
                self._fail(error)
        self._send(IntegrityReport(tuple(problems), tuple(executors)))

    def _fail(self, error: LaminaError) -> None:
        assert self._engine is not None
        self._failed = True
        logger.error("the engine cannot serve: %s", error)
        self._send(Outputs((), self._engine.stats()))
        self._send(Failed(type(error).__name__, str(error)))

    def _send(self, message: FromEngine) -> None:
        self._socket.send(encode(message))

    def _stop(self) -> None:
        if self._started is not None:
            self._started.close()
        self._socket.close()
        zmq.Context.instance().term()


def main() -> int:
    """Entry point of the engine's process."""
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.INFO)
    ignore_interrupts()
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    exit_with_parent(sys.stdin.fileno())
    return EngineService(start).run()


if __name__ == "__main__":
    sys.exit(main())
