"""`lamina demo`: a server with its attention elsewhere, a few prompts, and where the time went."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.table import Table

from lamina.errors import EngineDead

_FACTS = (
    "Mira is a baker. Mira has a red lantern. The lantern is in the attic. "
    "Tom is a sailor. Tom has a blue drum. The drum is under the bridge."
)
_STARTUP_TIMEOUT_S = 180.0
_ANSWER_TIMEOUT_S = 60.0

_PHASES = {
    "slices": "dense layers, in the model worker",
    "attention": "waiting for the attention workers (their compute and the hop)",
    "send": "handing q, k and v to the mailboxes",
    "sample": "choosing tokens",
    "schedule": "planning the steps",
}


def demo(
    attention_workers: Annotated[int, typer.Option(help="How many.", min=1)] = 2,
) -> None:
    """Serve the bundled demo model with its attention in worker processes and talk to it."""
    console = Console(highlight=False)
    with _server(attention_workers) as url:
        client = _Client(url)
        model = client.get_json("/v1/models")["data"][0]["id"]
        console.print(
            f"\n[bold]{model}[/bold] at {url}: dense layers in one process, KV cache and attention "
            f"in {attention_workers} others\n"
        )
        start = time.perf_counter()
        num_tokens = 0
        for question in (
            f"{_FACTS} Where is the drum?",
            f"{_FACTS} What does Mira have?",
            "What is Lamina?",
            "Tell me a story about Nora.",
        ):
            console.print(f"[bold cyan]user[/bold cyan]      {question}")
            console.print("[bold green]assistant[/bold green] ", end="")
            num_tokens += client.stream_chat(model, question, console)
        elapsed = time.perf_counter() - start
        _print_time(console, client.get("/metrics"), num_tokens, elapsed)


class _Client:
    """Just enough HTTP to show that nothing but HTTP is needed."""

    def __init__(self, url: str) -> None:
        self._netloc = urlsplit(url).netloc

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self._netloc, timeout=_ANSWER_TIMEOUT_S)
        payload = None if body is None else json.dumps(body)
        connection.request(method, path, payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise EngineDead(f"{path} answered {response.status}: {response.read().decode()}")
        return response

    def get(self, path: str) -> str:
        with self._request("GET", path) as response:
            return response.read().decode()

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def stream_chat(self, model: str, question: str, console: Console) -> int:
        """Print the answer as it comes; returns the number of generated tokens."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 120,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        num_tokens = 0
        with self._request("POST", "/v1/chat/completions", body) as response:
            for event in _events(response):
                if "error" in event:
                    raise EngineDead(event["error"]["message"])
                for choice in event["choices"]:
                    console.print(choice["delta"].get("content") or "", end="", markup=False)
                if event.get("usage"):
                    num_tokens = int(event["usage"]["completion_tokens"])
        console.print("\n")
        return num_tokens


def _events(response: http.client.HTTPResponse) -> Iterator[Any]:
    for line in response:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line.removeprefix(b"data: "))


@contextmanager
def _server(attention_workers: int) -> Iterator[str]:
    """A server process on a free port; yields its URL and stops it in the end."""
    command = [sys.executable, "-m", "lamina", "serve", "--port", "0"]
    command += ["--attention-workers", str(attention_workers)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield _ready_url(process)
        finally:
            process.terminate()
            try:
                _, rest = process.communicate(timeout=20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise EngineDead("the demo server did not stop within 20 s") from None
    if process.returncode != 0:
        raise EngineDead(f"the demo server ended with exit code {process.returncode}:\n{rest}")


def _ready_url(process: subprocess.Popen[str]) -> str:
    """Read the server's standard error until it says where it listens."""
    assert process.stderr is not None
    deadline = time.monotonic() + _STARTUP_TIMEOUT_S
    seen = []
    for line in process.stderr:
        seen.append(line)
        if match := re.search(r"serving .* at (http://\S+)", line):
            return match.group(1)
        if time.monotonic() > deadline:
            break
    raise EngineDead("the demo server did not start:\n" + "".join(seen))


def _print_time(console: Console, metrics: str, num_tokens: int, elapsed_s: float) -> None:
    pattern = r'^lamina_engine_seconds_total\{phase="(\w+)"\} (\S+)$'
    seconds = {p: float(value) for p, value in re.findall(pattern, metrics, re.MULTILINE)}
    total = sum(seconds.values())
    table = Table(title=f"{num_tokens} tokens in {elapsed_s:.2f} s; where the engine's time went")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for phase, value in sorted(seconds.items(), key=lambda item: -item[1]):
        share = f"{value / total:.0%}" if total else "-"
        table.add_row(_PHASES.get(phase, phase), f"{value:.3f}", share)
    console.print(table)
