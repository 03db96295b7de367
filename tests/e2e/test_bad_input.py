"""Wrong requests leave a server that lives on; wrong settings end it at once, with one line."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from transformers import BloomConfig

from lamina.engine.start import start_engine
from lamina.errors import CapacityError, ConfigError
from support.engines import tiny_config
from support.families import tiny_model
from support.servers import MODEL_LEN, VOCAB_SIZE, Process, Server

MODEL = "tiny"
MEGABYTE = 10**6
START_LIMIT_S = 40.0
"""Importing torch takes seconds, and the machine may be busy."""


@pytest.fixture
def http(monolith: Server, api_key: str) -> Iterator[httpx.Client]:
    """A client for one test, which looks whether the server still serves afterwards."""
    with monolith.client(headers={"authorization": f"Bearer {api_key}"}) as http:
        yield http
        request = {"model": MODEL, "prompt": "bak", "max_tokens": 3}
        answer = http.post("/v1/completions", json=request)
        assert answer.status_code == 200, answer.text
        assert http.get("/health").status_code == 200
        assert not any(monolith.metric("lamina_kv_pages_used").values())


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        pytest.param(
            {"prompt": [7] * 96}, "prompt", "96 tokens", id="prompt longer than the context"
        ),
        pytest.param({"max_tokens": -1}, "max_tokens", "-1", id="max_tokens of -1"),
        pytest.param({"temperature": float("nan")}, "temperature", "finite", id="temperature NaN"),
        pytest.param({"temperature": "NaN"}, "temperature", "", id="temperature as text"),
        pytest.param({"stop": 7}, "stop", "", id="stop of unknown type"),
        pytest.param({"stop": {"type": "regex"}}, "stop", "", id="stop as an object"),
        pytest.param({"prompt": [VOCAB_SIZE * 99]}, "prompt", "id", id="unknown token id"),
        pytest.param({"n": 100_000}, "n", "128", id="n too large"),
        pytest.param({"prompt": "x" * 3 * MEGABYTE}, "prompt", "96", id="very long prompt"),
    ],
)
def test_wrong_values(
    fields: dict[str, Any], param: str | None, words: str, http: httpx.Client
) -> None:
    body = json.dumps({"model": MODEL, "prompt": "bak"} | fields)
    answer = http.post("/v1/completions", content=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]
    assert len(error["message"]) < 500


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("body", [b"", b"{", b"prompt=bak", b"\xff\xfe", b"[1, 2]", b"null"])
def test_no_json(path: str, body: bytes, http: httpx.Client) -> None:
    answer = http.post(path, content=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_body_of_10_megabytes(http: httpx.Client) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x" * 10 * MEGABYTE})
    try:
        answer = http.post("/v1/completions", content=body)
    except (httpx.WriteError, httpx.ReadError):
        pytest.fail("the connection was cut before the answer could be read")
    assert answer.status_code == 413
    assert "4194304" in answer.json()["error"]["message"]


def test_wrong_api_key(http: httpx.Client, monolith: Server, api_key: str) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": api_key}):
        with monolith.client(headers=headers) as stranger:
            answer = stranger.post("/v1/completions", json={"model": MODEL, "prompt": "bak"})
            assert answer.status_code == 401
            assert "API key" in answer.json()["error"]["message"]
            assert stranger.get("/v1/models").status_code == 401
            assert stranger.get("/health").status_code == 200


class Case(NamedTuple):
    """Arguments of a server that must not start, and what it says."""

    arguments: tuple[str, ...]
    kind: str
    words: tuple[str, ...]


CASES: dict[str, Case] = {
    "missing folder": Case(("/nowhere/model",), "CheckpointError", ("/nowhere/model",)),
    "truncated weights": Case(("TRUNCATED",), "CheckpointError", ("truncated", "weights")),
    "unknown architecture": Case(
        ("UNKNOWN",), "ConversionError", ("does not know this architecture", "model_type")
    ),
    "model that cannot be cut": Case(("BLOOM",), "ConversionError", ("attention interface",)),
    "port in use": Case(("MODEL", "--port", "TAKEN_PORT"), "ConfigError", ("port", "in use")),
    "more workers than heads": Case(
        ("MODEL", "--attention-workers", "7", "--attention-partition", "heads"),
        "ConfigError",
        ("7 attention workers", "at most 6"),
    ),
    "no attention worker": Case(
        ("MODEL", "--attention-workers", "0"), "ConfigError", ("attention_workers", "local")
    ),
    "memory below one page": Case(
        ("MODEL", "--attention-workers", "2", "--attention-memory", "1KiB"),
        "CapacityError",
        ("1024 bytes", "one page"),
    ),
    "memory that is no size": Case(
        ("MODEL", "--attention-memory", "much"), "ConfigError", ("attention_memory", "much")
    ),
    "unknown device": Case(
        ("MODEL", "--attention-workers", "tpu:1GiB"), "ConfigError", ("attention_workers", "tpu")
    ),
    "block size of 0": Case(("MODEL", "--block-size", "0"), "ConfigError", ("block_size", "0")),
}


class Refusal(NamedTuple):
    """How a server that did not start has ended."""

    exit_code: int
    stderr: str
    seconds: float
    orphans: list[Process]


def refuse(arguments: tuple[str, ...]) -> Refusal:
    """Run a server until it ends by itself."""
    start = time.monotonic()
    server = Server(arguments)
    seen: set[Process] = set()
    while server.runs and time.monotonic() - start < START_LIMIT_S:
        seen.update(server.tree())
        time.sleep(0.1)
    seconds = time.monotonic() - start
    # The fork server notices that it is alone only once it has imported torch.
    while any(process.runs for process in seen) and time.monotonic() - start < START_LIMIT_S:
        time.sleep(0.05)
    orphans = [process for process in seen if process.runs]
    return Refusal(server.stop(), server.stderr, seconds, orphans)


@pytest.fixture(scope="module")
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def refusals(
    served_folder: Path, taken_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Refusal]]]:
    """All cases, two at a time."""
    words = broken_models(served_folder, tmp_path_factory.mktemp("broken"))
    words |= {"MODEL": str(served_folder), "TAKEN_PORT": str(taken_port)}
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(refuse, tuple(words.get(word, word) for word in case.arguments))
            for name, case in CASES.items()
        }


def broken_models(folder: Path, where: Path) -> dict[str, str]:
    truncated = Path(shutil.copytree(folder, where / "truncated"))
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    unknown = Path(shutil.copytree(folder, where / "unknown"))
    config = json.loads((unknown / "config.json").read_text())
    config |= {"model_type": "lamarck", "architectures": ["LamarckForCausalLM"]}
    (unknown / "config.json").write_text(json.dumps(config))
    bloom = Path(shutil.copytree(folder, where / "bloom"))
    tiny_model(
        BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=48, n_layer=2, n_head=6)
    ).save_pretrained(bloom)
    return {"TRUNCATED": str(truncated), "UNKNOWN": str(unknown), "BLOOM": str(bloom)}


@pytest.mark.parametrize("name", CASES)
def test_server_that_cannot_start(name: str, refusals: dict[str, Future[Refusal]]) -> None:
    case, refusal = CASES[name], refusals[name].result()
    assert refusal.exit_code == 1
    assert refusal.seconds < START_LIMIT_S
    assert refusal.orphans == []
    lines = refusal.stderr.splitlines()
    assert len(lines) == 1, refusal.stderr
    assert lines[0].startswith(f"lamina: {case.kind}: ")
    for words in case.words:
        assert words in lines[0]


@pytest.mark.parametrize(
    ("num_workers", "changes", "error", "words"),
    [
        pytest.param(
            4, {"max_num_seqs": 3, "attention_partition": "requests"},
            ConfigError, "attention_workers=4 .* max_num_seqs",
            id="more workers than requests",
        ),
        pytest.param(
            3, {"max_model_len": MODEL_LEN + 1}, ConfigError, f"max_model_len .* {MODEL_LEN},",
            id="context over the model's",
        ),
        pytest.param(
            1, {"attention_memory_bytes": 100_000}, CapacityError, "max_model_len",
            id="memory below the context",
        ),
        pytest.param(
            0, {"attention_memory_bytes": 1024}, CapacityError, "1024 bytes .* one page",
            id="memory below one page, monolithic",
        ),
        pytest.param(
            2, {"local_memory_bytes": 1024}, CapacityError, "local memory of 1024 bytes",
            id="memory below one page, for prompts",
        ),
    ],
)  # fmt: skip
def test_engine_that_cannot_start(
    num_workers: int,
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
    served_folder: Path,
) -> None:
    with pytest.raises(error, match=words):
        start_engine(tiny_config(served_folder, num_workers, **changes))


def test_unknown_option_value(served_folder: Path) -> None:
    """The command line's own refusal: it shows the choices and how to get help."""
    refusal = refuse((str(served_folder), "--dtype", "float8"))
    assert refusal.exit_code == 2
    assert "--dtype" in refusal.stderr
    assert "float8" in refusal.stderr
    assert "bfloat16" in refusal.stderr
    assert "Traceback" not in refusal.stderr
