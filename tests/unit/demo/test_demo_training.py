"""The generator of the demo model's text, and the head start that its training gets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from demo_circuit import plant_lookup_circuit
from demo_dialogues import BOS, EOS, documents, held_out_dialogues
from demo_stories import (
    Fact,
    ask,
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


def test_held_out_dialogues_end_with_the_question() -> None:
    for dialogue in held_out_dialogues(seed=9, count=10):
        assert dialogue.messages[-1].role == "user"
        assert dialogue.messages[-1].content.endswith("?")


@pytest.fixture(scope="module")
def planted_attention() -> tuple[torch.Tensor, ...]:
    """Attention of an untrained model over twenty tokens said twice: [8, 40, 40] per layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=160,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    plant_lookup_circuit(model)
    sequence = torch.randperm(300)[:20]
    with torch.no_grad():
        outputs = model(torch.cat([sequence, sequence])[None], output_attentions=True)
    return tuple(attention[0] for attention in outputs.attentions)


def test_planted_heads_attend_to_the_four_tokens_before(
    planted_attention: tuple[torch.Tensor, ...],
) -> None:
    for head in range(8):
        offset = head // 2 + 1
        assert planted_attention[0][head].diagonal(-offset)[offset:].min() > 0.9


def test_planted_heads_find_what_came_next_last_time(
    planted_attention: tuple[torch.Tensor, ...],
) -> None:
    # The token at i + 20 was last seen at i, so what came next stands at i + 1, 19 back.
    for head in range(4):
        found = planted_attention[1][head].diagonal(-19)[5:].mean()
        anywhere = planted_attention[1][head][25:].mean()
        assert found > 5 * anywhere
