"""Wrong requests and failing engines: the status, OpenAI's shape, and a server that lives on."""

from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from lamina.errors import CapacityError, EngineDead, PeerLost, QueueFull
from lamina.server.app import create_app

MODEL = "org/fake"


def refused(http, body, status=400, path="/v1/completions"):
    """The error of a request that must fail; then shows that the server still answers."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_tokens", "5"),
        ("max_tokens", 1.5),
        ("max_tokens", 2**40),
        ("max_tokens", 10**400),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.5),
        ("temperature", "hot"),
        ("temperature", False),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_k", -2),
        ("min_p", float("-inf")),
        ("n", 0),
        ("n", 10**9),
        ("best_of", 2),
        ("seed", 2**64),
        ("seed", "x"),
        ("stop", 5),
        ("stop", {"a": 1}),
        ("stop", ["a", 1]),
        ("stop", ""),
        ("stop_token_ids", "1"),
        ("stop_token_ids", [-1]),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", -1),
        ("ignore_eos", "yes"),
        ("stream", 1),
        ("stream_options", {"include_usage": True}),
        ("logit_bias", {"5": 1}),
        ("suffix", "end"),
        ("model", 5),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", 5),
        ("prompt", None),
        ("prompt", True),
        ("prompt", ["a", 1]),
        ("prompt", [1, "a"]),
        ("prompt", [[1], "a"]),
        ("prompt", [1.5]),
        ("prompt", [True]),
        ("prompt", [258]),
        ("prompt", [-1]),
        ("prompt", [10**30]),
        ("prompt", ["a"] * 13),
        ("prompt", "x" * 300),
    ],
)
def test_400_names_the_field(http, engine, monkeypatch, field, value):
    if value == "" and field == "prompt":
        monkeypatch.setattr(engine.tokenizer, "encode", lambda text, **_: list(text))
    error = refused_once(http, {"prompt": "x", field: value})
    assert error["param"] == field
    assert error["message"].startswith(field)
    assert error["type"] == "invalid_request_error"
    assert all(started.id not in engine.aborted for started in engine.started)


def refused_once(http, body):
    answer = http.post("/v1/completions", content=json.dumps(body).encode())
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"prompt=x",
        b'{"prompt": "x"',
        b'{"prompt": "x"} {}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[1, 2]",
        b"null",
        b'"text"',
        b'{"prompt": "x", "deep": ' + b"[" * 9000 + b"]" * 9000 + b"}",
        b"NaN",
    ],
)
def test_bodies_that_are_no_json_object(http, body):
    error = refused(http, body)
    assert error["param"] is None
    assert "request body" in error["message"]


def test_missing_prompt(http):
    assert refused(http, {})["param"] == "prompt"


def test_whole_numbers_are_numbers(http):
    assert http.post("/v1/completions", json={"prompt": "x", "temperature": 1}).is_success


def test_unknown_model(client, http):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="x")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_unknown_route_and_method(http):
    missing = http.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["type"] == "invalid_request_error"


class TestBodyLimit:
    def test_announced(self, http, engine):
        error = refused(http, {"prompt": "x" * 30_000}, 413)
        assert "20000 bytes" in error["message"]
        assert len(engine.started) == 1  # the follow-up

    def test_10_megabytes(self, http):
        refused(http, b'{"prompt": "' + b"x" * 10_000_000 + b'"}', 413)

    def test_refused_before_it_is_sent(self, url, engine):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
        assert self._answer_to(url, head).startswith(b"HTTP/1.1 413")

    def test_a_body_that_does_not_come_times_out(self, url, engine, monkeypatch):
        monkeypatch.setattr("lamina.server.body.BODY_TIMEOUT_S", 0.05)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{"
        assert self._answer_to(url, head).startswith(b"HTTP/1.1 408")

    def test_unannounced_is_counted(self, http, url):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        piece = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
        assert self._answer_to(url, head + piece * 2).startswith(b"HTTP/1.1 413")

    @staticmethod
    def _answer_to(url, data):
        where = urlsplit(url)
        with socket.create_connection((where.hostname, where.port), timeout=5) as connection:
            connection.sendall(data)
            return connection.recv(4096)

    def test_just_under_the_limit(self, http):
        body = json.dumps({"prompt": "x", "user": ""})
        body = body.replace('""', '"' + "u" * (20_000 - len(body)) + '"').encode()
        assert len(body) == 20_000
        assert http.post("/v1/completions", content=body).is_success
        assert http.post("/v1/completions", content=body + b" ").status_code == 413


class TestEngineErrors:
    def test_queue_full(self, client, engine):
        engine.error = QueueFull("8 requests wait; retry later")
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(model=MODEL, prompt="x", stream=stream)
            assert int(caught.value.response.headers["retry-after"]) >= 1

    def test_one_full_prompt_ends_the_others(self, http, engine, tools):
        engine.error = QueueFull("full")
        assert http.post("/v1/completions", json={"prompt": ["a", "b"]}).status_code == 429

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (EngineDead("the engine ended"), 503),
            (CapacityError("too few pages"), 503),
            (PeerLost("heartbeat stopped", peer="attention-2"), 500),
            (ZeroDivisionError("oops"), 500),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_status_of_errors_before_the_first_token(self, http, engine, error, status, stream):
        engine.error = error
        answer = http.post("/v1/completions", json={"prompt": "x", "stream": stream})
        assert answer.status_code == status
        assert str(error) in answer.json()["error"]["message"]

    def test_failure_while_generating(self, client, engine):
        engine.fail_after = 2
        with pytest.raises(openai.InternalServerError, match="attention-1 was lost") as caught:
            client.completions.create(model=MODEL, prompt=["x", "y"])
        assert caught.value.status_code == 500

    def test_one_failed_answer_aborts_the_others(self, http, engine):
        engine.fail_after = 1
        assert http.post("/v1/completions", json={"prompt": "x", "n": 2}).status_code == 500
        assert engine.aborted == [engine.started[0].id]

    @pytest.mark.parametrize("chat", [False, True])
    def test_failure_in_a_stream(self, client, engine, chat):
        engine.fail_after = 2
        if chat:
            stream = client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "x"}], stream=True
            )
        else:
            stream = client.completions.create(model=MODEL, prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="attention-1 was lost"):
            for _ in stream:
                pass

    def test_a_failed_stream_is_not_done(self, http, engine):
        engine.fail_after = 1
        text = http.post("/v1/completions", json={"prompt": "x", "stream": True}).text
        assert "[DONE]" not in text
        assert json.loads(text.split("data: ")[-1])["error"]["type"] == "server_error"

    def test_unhealthy(self, http, engine):
        assert http.get("/health").status_code == 200
        engine.unhealthy = "attention-2 was lost"
        health = http.get("/health")
        assert health.status_code == 503
        assert "attention-2 was lost" in health.json()["reason"]
        answer = http.post("/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 503
        assert "attention-2 was lost" in answer.json()["error"]["message"]
        assert engine.started == []

    def test_no_tokenizer(self, tools):
        engine = tools.FakeEngine()
        engine.tokenizer = None
        app = create_app(engine, served_model_name="m")
        with tools.Live(app) as live, httpx.Client(base_url=live.url) as http:
            assert http.post("/v1/completions", json={"prompt": [65]}).is_success
            for path, body in (
                ("/v1/completions", {"prompt": "x"}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
                ("/tokenize", {"prompt": "x"}),
                ("/detokenize", {"tokens": [1]}),
            ):
                answer = http.post(path, json=body)
                assert answer.status_code == 400
                assert "no tokenizer" in answer.json()["error"]["message"]


def test_api_key(tools):
    app = create_app(tools.FakeEngine(), served_model_name=MODEL, api_key="sésame")
    with tools.Live(app) as live:
        url = f"{live.url}/v1"
        with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.completions.create(model=MODEL, prompt="x")
            assert caught.value.code == "invalid_api_key"
        with httpx.Client(base_url=live.url) as http:
            for path in ("/health", "/metrics", "/version"):
                assert http.get(path).status_code == 200
            assert http.get("/v1/models").status_code == 401
            assert http.post("/tokenize", json={"prompt": "x"}).status_code == 401
            for value, status in (
                ("Bearer sésame", 200),
                ("bearer sésame", 200),
                ("sésame", 401),
                ("Basic sésame", 401),
                ("Bearer", 401),
                ("Bearer sésamee", 401),
            ):
                headers = {"authorization": value.encode()}
                assert http.get("/v1/models", headers=headers).status_code == status, value
