"""The server's state, and the way of every generation through it.

One HTTP request makes one engine request per prompt. Their chunks meet in one queue, which is also
where a stopping server tells the request to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from lamina.engine.outputs import GenerationChunk
from lamina.errors import EngineDead, LaminaError
from lamina.server.contract import ServingEngine
from lamina.server.errors import ApiError, GenerationFailed
from lamina.server.metrics import Metrics, RequestMeter
from lamina.server.prompts import Prompt, PromptReader
from lamina.server.responses import now
from lamina.types import FinishReason, SamplingParams

logger = logging.getLogger("lamina.server")


class Piece(NamedTuple):
    """A chunk and the number of the job that it answers."""

    job: int
    chunk: GenerationChunk


class Job(NamedTuple):
    """A prompt and how to continue it."""

    prompt: Prompt
    sampling: SamplingParams


class _Done(NamedTuple):
    job: int


Pieces = AsyncGenerator[Piece, None]
_Queue = asyncio.Queue[Piece | _Done | LaminaError]


class Serving:
    """What all endpoints share. Lives in one event loop."""

    def __init__(
        self, engine: ServingEngine, *, model_name: str, metrics: Metrics, max_body_bytes: int
    ) -> None:
        self.engine = engine
        self.model_name = model_name
        self.metrics = metrics
        self.max_body_bytes = max_body_bytes
        self.created = now()
        self.prompts = PromptReader(engine.tokenizer, engine.model)
        self._queues: set[_Queue] = set()
        self._stop_reason: str | None = None

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) for a model that is not served; None means the served one."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def interrupt(self, reason: str) -> None:
        """End all generations, running and future, with `EngineDead(reason)`."""
        self._stop_reason = reason
        for queue in self._queues:
            queue.put_nowait(EngineDead(reason))

    async def generate(self, request_id: str, jobs: Sequence[Job]) -> Pieces:
        """Chunks of all jobs as they come, computed concurrently.

        Closing the generator, or cancelling its task, aborts what is left in the engine.

        Raises:
            RequestError, QueueFull, EngineDead: as `ServingEngine.generate`; the first one ends
                all prompts.
            GenerationFailed: the engine gave up on a prompt.
        """
        self._check_healthy()
        queue: _Queue = asyncio.Queue()
        self._queues.add(queue)
        tasks = [
            asyncio.create_task(self._pump(queue, i, job, f"{request_id}-{i}"))
            for i, job in enumerate(jobs)
        ]
        num_open = len(jobs)
        try:
            while num_open:
                match await queue.get():
                    case _Done():
                        num_open -= 1
                    case Piece() as piece:
                        yield piece
                    case LaminaError() as error:
                        raise error
        finally:
            self._queues.discard(queue)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, queue: _Queue, number: int, job: Job, request_id: str) -> None:
        """One job's chunks into the queue, then `_Done` or the error that ended it."""
        token_ids = job.prompt.token_ids
        meter = RequestMeter(self.metrics, len(token_ids), job.sampling.n)
        failed = False
        try:
            chunks = self.engine.generate(token_ids, job.sampling, request_id=request_id)
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    meter.observe(chunk)
                    _raise_failure(chunk)
                    queue.put_nowait(Piece(number, chunk))
            queue.put_nowait(_Done(number))
        except LaminaError as error:
            failed = True
            queue.put_nowait(error)
        except Exception as error:
            failed = True
            logger.exception("request %s failed in the front end", request_id)
            queue.put_nowait(GenerationFailed(f"internal error in the front end: {error!r}"))
        finally:
            meter.close(failed)

    def _check_healthy(self) -> None:
        if self._stop_reason is not None:
            raise EngineDead(self._stop_reason)
        health = self.engine.health()
        if not health.ok:
            raise EngineDead(f"the engine cannot serve: {health.reason}")


def _raise_failure(chunk: GenerationChunk) -> None:
    if chunk.finish_reason is FinishReason.ERROR:
        raise GenerationFailed(chunk.error or "the engine gave up on the request")
    if chunk.finish_reason is FinishReason.ABORT:
        raise EngineDead("the request was aborted: the server is stopping")
