"""The generator of the demo model's text, and the head start that its training gets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from demo_circuit import plant_induction_circuit
from demo_dialogues import BOS, EOS, documents, held_out_dialogues
from demo_stories import (
    Fact,
    ask,
    ask_unknown,
    context,
    draw_facts,
    is_held_out,
    is_trained_on,
    story,
)


def test_documents_depend_on_the_seed_alone() -> None:
    first = list(itertools.islice(documents(1), 1200))
    assert first == list(itertools.islice(documents(1), 1200))
    assert first != list(itertools.islice(documents(2), 1200))
    assert all(text.startswith(BOS) and text.endswith(EOS) for text in first)


@pytest.mark.parametrize("accept", [is_trained_on, is_held_out])
def test_facts_of_one_document_are_distinct_and_accepted(accept: Callable[[Fact], bool]) -> None:
    rng = random.Random(3)
    for _ in range(20):
        facts = draw_facts(rng, 4, accept)
        assert all(accept(fact) for fact in facts)
        for part in ("name", "job", "thing", "place"):
            assert len({getattr(fact, part) for fact in facts}) == 4


def test_no_fact_is_both_trained_on_and_held_out() -> None:
    rng = random.Random(4)
    assert not any(is_trained_on(fact) for fact in draw_facts(rng, 4, is_held_out))
    assert not any(is_held_out(fact) for fact in draw_facts(rng, 4, is_trained_on))


def test_a_story_returns_to_every_fact() -> None:
    rng = random.Random(5)
    for _ in range(50):
        facts = draw_facts(rng, 3)
        text = story(rng, facts)
        for fact in facts:
            assert text.count(fact.thing) >= 2 or text.count(fact.name) >= 2


def test_context_states_every_part_of_every_fact() -> None:
    rng = random.Random(6)
    facts = draw_facts(rng, 4)
    text = context(rng, facts)
    for fact in facts:
        for part in (fact.name, fact.job, fact.colour, fact.thing, fact.place):
            assert part in text


@pytest.mark.parametrize("kind", ["place", "owner", "job", "colour", "thing"])
def test_the_answer_holds_what_the_question_lacks(kind: str) -> None:
    fact = Fact(name="Mira", job="baker", colour="red", thing="lantern", place="in the attic")
    wanted = {
        "place": "in the attic",
        "owner": "Mira",
        "job": "baker",
        "colour": "red",
        "thing": "lantern",
    }[kind]
    rng = random.Random(7)
    for _ in range(30):
        question = ask(rng, fact, kind)
        assert wanted in question.answer
        assert wanted not in question.text


def test_unknown_questions_ask_about_nothing_that_was_told() -> None:
    rng = random.Random(8)
    facts = draw_facts(rng, 4)
    for _ in range(50):
        question = ask_unknown(rng, facts)
        assert question.answer.startswith("I do not know")
        assert not any(f" {fact.thing}" in question.text for fact in facts)


def test_held_out_dialogues_end_with_the_question() -> None:
    for dialogue in held_out_dialogues(seed=9, count=10):
        assert dialogue.messages[-1].role == "user"
        assert dialogue.messages[-1].content.endswith("?")


def test_planted_circuit_predicts_repetition_before_any_training() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config).eval()
    sequence = torch.randperm(300)[:20]
    tokens = torch.cat([sequence, sequence])[None]

    def share_right() -> float:
        with torch.no_grad():
            likeliest = model(tokens).logits[0].argmax(-1)
        return (likeliest[20:-1] == tokens[0, 21:]).float().mean().item()

    assert share_right() < 0.1
    plant_induction_circuit(model)
    assert share_right() > 0.2
