"""The bundled demo model as a user meets it: load it from its folder, talk to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lamina.demo
from demo_dialogues import HeldOutDialogue, Message, held_out_dialogues, render
from lamina.demo import demo_model_path
from lamina.errors import CheckpointError

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()


def generate(model: Any, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    """The greedy continuation, token ids only."""
    prompt = torch.tensor([prompt_ids])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return output[0, len(prompt_ids) :].tolist()


def reply(model: Any, tokenizer: Any, messages: list[Message], max_new_tokens: int = 150) -> str:
    """The assistant's whole reply; fails if it does not end by itself."""
    prompt_ids = tokenizer.apply_chat_template(
        [message._asdict() for message in messages], add_generation_prompt=True, return_dict=False
    )
    ids = generate(model, prompt_ids, max_new_tokens)
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
    return tokenizer.decode(ids[:-1])


def test_folder_holds_small_plain_files_only() -> None:
    names = {path.name for path in demo_model_path().iterdir()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (demo_model_path() / "model.safetensors").stat().st_size <= 4 * MEGABYTE
    assert (demo_model_path() / "tokenizer.json").stat().st_size <= MEGABYTE


def test_missing_file_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lamina.demo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*reinstall lamina-serve"):
        demo_model_path()


def test_kv_heads_divide_among_one_two_and_four_workers() -> None:
    config = json.loads((demo_model_path() / "config.json").read_text())
    assert config["num_key_value_heads"] % 4 == 0
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    assert config["tie_word_embeddings"]
    assert config["max_position_embeddings"] == 1024


@pytest.mark.parametrize("text", ["Mira's lantern.", "naïve 漢字 🙂", "  two\n\tspaces ", "x=1;"])
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_words_of_the_stories_are_single_tokens(tokenizer: Any) -> None:
    for word in (" Mira", " baker", " red", " lantern", " attic"):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1


def test_chat_template_writes_what_the_model_was_trained_on(tokenizer: Any) -> None:
    messages = [
        Message("system", "You are a helpful assistant."),
        Message("user", "Hello!"),
        Message("assistant", "Hello!"),
    ]
    dicts = [message._asdict() for message in messages]
    assert tokenizer.apply_chat_template(dicts, tokenize=False) == render(messages)
    prompt = tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=True)
    assert prompt == render(messages) + "<|assistant|>"


def test_chat_template_refuses_unknown_roles(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="system, user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "1"}], tokenize=False)


def test_answers_held_out_questions(model: Any, tokenizer: Any) -> None:
    dialogues: list[HeldOutDialogue] = held_out_dialogues(seed=7, count=30)
    right = [
        reply(model, tokenizer, dialogue.messages) == dialogue.answer for dialogue in dialogues
    ]
    assert sum(right) >= 24


def test_chat_introduces_itself(model: Any, tokenizer: Any) -> None:
    assert "demo model of Lamina" in reply(model, tokenizer, [Message("user", "Who are you?")])


def test_chat_tells_a_story_about_the_name_it_is_given(model: Any, tokenizer: Any) -> None:
    text = reply(model, tokenizer, [Message("user", "Tell me a story about Nora.")])
    assert text.count("Nora") >= 2
    assert text.endswith("The end.")


def test_completed_story_returns_to_its_facts_and_ends(model: Any, tokenizer: Any) -> None:
    prompt = (
        "Once there was a baker called Mira. Mira kept a red lantern in the attic. "
        "Later somebody asked where the lantern was. It was"
    )
    ids = generate(model, tokenizer.encode(prompt), max_new_tokens=200)
    assert tokenizer.decode(ids).startswith(" in the attic.")
    assert ids[-1] == tokenizer.eos_token_id
