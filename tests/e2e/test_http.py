"""The official client against a real server whose attention runs in two other processes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Completion

from support.engines import tiny_llama_page_bytes
from support.servers import Server, serving, wait_until

MODEL = "tiny"
MAX_MODEL_LEN = 96
MEMORY = str(24 * tiny_llama_page_bytes(8, num_workers=2))
"""24 pages of 8 tokens: two sequences of full length. 16 are admitted long before they are long."""
PROMPT = "bakdelfit"


@pytest.fixture(scope="module")
def server(served_folder: Path, served_options: tuple[str, ...]) -> Iterator[Server]:
    workers = ("--attention-workers", "2", "--attention-memory", MEMORY)
    with serving(str(served_folder), *served_options, *workers) as server:
        yield server


def client_of(server: Server, api_key: str = "-") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=api_key, max_retries=0, timeout=120.0)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def mixed_requests(count: int) -> list[dict[str, Any]]:
    """Prompts of 1 to 60 tokens, answers of 1 to 34: every second greedy, the others seeded."""
    dice = random.Random(7)
    made = []
    for number in range(count):
        sampled = {"temperature": 0.9, "top_p": 0.95, "seed": number}
        made.append(
            {
                "model": MODEL,
                "prompt": [dice.randrange(6, 384) for _ in range(dice.choice((1, 5, 12, 30, 60)))],
                "max_tokens": dice.choice((1, 8, 20, 34)),
                "logprobs": 1,
                "extra_body": {"ignore_eos": number % 3 != 0},
                **(sampled if number % 2 else {"temperature": 0}),
            }
        )
    return made


def gist(completion: Completion) -> list[tuple[object, ...]]:
    """Everything about the answers that must not depend on what else runs."""
    return [
        (choice.index, choice.text, choice.logprobs.tokens, choice.finish_reason)
        for choice in completion.choices
        if choice.logprobs is not None
    ]


def assert_no_pages_used(server: Server) -> None:
    used = server.metric("lamina_kv_pages_used")
    assert len(used) == 3, "the local executor and two workers"
    wait_until(lambda: not any(server.metric("lamina_kv_pages_used").values()), 2.0)


def run_all(client: openai.OpenAI, requests: list[dict[str, Any]]) -> list[Completion]:
    """All at the same time."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: client.completions.create(**request), requests))


def test_concurrent_answers_equal_sequential_ones_under_preemption(
    server: Server, client: openai.OpenAI, monolith: Server, api_key: str
) -> None:
    requests = mixed_requests(64)
    alone = [client.completions.create(**request) for request in requests]
    assert server.metric("lamina_preemptions_total") == {"": 0}
    together = run_all(client, requests)
    assert server.metric("lamina_preemptions_total")[""] > 0
    assert [gist(a) for a in together] == [gist(a) for a in alone]
    assert [a.usage for a in together] == [a.usage for a in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.choices[0].logprobs.token_logprobs == pytest.approx(
            other.choices[0].logprobs.token_logprobs, abs=1e-3
        )
    assert_no_pages_used(server)
    assert server.metric("lamina_requests_running") == {"": 0}
    with client_of(monolith, api_key) as local:
        assert [gist(a) for a in run_all(local, requests)] == [gist(a) for a in alone]
    assert monolith.tree() == [monolith.engine()], "no worker, no fork server"
    assert not any(monolith.metric("lamina_kv_pages_used").values())


def test_completion_stream(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 30,
        "temperature": 0,
        "logprobs": 2,
    }
    whole = client.completions.create(**request)
    chunks = list(
        client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    *pieces, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    assert last.usage is not None
    assert last.usage.completion_tokens == 30
    assert all(chunk.usage is None for chunk in pieces)
    choices = [choice for chunk in pieces for choice in chunk.choices]
    assert len(choices) > 10, "it comes piece by piece"
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    assert [c.finish_reason for c in choices if c.finish_reason] == ["length"]
    streamed = [token for c in choices if c.logprobs for token in c.logprobs.tokens]
    assert streamed == whole.choices[0].logprobs.tokens
    assert len(streamed) == 30


def test_logprobs_and_echo(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "logprobs": 3}
    plain = client.completions.create(**request, max_tokens=6).choices[0]
    echoed = client.completions.create(**request, max_tokens=6, echo=True).choices[0]
    only_echo = client.completions.create(**request, max_tokens=0, echo=True).choices[0]
    assert echoed.text == PROMPT + plain.text
    assert only_echo.text == PROMPT
    num_prompt = len(only_echo.logprobs.tokens)
    assert "".join(only_echo.logprobs.tokens) == PROMPT
    assert only_echo.logprobs.token_logprobs[0] is None
    assert len(echoed.logprobs.tokens) == num_prompt + 6
    assert echoed.logprobs.tokens[num_prompt:] == plain.logprobs.tokens
    assert echoed.logprobs.token_logprobs[1:] == pytest.approx(
        only_echo.logprobs.token_logprobs[1:] + plain.logprobs.token_logprobs, abs=1e-3
    )
    for chosen, top in zip(plain.logprobs.token_logprobs, plain.logprobs.top_logprobs, strict=True):
        assert chosen == max(top.values()), "greedy takes the most likely token"


def test_several_answers_and_prompts(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "prompt": [PROMPT, "mos"],
        "n": 2,
        "max_tokens": 12,
        "seed": 5,
        "logprobs": 0,
    }
    answers = client.completions.create(**request)
    assert [choice.index for choice in answers.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answers.choices}) == 4
    assert gist(client.completions.create(**request)) == gist(answers)
    assert answers.usage.completion_tokens == sum(len(c.logprobs.tokens) for c in answers.choices)


def test_stop_string(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 30,
        "temperature": 0,
    }
    whole = client.completions.create(**request).choices[0].text
    printable = [i for i, text in enumerate(whole) if text != "\ufffd"]
    stop = whole[printable[len(printable) // 2] :][:1]
    ended = client.completions.create(**request, stop=[stop]).choices[0]
    assert ended.text == whole[: whole.index(stop)]
    assert (ended.finish_reason, ended.model_extra["stop_reason"]) == ("stop", stop)
    pieces = client.completions.create(**request, stop=[stop], stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == ended.text


def test_chat(client: openai.OpenAI, server: Server) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "bak"},
            {"role": "user", "content": "delfit?"},
        ],
        "max_tokens": 20,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**request, logprobs=True, top_logprobs=2)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("length", "stop")
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    chunks = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage == whole.usage
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    # The template is the model's own: the same prompt written out by hand has the same answer.
    written = client.completions.create(
        model=MODEL,
        prompt="<|system|>bak</s><|user|>delfit?</s><|assistant|>",
        max_tokens=20,
        temperature=0,
    )
    assert written.choices[0].text == choice.message.content
    assert written.usage == whole.usage


def test_tokenizer_routes(server: Server) -> None:
    with server.client() as http:
        tokens = http.post("/tokenize", json={"model": MODEL, "prompt": PROMPT}).json()
        assert tokens["max_model_len"] == MAX_MODEL_LEN
        text = http.post("/detokenize", json={"model": MODEL, "tokens": tokens["tokens"]}).json()
        assert text == {"prompt": PROMPT}
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/version").status_code == 200


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert model.model_extra["max_model_len"] == MAX_MODEL_LEN


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[])
    assert caught.value.param == "messages"


def test_disconnected_client_frees_its_pages(server: Server, client: openai.OpenAI) -> None:
    worker = next(p for p in server.tree() if p.name.startswith("lamina-attn"))
    with client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=80,
        n=4,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        next(iter(stream))
        os.kill(worker.pid, signal.SIGSTOP)  # no answer is done before the client goes
        try:
            assert any(server.metric("lamina_kv_pages_used").values())
            stream.close()
            time.sleep(0.3)  # the abort waits behind the step in flight
        finally:
            os.kill(worker.pid, signal.SIGCONT)
    assert_no_pages_used(server)
    assert server.metric("lamina_requests_total")['finish_reason="abort"'] == 4
