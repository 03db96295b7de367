"""The front end's half of the engine: starts its process, sends requests, streams the answers.

Everything runs in one event loop. No wait outlives the engine's process: its exit ends every open
request with an error that says why.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import tempfile
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import zmq
import zmq.asyncio

from lamina import errors
from lamina.config import EngineConfig
from lamina.engine.answers import Answer, check_request
from lamina.engine.messages import (
    Abort,
    AddRequests,
    CheckIntegrity,
    EngineStats,
    Failed,
    FromEngine,
    IntegrityReport,
    ModelInfo,
    Outputs,
    Ready,
    Shutdown,
    ToEngine,
    decode_from_engine,
    encode,
)
from lamina.engine.outputs import GenerationChunk
from lamina.engine.process import EngineProcess, describe_exit
from lamina.engine.tokenizer import Tokenizer, load_tokenizer
from lamina.errors import (
    CheckpointError,
    ConversionError,
    EngineDead,
    LaminaError,
    QueueFull,
    RequestError,
    TransportError,
)
from lamina.types import FinishReason, SamplingParams, SequenceOutput

_SERVICE = (sys.executable, "-m", "lamina.engine.service")
_LAST_WORDS_S = 0.2
"""How long after the engine's exit its last message may still be on the way."""
_FAILED_START_S = 1.0
"""How long an engine that failed to start has to clean up after itself."""
_LONG_PROMPT_CHARS = 4096
"""Longer prompts are tokenised in a thread, so that they do not stop the other streams."""


class Health(NamedTuple):
    """Whether the engine can serve."""

    ok: bool
    reason: str
    """Why not; empty if it can."""


class _Stream:
    """An open request: its answers and the chunks that nobody has taken yet."""

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers
        self.chunks: asyncio.Queue[GenerationChunk] = asyncio.Queue()

    @property
    def open_answers(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.finished]


class AsyncEngine:
    """A running engine. Made by `start`, ended by `shutdown`, used from one event loop only."""

    def __init__(self, config: EngineConfig) -> None:
        """Use `AsyncEngine.start`."""
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="lamina-")  # private: mode 0700
        self._address = f"ipc://{self._folder.name}/engine"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.bind(self._address)
        self._process: EngineProcess | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._model: ModelInfo | None = None
        self._tokenizer: Tokenizer | None = None
        self._stats = EngineStats()
        self._dead: LaminaError | None = None
        self._streams: dict[str, _Stream] = {}
        self._sequences: dict[str, tuple[_Stream, Answer]] = {}
        self._integrity: list[asyncio.Future[IntegrityReport]] = []
        self._closing = asyncio.Lock()
        self._exit_code: int | None = None

    @classmethod
    async def start(
        cls, config: EngineConfig, *, command: Sequence[str] | None = None
    ) -> AsyncEngine:
        """Start the engine's process and wait until it serves.

        There is no deadline for loading a model; the wait ends when the process does.

        Args:
            config: what to run.
            command: the command line of the engine's process instead of Lamina's own.

        Raises:
            CheckpointError, ConfigError, ConversionError, CapacityError: as the engine reports.
            EngineDead: the process ended without a word.
        """
        engine = cls(config)
        try:
            await engine._start(_SERVICE if command is None else command)
        except BaseException:
            await engine.shutdown(_FAILED_START_S)
            raise
        return engine

    async def _start(self, command: Sequence[str]) -> None:
        line = msgspec.json.encode({"config": self._config, "address": self._address})
        self._process = await EngineProcess.start(command, line)
        self._tasks = [
            asyncio.create_task(self._receive()),
            asyncio.create_task(self._watch(self._process)),
        ]
        ready, self._tokenizer = await asyncio.gather(
            self._ready, asyncio.to_thread(self._load_tokenizer)
        )
        self._model, self._stats = ready.model, ready.stats

    def _load_tokenizer(self) -> Tokenizer | None:
        try:
            return load_tokenizer(self._config.model)
        except CheckpointError:
            if self._config.load_format == "dummy":
                return None  # random weights need no text: prompts are token ids then
            raise

    @property
    def model(self) -> ModelInfo:
        """What the engine runs."""
        assert self._model is not None
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers; None for a dummy model without one."""
        return self._tokenizer.hf if self._tokenizer is not None else None

    @property
    def stats(self) -> EngineStats:
        """The engine's last report."""
        return self._stats

    @property
    def num_unfinished(self) -> int:
        """Sequences that run or wait."""
        return len(self._sequences)

    def health(self) -> Health:
        """Whether the engine can serve, as far as it is known here and now."""
        if self._dead is not None:
            return Health(False, str(self._dead))
        lost = [executor.name for executor in self._stats.executors if not executor.alive]
        if lost:
            return Health(False, f"lost: {', '.join(lost)}")
        return Health(True, "")

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> list[int]:
        """The token ids of a conversation in the model's own format, a prompt for `generate`.

        `arguments` are those of `Tokenizer.apply_chat_template`. Raises RequestError.
        """
        return self._need_tokenizer("messages").apply_chat_template(messages, **arguments)

    async def encode(self, text: str) -> list[int]:
        """The token ids of a prompt, with the special tokens that the tokenizer adds."""
        tokenizer = self._need_tokenizer("prompt")
        if len(text) > _LONG_PROMPT_CHARS:
            return await asyncio.to_thread(tokenizer.encode, text)
        return tokenizer.encode(text)

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str | None = None,
    ) -> AsyncGenerator[GenerationChunk, None]:
        """Chunks of the `n` answers, interleaved, each answer's last one with a finish reason.

        Closing or cancelling the iteration aborts what still runs. If the engine dies, every open
        answer ends with a chunk of finish reason ERROR that names the cause.

        Raises:
            RequestError: the request cannot be served; nothing was sent to the engine.
            QueueFull: as many requests wait as may; try again later.
            EngineDead: the engine no longer serves.
        """
        prompt_token_ids = await self.encode(prompt) if isinstance(prompt, str) else prompt
        name = request_id if request_id is not None else uuid.uuid4().hex
        stream = self._submit(name, prompt_token_ids, sampling)
        num_open = len(stream.answers)
        try:
            while num_open:
                chunk = await stream.chunks.get()
                num_open -= chunk.finish_reason is not None
                yield chunk
        finally:
            self._forget(stream.open_answers)
            del self._streams[name]

    async def abort(self, request_id: str) -> None:
        """End a request: its open answers finish with ABORT. Unknown or finished ones are fine."""
        stream = self._streams.get(request_id)
        if stream is not None:
            answers = stream.open_answers
            self._forget(answers)
            for answer in answers:
                stream.chunks.put_nowait(answer.end(FinishReason.ABORT))

    async def check_integrity(self) -> IntegrityReport:
        """Have every executor verify its pages against the engine's count.

        Raises:
            EngineDead: the engine ends before it answers.
        """
        self._check_alive()
        future: asyncio.Future[IntegrityReport] = asyncio.get_running_loop().create_future()
        self._integrity.append(future)
        self._send(CheckIntegrity())
        return await future

    async def shutdown(self, grace_s: float = 5.0) -> int:
        """Stop the engine and free everything; open requests end with an error.

        Waits `grace_s` for an orderly end before it sends SIGTERM, and then SIGKILL. A second call
        does nothing. Returns the engine's exit code, negative for a signal.
        """
        async with self._closing:
            if self._exit_code is None:
                self._send(Shutdown())
                self._die(EngineDead("the engine was shut down"))
                self._exit_code = await self._process.stop(grace_s) if self._process else 1
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                self._socket.close()
                self._context.destroy()
                self._folder.cleanup()
            return self._exit_code

    def _submit(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling: SamplingParams
    ) -> _Stream:
        self._check_alive()
        sampling = check_request(prompt_token_ids, sampling, self.model)
        if sampling.stop:
            self._need_tokenizer("stop")
        if request_id in self._streams:
            raise RequestError(f"request_id {request_id!r} is in use; choose another", "request_id")
        limit = self.model.max_num_seqs + self.model.max_num_waiting
        if sampling.n > limit:
            raise RequestError(f"n is {sampling.n}, but the engine takes {limit} at once", "n")
        if self.num_unfinished + sampling.n > limit:
            raise QueueFull(
                f"{self.num_unfinished} requests run or wait, and at most {limit} may; "
                "try again later"
            )
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        # A suffix of its own keeps late outputs of an aborted request from a new one of that name.
        stream = _Stream(
            Answer.split(
                f"{request_id}:{secrets.token_hex(4)}",
                prompt_token_ids,
                sampling,
                seed,
                self.model,
                self._tokenizer,
            )
        )
        self._streams[request_id] = stream
        for answer in stream.answers:
            self._sequences[answer.request.request_id] = (stream, answer)
        self._send(AddRequests(tuple(answer.request for answer in stream.answers)))
        return stream

    def _forget(self, answers: Sequence[Answer]) -> None:
        """Abort sequences whose further outputs nobody wants."""
        ids = tuple(
            a.request.request_id for a in answers if a.request.request_id in self._sequences
        )
        for sequence_id in ids:
            del self._sequences[sequence_id]
        if ids and self._dead is None:
            self._send(Abort(ids))

    def _send(self, message: ToEngine) -> None:
        # Without a high-water mark the message is queued at once; the future only says so.
        self._socket.send(encode(message))

    def _need_tokenizer(self, field: str) -> Tokenizer:
        if self._tokenizer is None:
            raise RequestError(
                f"{field}: this model has no tokenizer; give token ids as the prompt", field
            )
        return self._tokenizer

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDead(str(self._dead))

    async def _receive(self) -> None:
        try:
            while True:
                self._handle(decode_from_engine(await self._socket.recv()))
        except Exception as error:  # whatever it is, those who wait must learn of it
            self._die(EngineDead(f"cannot handle the engine's message: {error!r}"))
            raise

    async def _watch(self, process: EngineProcess) -> None:
        code = await process.wait()
        await asyncio.sleep(_LAST_WORDS_S)
        self._die(EngineDead(f"the engine's process ended with {describe_exit(code)}"))

    def _handle(self, message: FromEngine) -> None:
        match message:
            case Ready():
                self._ready.set_result(message)
            case Outputs(outputs, stats):
                self._stats = stats
                for output in outputs:
                    self._advance(output)
            case IntegrityReport():
                future = self._integrity.pop(0)
                if not future.done():
                    future.set_result(message)
            case Failed(kind, text):
                self._die(_error_of(kind, text))

    def _advance(self, output: SequenceOutput) -> None:
        entry = self._sequences.get(output.request_id)
        if entry is None:
            return  # aborted meanwhile
        stream, answer = entry
        chunk = answer.advance(output)
        if chunk is None:
            return
        stream.chunks.put_nowait(chunk)
        if output.finish_reason is not None:
            del self._sequences[output.request_id]
        elif answer.finished:  # by a stop string, of which the engine knows nothing
            self._forget([answer])

    def _die(self, error: LaminaError) -> None:
        """End everything that waits for the engine. The first cause stays."""
        if self._dead is not None:
            return
        self._dead = error
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # nobody may be there to take it
        for future in self._integrity:
            if not future.done():
                future.set_exception(EngineDead(str(error)))
        for stream, answer in self._sequences.values():
            stream.chunks.put_nowait(answer.end(FinishReason.ERROR, str(error)))
        self._sequences.clear()


def _error_of(kind: str, message: str) -> LaminaError:
    """The engine's error as it was there, less what cannot be told from its message."""
    error_class = getattr(errors, kind, None)
    if not (isinstance(error_class, type) and issubclass(error_class, LaminaError)):
        return EngineDead(message)
    # The constructors compose messages from parts; this one is already composed.
    error = error_class.__new__(error_class, message)
    match error:
        case RequestError():
            error.field = None
        case ConversionError():
            error.reason, error.model, error.layer = message, "", None
        case TransportError():
            error.peer = message.partition(":")[0]
    return error
