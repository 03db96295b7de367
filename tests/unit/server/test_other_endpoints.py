from __future__ import annotations

import pytest

import lamina

MODEL = "org/fake"


def test_models(client):
    (card,) = client.models.list().data
    assert (card.id, card.object, card.owned_by) == (MODEL, "model", "lamina")
    assert client.models.retrieve(MODEL).id == MODEL


def test_model_card_and_unknown_model(http):
    assert http.get(f"/v1/models/{MODEL}").json()["max_model_len"] == 200
    answer = http.get("/v1/models/other/name")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


def test_version(http):
    assert http.get("/version").json() == {"version": lamina.__version__}


def test_tokenize(http):
    assert http.post("/tokenize", json={"prompt": "Hé", "model": MODEL}).json() == {
        "count": 4,
        "max_model_len": 200,
        "tokens": [256, 72, 0xC3, 0xA9],
        "token_strs": None,
    }
    body = {"prompt": "Hi", "add_special_tokens": False, "return_token_strs": True}
    answer = http.post("/tokenize", json=body).json()
    assert (answer["tokens"], answer["token_strs"]) == ([72, 105], ["H", "i"])
    empty = http.post("/tokenize", json={"prompt": "", "add_special_tokens": False}).json()
    assert (empty["count"], empty["tokens"]) == (0, [])


def test_tokenize_chat_is_what_chat_sends(http, engine):
    messages = [{"role": "user", "content": "Hi"}]
    tokens = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    http.post("/v1/chat/completions", json={"messages": messages})
    assert tuple(tokens) == engine.started[0].ids


def test_detokenize(http):
    answer = http.post("/detokenize", json={"tokens": [256, 72, 0xC3, 0xA9]})
    assert answer.json() == {"prompt": "<s>Hé"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "u", "content": "x"}]}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [258]}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
    ],
)
def test_refusals(http, path, body, status, param):
    answer = http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
