"""Real `lamina serve` processes for tests: start, watch, stop, and everything that hangs below."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from support.families import FAMILIES, tiny_model

VOCAB_SIZE = 384
MODEL_LEN = 512
"""The tiny model's own limit."""
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
_START_TIMEOUT_S = 90.0
_STOP_TIMEOUT_S = 30.0
_VANISH_TIMEOUT_S = 2.0


def save_served_model(folder: Path) -> Path:
    """A tiny Llama with 6 KV heads, and a byte-level tokenizer with a chat template."""
    config = FAMILIES["llama"]()
    config.vocab_size = VOCAB_SIZE
    assert config.max_position_embeddings == MODEL_LEN
    tiny_model(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [f"{a}{b}{c} " for a in "bdfglmnprst" for b in "aeiou" for c in "klmnrst"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=_CHAT_TEMPLATE,
    )
    assert len(fast) == VOCAB_SIZE, "the model may generate any of its ids"
    fast.save_pretrained(folder)
    return folder


class Process(NamedTuple):
    """A process that was seen in /proc; its start time tells it from a later one of that pid."""

    pid: int
    start_ticks: int
    name: str
    command: str

    @property
    def runs(self) -> bool:
        """Whether it still exists; one that only waits to be reaped does not."""
        stat = _stat(self.pid)
        return stat is not None and stat.start_ticks == self.start_ticks and stat.state != "Z"


class _Stat(NamedTuple):
    name: str
    state: str
    parent: int
    start_ticks: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()  # from the third field of proc(5) on
    return _Stat(name, fields[0], int(fields[1]), int(fields[19]))


def descendants(root: int) -> list[Process]:
    """All processes below `root`, however deep."""
    stats = {
        int(entry): stat
        for entry in os.listdir("/proc")
        if entry.isdigit() and (stat := _stat(int(entry))) is not None
    }
    found: list[Process] = []
    level = {root}
    while level:
        level = {pid for pid, stat in stats.items() if stat.parent in level}
        for pid in sorted(level):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            found.append(Process(pid, stats[pid].start_ticks, stats[pid].name, command))
    return found


def wait_until(condition: Callable[[], object], timeout_s: float) -> float:
    """Seconds until `condition()` was true; fails after `timeout_s`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"not so within {timeout_s} s"
        time.sleep(0.01)
    return time.monotonic() - start


class Server:
    """A `python -m lamina serve` process on a port that the system chose."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Start it in a session (and process group) of its own; does not wait.

        Args:
            arguments: of `lamina serve`; a later --port replaces the one that is given here.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lamina", "serve", "--port", "0", *arguments],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.url = ""
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def stderr(self) -> str:
        """What it has written to standard error so far."""
        return "".join(self._lines)

    def wait_until_ready(self) -> None:
        """Wait for the line that says where it serves."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        with self._changed:
            while not self.url:
                remaining_s = deadline - time.monotonic()
                assert remaining_s > 0, f"not ready:\n{self.stderr}"
                assert self._process.poll() is None, f"ended before it was ready:\n{self.stderr}"
                self._changed.wait(min(0.1, remaining_s))

    def client(self, **options: object) -> httpx.Client:
        """A plain HTTP client of this server."""
        return httpx.Client(base_url=self.url, timeout=30.0, **options)  # type: ignore[arg-type]

    def metric(self, name: str) -> dict[str, float]:
        """The samples of a metric, by their labels as written (without labels: the empty text)."""
        with self.client() as client:
            text = client.get("/metrics").text
        pattern = re.compile(rf"^{re.escape(name)}(?:{{(.*)}})? (\S+)$", re.MULTILINE)
        return {labels: float(value) for labels, value in pattern.findall(text)}

    def tree(self) -> list[Process]:
        """The processes below the server's."""
        return descendants(self.pid)

    def attention_workers(self) -> list[Process]:
        """The attention workers' processes, in order."""
        return sorted(
            (p for p in self.tree() if p.name.startswith("lamina-attn-")), key=lambda p: p.name
        )

    def engine(self) -> Process:
        """The engine's process."""
        (engine,) = [p for p in self.tree() if "lamina.engine.service" in p.command]
        return engine

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def interrupt(self) -> None:
        """Ctrl-C as a terminal does it: SIGINT to the whole process group."""
        os.killpg(self.pid, signal.SIGINT)

    def wait(self, timeout_s: float = _STOP_TIMEOUT_S) -> int:
        """The exit code, once it has ended and its standard error is read to the end."""
        code = self._process.wait(timeout_s)
        self._reader.join(timeout_s)
        assert not self._reader.is_alive(), "an orphan holds standard error open"
        return code

    def stop(self) -> int:
        """SIGTERM, and SIGKILL if that does not end it; the exit code."""
        self._process.terminate()
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                match = re.search(r"serving .* at (http://\S+)", line)
                with self._changed:
                    self._lines.append(line)
                    if match is not None:
                        self.url = match.group(1)
                    self._changed.notify_all()


@contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """A server that is ready. In the end it must stop at once and leave nothing behind."""
    server = Server(arguments)
    try:
        server.wait_until_ready()
        yield server
    except BaseException:
        server.stop()
        raise
    tree, was_running, start = server.tree(), server.runs, time.monotonic()
    code = server.stop()
    if was_running:
        assert code == 0, server.stderr
        assert server.stderr.count("\n") == 1, f"more than the ready line:\n{server.stderr}"
    wait_until(lambda: not any(process.runs for process in tree), _VANISH_TIMEOUT_S)
    assert time.monotonic() - start < _VANISH_TIMEOUT_S, "it was idle"
