"""Replay a workload against a running server over HTTP. No torch.

Requests leave when the workload says so, whether or not earlier ones are answered (open loop).
Prompts are random token ids: requests with the same prefix hashes begin with the same tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
import numpy

from lamina.bench.percentiles import Spread
from lamina.errors import ConfigError
from lamina.plan.workload import PREFIX_BLOCK_TOKENS, Arrival, Workload

if TYPE_CHECKING:  # comes with the extra `bench`
    import httpx

TOKEN_IDS = range(16, 256)
"""Prompts are drawn from these: below them are special tokens, and every vocabulary has them."""
_CONNECT_TIMEOUT_S = 10.0
_MAX_ERROR_CHARS = 300


class RequestFailed(Exception):
    """One request got no whole answer. `kind` is what failures are counted by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Answer(msgspec.Struct, kw_only=True):
    """When the pieces of one answer came. Times count from the replay's start."""

    due_s: float
    """When the workload sends the request."""
    sent_s: float
    prompt_tokens: int
    asked_tokens: int
    piece_times_s: list[float] = []
    output_tokens: int = 0


class ServeFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a replay. Rates are over the time from the first request's leaving to the last
    answer's end; latencies are of whole answers alone."""

    workload: str
    url: str
    model: str
    num_requests: int
    num_completed: int
    num_short: int
    """Completed ones with fewer tokens than asked for."""
    errors: dict[str, int]
    """Requests that failed, by kind."""
    error_examples: dict[str, str]
    """The first message of each kind."""
    duration_s: float
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    ttft_s: Spread | None
    """Time to first token, from the request's leaving."""
    tbt_s: Spread | None
    """Time between tokens: between successive pieces of text of an answer, over all answers."""
    tpot_s: Spread | None
    """Per answer: time from its first to its last token over the tokens after the first."""
    latency_s: Spread | None
    """From the request's leaving to its last token."""
    lateness_s: Spread | None
    """How long after its time a request left; if not small, this client is the bottleneck."""


class Progress(msgspec.Struct, frozen=True):
    """How far a replay is."""

    num_done: int
    num_failed: int
    output_tokens: int


def import_httpx() -> Any:
    """The HTTP client library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import httpx
    except ImportError:
        raise ConfigError(
            "replaying needs httpx; install it with: pip install 'lamina-serve[bench]'"
        ) from None
    return httpx


async def replay(
    workload: Workload,
    *,
    url: str,
    model: str | None = None,
    api_key: str | None = None,
    max_concurrency: int | None = None,
    timeout_s: float = 600.0,
    progress: Callable[[Progress], None] = lambda _: None,
) -> ServeFigures:
    """Send every request of `workload` to the OpenAI-compatible server at `url`, streaming.

    Greedy, with exactly the tokens that the workload says where the server knows `ignore_eos`. A
    request that fails is counted and does not end the replay.

    Args:
        url: with or without `/v1`.
        model: None: the first that the server lists.
        max_concurrency: requests under way at once; later ones wait (and count as late).
        timeout_s: longest silence of the server in an answer.
        progress: called after every answer.

    Raises:
        ConfigError: there is no such server, it refuses the key, or it has no such model.
    """
    httpx = import_httpx()
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    base = _checked(url).rstrip("/").removesuffix("/v1")
    client = httpx.AsyncClient(
        base_url=base,
        headers=headers,
        timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S, pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
    )
    async with client:
        model = await _find_model(client, url, model)
        run = _Replay(client, model, max_concurrency, progress)
        await run.send_all(workload.arrivals)
        return run.figures(workload.name, base)


def _checked(url: str) -> str:
    """ConfigError: it is no address of a server."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_address = is_address and parts.port != 0  # reading it checks its range
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError(f"url must be such as http://127.0.0.1:8000, got {url!r}")
    return url


async def _find_model(client: httpx.AsyncClient, url: str, model: str | None) -> str:
    httpx = import_httpx()
    try:
        response = await client.get("/v1/models")
    except httpx.HTTPError as error:
        raise ConfigError(
            f"no server answers at {url} ({type(error).__name__}: {error}); start one with "
            f"`lamina serve` and give its address as --url http://HOST:PORT"
        ) from None
    if response.status_code in (401, 403):
        raise ConfigError(f"the server at {url} refuses the key; give --api-key or LAMINA_API_KEY")
    try:
        names = [str(entry["id"]) for entry in msgspec.json.decode(response.content)["data"]]
    except (msgspec.DecodeError, KeyError, TypeError):
        names = []
    if response.status_code != 200 or not names:
        raise ConfigError(
            f"{url} is not an OpenAI-compatible server: GET /v1/models gave status "
            f"{response.status_code}"
        )
    if model is not None and model not in names:
        raise ConfigError(f"model must be one of {', '.join(names)}, got {model!r}")
    return model or names[0]


class _Replay:
    """One replay under way."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        model: str,
        max_concurrency: int | None,
        progress: Callable[[Progress], None],
    ) -> None:
        self._client = client
        self._model = model
        self._places = asyncio.Semaphore(max_concurrency) if max_concurrency else None
        self._progress = progress
        self._start = 0.0
        self._completed: list[Answer] = []
        self._output_tokens = 0
        self._lateness_s: list[float] = []
        self._end_s = 0.0
        self._first_sent_s: float | None = None
        self._errors: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    async def send_all(self, arrivals: tuple[Arrival, ...]) -> None:
        first_s = arrivals[0].time_s
        self._start = time.perf_counter() - first_s
        async with asyncio.TaskGroup() as group:
            for index, arrival in enumerate(arrivals):
                await asyncio.sleep(arrival.time_s - self._now())
                if self._places is not None:
                    await self._places.acquire()
                group.create_task(self._serve(index, arrival))

    async def _serve(self, index: int, arrival: Arrival) -> None:
        body = msgspec.json.encode(
            {
                "model": self._model,
                "prompt": prompt_token_ids(arrival, index),
                "max_tokens": arrival.output_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        answer = Answer(
            due_s=arrival.time_s,
            sent_s=self._now(),
            prompt_tokens=arrival.prompt_tokens,
            asked_tokens=arrival.output_tokens,
        )
        if self._first_sent_s is None:
            self._first_sent_s = answer.sent_s
        self._lateness_s.append(max(0.0, answer.sent_s - answer.due_s))
        try:
            await self._stream(body, answer)
            self._completed.append(answer)
            self._output_tokens += answer.output_tokens
        except RequestFailed as failure:
            self._errors[failure.kind] += 1
            self._examples.setdefault(failure.kind, str(failure)[:_MAX_ERROR_CHARS])
        finally:
            self._end_s = self._now()
            if self._places is not None:
                self._places.release()
        self._progress(
            Progress(
                num_done=len(self._completed) + self._errors.total(),
                num_failed=self._errors.total(),
                output_tokens=self._output_tokens,
            )
        )

    async def _stream(self, body: bytes, answer: Answer) -> None:
        """Fill in `answer`. Raises RequestFailed."""
        httpx = import_httpx()
        headers = {"content-type": "application/json"}
        try:
            async with self._client.stream(
                "POST", "/v1/completions", content=body, headers=headers
            ) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    raise RequestFailed(f"HTTP {response.status_code}", text)
                await self._read(response.aiter_lines(), answer)
        except httpx.TimeoutException as error:
            raise RequestFailed("timeout", type(error).__name__) from None
        except httpx.HTTPError as error:
            raise RequestFailed("connection", f"{type(error).__name__}: {error}") from None

    async def _read(self, lines: AsyncIterator[str], answer: Answer) -> None:
        tokens: int | None = None
        async for line in lines:
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                if not answer.piece_times_s:
                    raise RequestFailed("empty answer", "the stream ended without any text")
                answer.output_tokens = len(answer.piece_times_s) if tokens is None else tokens
                return
            try:
                event = msgspec.json.decode(data, type=_Event)
            except msgspec.DecodeError as error:
                raise RequestFailed("malformed event", f"{error}: {data}") from None
            if event.error is not None:
                raise RequestFailed("error in stream", str(event.error.get("message", data)))
            if event.usage is not None:
                tokens = event.usage.completion_tokens
            if any(choice.text for choice in event.choices):
                answer.piece_times_s.append(self._now())
        raise RequestFailed("broken stream", "the server closed the stream before its end")

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def figures(self, workload: str, url: str) -> ServeFigures:
        done = self._completed
        assert self._first_sent_s is not None, "a workload has requests"
        duration_s = self._end_s - self._first_sent_s
        return ServeFigures(
            workload=workload,
            url=url,
            model=self._model,
            num_requests=len(self._lateness_s),
            num_completed=len(done),
            num_short=sum(a.output_tokens < a.asked_tokens for a in done),
            errors=dict(self._errors),
            error_examples=self._examples,
            duration_s=duration_s,
            requests_per_s=len(done) / duration_s,
            prompt_tokens_per_s=sum(a.prompt_tokens for a in done) / duration_s,
            output_tokens_per_s=self._output_tokens / duration_s,
            ttft_s=Spread.of([a.piece_times_s[0] - a.sent_s for a in done]),
            tbt_s=Spread.of(
                [
                    later - earlier
                    for a in done
                    for earlier, later in zip(a.piece_times_s, a.piece_times_s[1:], strict=False)
                ]
            ),
            tpot_s=Spread.of(
                [
                    (a.piece_times_s[-1] - a.piece_times_s[0]) / (a.output_tokens - 1)
                    for a in done
                    if a.output_tokens > 1
                ]
            ),
            latency_s=Spread.of([a.piece_times_s[-1] - a.sent_s for a in done]),
            lateness_s=Spread.of(self._lateness_s),
        )


class _Choice(msgspec.Struct):
    text: str = ""


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | None = None


def prompt_token_ids(arrival: Arrival, index: int) -> list[int]:
    """Random token ids, the same every time.

    Args:
        index: of the request; without prefix hashes, prompts of different indices differ.
    """
    if not arrival.prefix_hashes:
        return _random_ids((0, index), arrival.prompt_tokens)
    ids: list[int] = []
    for block in arrival.prefix_hashes:
        ids += _random_ids((1, block % 2**64), PREFIX_BLOCK_TOKENS)
    return ids[: arrival.prompt_tokens]


def _random_ids(seed: tuple[int, int], count: int) -> list[int]:
    generator = numpy.random.default_rng(seed)
    ids: list[int] = generator.integers(TOKEN_IDS.start, TOKEN_IDS.stop, count).tolist()
    return ids
