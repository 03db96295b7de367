from __future__ import annotations

import concurrent.futures

import pytest

from lamina.engine.outputs import TokenLogprob
from lamina.server.logprobs import LegacyWriter, chat_logprobs

MODEL = "org/fake"


def test_one_prompt(client, engine):
    out = client.completions.create(model=MODEL, prompt="Hi", temperature=0, seed=3)
    assert out.id.startswith("cmpl-")
    assert (out.object, out.model) == ("text_completion", MODEL)
    (choice,) = out.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, "0: hé wörld", "stop")
    assert choice.logprobs is None
    num_tokens = len("0: hé wörld".encode())
    assert (out.usage.prompt_tokens, out.usage.completion_tokens) == (3, num_tokens)
    assert out.usage.total_tokens == 3 + num_tokens
    (request,) = engine.started
    assert request.ids == (256, 72, 105)  # BOS, H, i
    assert (request.sampling.temperature, request.sampling.seed) == (0, 3)
    assert request.sampling.max_tokens == 16


def test_max_tokens_ends_with_length(client):
    (choice,) = client.completions.create(model=MODEL, prompt="Hi", max_tokens=3).choices
    assert (choice.text, choice.finish_reason) == ("0: ", "length")


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        (["A", "B"], [(256, 65), (256, 66)]),
        ([65, 66], [(65, 66)]),
        ([[65], [66, 67]], [(65,), (66, 67)]),
    ],
)
def test_kinds_of_prompts(client, engine, prompt, ids):
    out = client.completions.create(model=MODEL, prompt=prompt, n=2)
    assert [request.ids for request in sorted(engine.started, key=lambda r: r.id)] == ids
    assert [choice.index for choice in out.choices] == list(range(2 * len(ids)))
    assert [choice.text[0] for choice in out.choices] == ["0", "1"] * len(ids)
    assert out.usage.prompt_tokens == sum(map(len, ids))


def test_all_sampling_fields_reach_the_engine(client, engine):
    client.completions.create(
        model=MODEL,
        prompt="x",
        n=1,
        best_of=1,
        max_tokens=9,
        temperature=1,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1,
        seed=7,
        stop=["a", "b"],
        logprobs=2,
        extra_body={
            "top_k": 4,
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [5, 6],
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "prompt_logprobs": 3,
            "a_field_that_nobody_knows": {"x": 1},
        },
    )
    (request,) = engine.started
    given = {name: getattr(request.sampling, name) for name in request.sampling.__struct_fields__}
    assert given == {
        "n": 1,
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 1.0,
        "top_p": 0.5,
        "top_k": 4,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.5,
        "seed": 7,
        "stop": ("a", "b"),
        "stop_token_ids": (5, 6),
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 2,
        "prompt_logprobs": 3,
    }


def test_default_max_tokens_shrinks_to_the_room_left(http, engine):
    body = {"prompt": [[65] * 195, [65]]}
    assert http.post("/v1/completions", json=body).is_success
    by_length = sorted((len(r.ids), r.sampling.max_tokens) for r in engine.started)
    assert by_length == [(1, 16), (195, 5)]
    http.post("/v1/completions", json={"prompt": [65] * 195, "max_tokens": 16})
    assert engine.started[-1].sampling.max_tokens == 16  # the engine's to refuse


def test_null_counts_as_left_out(http, engine):
    body = {"prompt": "x", "temperature": None, "stop": None, "n": None, "max_tokens": None}
    assert http.post("/v1/completions", json=body).status_code == 200
    sampling = engine.started[0].sampling
    assert (sampling.temperature, sampling.stop, sampling.max_tokens) == (1.0, (), 16)


def test_streaming_joins_to_the_whole(client, engine):
    engine.reply = lambda index: f"{index} → ✓ ünï"
    stream = client.completions.create(
        model=MODEL, prompt=["a", "b"], n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    texts = [""] * 4
    reasons: list[str | None] = [None] * 4
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        assert "�" not in choice.text
        texts[choice.index] += choice.text
        reasons[choice.index] = reasons[choice.index] or choice.finish_reason
    assert texts == ["0 → ✓ ünï", "1 → ✓ ünï"] * 2
    assert reasons == ["stop"] * 4
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == 4
    assert chunks[-1].usage.completion_tokens == 4 * len("0 → ✓ ünï".encode())
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_format(http):
    body = {"prompt": "x", "stream": True, "max_tokens": 2}
    answer = http.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert '"usage"' not in answer.text


def test_logprobs(client, engine):
    engine.reply = lambda index: "aé"
    (choice,) = client.completions.create(model=MODEL, prompt="Hi", logprobs=2).choices
    lists = choice.logprobs
    assert lists.tokens == ["a", "�", "�"]
    assert lists.token_logprobs == [-0.97, -1.95, -1.69]
    assert lists.text_offset == [0, 1, 1]  # the second byte of é starts inside it
    assert lists.top_logprobs[0] == {"z": -0.01, "a": -0.97}


def test_text_offset_survives_invalid_text():
    entries = [
        TokenLogprob(token_id=raw[0], token="?", utf8=raw, logprob=-1.0, rank=1)
        for raw in (b"a", b"\x80", b"\xe2", b"\x86", b"\x92", b"z", b"\xc3", b"z")
    ]
    text = b"".join(entry.utf8 for entry in entries).decode(errors="replace")
    assert text == "a\ufffd→z\ufffdz"
    offsets = LegacyWriter(0, frozenset()).answer(entries).text_offset
    assert offsets == [0, 1, 2, 2, 2, 3, 4, 4]


def test_logprobs_always_hold_the_token_itself(client, engine):
    engine.reply = lambda index: "a"
    for wanted, top in ((0, {"a": -0.97}), (1, {"z": -0.01, "a": -0.97})):
        (choice,) = client.completions.create(model=MODEL, prompt="x", logprobs=wanted).choices
        assert choice.logprobs.top_logprobs == [top]


def test_minus_infinity_is_written_as_a_number():
    entry = TokenLogprob(token_id=1, token="a", utf8=b"a", logprob=float("-inf"), rank=9)
    written = LegacyWriter(0, frozenset()).answer([entry])
    assert written.token_logprobs == [-9999.0]
    assert chat_logprobs([entry]).content[0].logprob == -9999.0


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_covers_the_prompt(client, engine, stream):
    engine.reply = lambda index: "b"
    out = client.completions.create(model=MODEL, prompt="Hé", echo=True, logprobs=1, stream=stream)
    if stream:
        (chunk,) = list(out)
        choice = chunk.choices[0]
    else:
        choice = out.choices[0]
    assert choice.text == "Héb"
    lists = choice.logprobs
    assert lists.tokens == ["<s>", "H", "�", "�", "b"]
    assert lists.token_logprobs == [None, -0.72, -1.95, -1.69, -0.98]
    assert lists.top_logprobs[0] is None
    assert lists.text_offset == [0, 0, 1, 1, 2]  # BOS is not part of the text
    assert engine.started[0].sampling.prompt_logprobs == 1


def test_echo_without_logprobs(client):
    (choice,) = client.completions.create(
        model=MODEL, prompt=[72, 105], echo=True, max_tokens=2
    ).choices
    assert choice.text == "Hi0:"
    assert choice.logprobs is None


def test_max_tokens_0_with_echo_scores_the_prompt(client, engine):
    out = client.completions.create(
        model=MODEL, prompt=[72, 105], echo=True, max_tokens=0, logprobs=1
    )
    (choice,) = out.choices
    assert (choice.text, choice.finish_reason) == ("Hi", "length")
    assert choice.logprobs.tokens == ["H", "i"]
    assert out.usage.completion_tokens == 0
    assert engine.started[0].sampling.max_tokens == 1


def test_prompt_logprobs_in_vllms_shape(http):
    body = {"prompt": [72, 105], "prompt_logprobs": 1}
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "122": {"logprob": -0.01, "rank": 1, "decoded_token": "z"},
            "105": {"logprob": -1.05, "rank": 2, "decoded_token": "i"},
        },
    ]
    plain = http.post("/v1/completions", json={"prompt": "x"}).json()
    assert "prompt_logprobs" not in plain["choices"][0]


def test_prompts_run_at_the_same_time(http, engine, tools):
    engine.hang_after = 0
    with concurrent.futures.ThreadPoolExecutor() as pool:
        body = {"prompt": ["a", "b", "c"], "stream": True}
        pool.submit(_post_and_leave, str(http.base_url), body)
        tools.wait_until(lambda: len(engine.started) == 3)


def _post_and_leave(url, body):
    import httpx

    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=0.3)


def test_many_requests_at_once(client, engine):
    engine.delay_s = 0.001

    def ask(number):
        out = client.completions.create(model=MODEL, prompt=f"p{number}", max_tokens=4 + number % 5)
        return out.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(ask, range(64)))
    assert texts == [
        "0: hé wörld".encode()[: 4 + i % 5].decode(errors="replace") for i in range(64)
    ]
