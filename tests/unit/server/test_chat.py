from __future__ import annotations

import openai
import pytest

MODEL = "org/fake"
HI = [{"role": "user", "content": "Hi"}]


def prompt_of(engine) -> str:
    return engine.tokenizer.decode(engine.started[-1].ids)


def test_answer(client, engine):
    out = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=4)
    assert out.id.startswith("chatcmpl-")
    (choice,) = out.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "0: h")
    assert (choice.finish_reason, choice.logprobs) == ("length", None)
    assert prompt_of(engine) == "<s>[user]Hi[assistant]"  # the template's BOS alone
    assert out.usage.prompt_tokens == len(engine.started[0].ids)
    assert out.usage.completion_tokens == 4


def test_without_max_tokens_the_context_is_the_limit(client, engine):
    client.chat.completions.create(model=MODEL, messages=HI)
    assert engine.started[0].sampling.max_tokens is None


def test_max_completion_tokens_wins(client, engine):
    client.chat.completions.create(model=MODEL, messages=HI, max_tokens=4, max_completion_tokens=2)
    assert engine.started[0].sampling.max_tokens == 2


def test_text_parts_and_template_arguments(client, engine):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": parts}],
        extra_body={"add_generation_prompt": False, "chat_template_kwargs": {"shout": True}},
    )
    assert prompt_of(engine) == "<s>[system]s;[user]a\nb!"


def test_continue_final_message(client, engine):
    client.chat.completions.create(
        model=MODEL,
        messages=[*HI, {"role": "assistant", "content": "Well"}],
        extra_body={"continue_final_message": True},
    )
    assert prompt_of(engine) == "<s>[user]Hi;[assistant]Well"


def test_several_answers(client):
    out = client.chat.completions.create(model=MODEL, messages=HI, n=3)
    assert [c.message.content for c in out.choices] == [f"{i}: hé wörld" for i in range(3)]


def test_logprobs(client, engine):
    engine.reply = lambda index: "é"
    out = client.chat.completions.create(model=MODEL, messages=HI, logprobs=True, top_logprobs=1)
    first, second = out.choices[0].logprobs.content
    assert (first.bytes, second.bytes) == ([0xC3], [0xA9])
    assert first.logprob == -1.95
    assert [(t.token, t.logprob) for t in first.top_logprobs] == [("z", -0.01)]
    plain = client.chat.completions.create(model=MODEL, messages=HI, logprobs=True)
    assert plain.choices[0].logprobs.content[0].top_logprobs == []


def test_streaming(client, engine):
    engine.reply = lambda index: f"{index}é"
    stream = client.chat.completions.create(
        model=MODEL,
        messages=HI,
        n=2,
        stream=True,
        logprobs=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    content = ["", ""]
    num_logprobs = [0, 0]
    seen = set()
    for chunk in chunks:
        (choice,) = chunk.choices
        if choice.index not in seen:
            seen.add(choice.index)
            assert (choice.delta.role, choice.delta.content) == ("assistant", "")
            continue
        assert choice.delta.role is None
        content[choice.index] += choice.delta.content or ""
        num_logprobs[choice.index] += len(choice.logprobs.content)
    assert content == ["0é", "1é"]
    assert num_logprobs == [3, 3]
    assert last.choices == []
    assert last.usage.completion_tokens == 6


def test_prompt_logprobs(http):
    body = {"messages": HI, "prompt_logprobs": 0, "n": 2}
    for stream in (False, True):
        text = http.post("/v1/chat/completions", json={**body, "stream": stream}).text
        assert text.count('"prompt_logprobs":[null,{') == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages",
        ),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
    ],
)
def test_refusals_name_the_field(client, engine, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=fields.pop("messages", HI), extra_body=fields
        )
    assert caught.value.param == param
    assert param in caught.value.message


def test_accepted_without_effect(client):
    client.chat.completions.create(
        model=MODEL,
        messages=HI,
        tools=[],
        response_format={"type": "text"},
        user="me",
        store=False,
        extra_body={"tool_choice": "none", "parallel_tool_calls": True},
    )


def test_no_template(client, engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model=MODEL, messages=HI)
