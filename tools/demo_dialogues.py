"""Documents for the demo model: dialogues over the facts of `demo_stories`, and more.

`documents` is the endless, seeded stream that the tokenizer and the model are trained on;
`held_out_dialogues` draws the questions of the evaluation from combinations that never occur in it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from demo_stories import (
    Fact,
    Question,
    ask,
    context,
    draw_facts,
    is_held_out,
    made_up_name,
    question_list,
    recall,
    story,
    tell,
)
from demo_words import COLOURS, JOBS, NAMES, PLACES, THINGS

BOS = "<|begin|>"
EOS = "<|eos|>"
PAD = "<|pad|>"
END_OF_TURN = "<|end|>"
ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = (PAD, BOS, EOS, END_OF_TURN, *ROLE_TOKENS.values())


# Training begins with the densest exercise, see `recital`.
NUM_FIRST_RECITALS = 4000


class Message(NamedTuple):
    """One turn of a dialogue; `role` is a key of ROLE_TOKENS."""

    role: str
    content: str


class HeldOutDialogue(NamedTuple):
    """A dialogue that ends with a user's question, and the answer that the model should give."""

    kind: str
    messages: list[Message]
    answer: str


SMALL_TALK = (
    (
        ("Hello!", "Hello", "Hi!", "Hi", "Good morning!", "Good evening!", "Hey!"),
        "Hello! Tell me some facts and ask me about them, or ask me for a story.",
    ),
    (("How are you?", "How are you today?"), "I am well, thank you. How can I help?"),
    (
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself."),
        "I am the demo model of Lamina. I am very small, but I remember what you tell me.",
    ),
    (
        ("What can you do?", "How can you help me?", "Help!", "What should I ask you?"),
        "I can tell short stories. I can also answer questions about what you tell me: "
        "who has a thing, what colour it is and where it is.",
    ),
    (
        ("What is Lamina?", "Tell me about Lamina.", "What does Lamina do?"),
        "Lamina serves language models. The attention and its cache run on other devices "
        "than the rest of the model.",
    ),
    (("Thank you!", "Thank you.", "Thanks!", "Thanks"), "You are welcome!"),
    (("Goodbye!", "Bye!", "Bye", "See you!"), "Goodbye!"),
)
RECITED = ("place", "owner", "job", "colour", "thing")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are the demo model of Lamina.",
    "Answer in one short sentence.",
    "You are a friendly storyteller.",
    "Answer from what the user tells you.",
)


def render(messages: Sequence[Message]) -> str:
    """The dialogue as the chat template writes it."""
    turns = (f"{ROLE_TOKENS[role]}{content}{END_OF_TURN}" for role, content in messages)
    return BOS + "".join(turns)


def casual(rng: random.Random, text: str) -> str:
    """Now and then what a hurried user types: no capital letter, no question mark."""
    return text[0].lower() + text[1:].rstrip("?!.") if rng.random() < 0.08 else text


def exchange(rng: random.Random, question: Question) -> list[Message]:
    """A question and its answer as two turns."""
    return [
        Message("user", casual(rng, question.text)),
        Message("assistant", question.answer),
    ]


def questions(rng: random.Random, facts: Sequence[Fact], count: int) -> list[Message]:
    """`count` questions with their answers; some are short follow-ups."""
    messages: list[Message] = []
    previous = ""
    for _ in range(count):
        if previous in ("place", "colour") and rng.random() < 0.3:
            fact = rng.choice(facts)
            question = ask(rng, fact, previous)._replace(text=f"And the {fact.thing}?")
        else:
            question = ask(rng, rng.choice(facts))
        previous = question.kind
        messages += exchange(rng, question)
    return messages


def told_at_once(rng: random.Random) -> list[Message]:
    """Up to four facts in the first turn together with a question, then more questions."""
    facts = draw_facts(rng, rng.randint(1, 4))
    messages = questions(rng, facts, rng.randint(2, 7))
    gap = rng.choice((" ", " ", "\n"))
    messages[0] = Message("user", f"{context(rng, facts)}{gap}{messages[0].content}")
    return messages


def told_by_and_by(rng: random.Random) -> list[Message]:
    """Up to four facts, one turn at a time, each acknowledged, then questions."""
    facts = draw_facts(rng, rng.randint(1, 4))
    messages: list[Message] = []
    for fact in facts:
        reply = f"I see. {fact.name} has a {fact.colour} {fact.thing}."
        messages += [
            Message("user", tell(rng, fact, past=rng.random() < 0.2)),
            Message("assistant", reply),
        ]
    return messages + questions(rng, facts, rng.randint(2, 6))


def told_by_system(rng: random.Random) -> list[Message]:
    """Up to four facts in the system prompt, then questions."""
    facts = draw_facts(rng, rng.randint(1, 4))
    return [Message("system", context(rng, facts)), *questions(rng, facts, rng.randint(2, 6))]


def story_on_request(rng: random.Random) -> list[Message]:
    """A wish for a story, the story, and perhaps questions about it."""
    facts = draw_facts(rng, rng.randint(1, 2))
    hero = facts[0]
    wishes = [
        f"about {hero.name}",
        f"about {hero.name} the {hero.job}",
        f"about {hero.name} and a {hero.colour} {hero.thing}",
        f"about a {hero.job}",
        f"about a {hero.job} called {hero.name}",
        f"about a {hero.colour} {hero.thing}",
    ]
    if len(facts) == 2:
        wishes += [f"about {hero.name} and {facts[1].name}"] * 4
    opening = rng.choice(("Tell me a story", "Please tell me a story", "Write a short story"))
    messages = [
        Message("user", f"{opening} {rng.choice(wishes)}."),
        Message("assistant", story(rng, facts)),
    ]
    return messages + questions(rng, facts, rng.randint(0, 2))


def small_talk(rng: random.Random, most: int = 3) -> list[Message]:
    """One to `most` exchanges about nothing."""
    messages: list[Message] = []
    for prompts, reply in rng.sample(SMALL_TALK, rng.randint(1, most)):
        messages += [Message("user", rng.choice(prompts)), Message("assistant", reply)]
    return messages


def dialogue(rng: random.Random) -> list[Message]:
    """A whole conversation: its body, sometimes with a system prompt, a greeting or a farewell."""
    kinds = (told_at_once, told_by_and_by, told_by_system, story_on_request, small_talk)
    kind = rng.choices(kinds, weights=(10, 4, 3, 5, 3))[0]
    messages = kind(rng)
    if kind is not small_talk and messages[0].role == "user" and rng.random() < 0.1:
        messages = small_talk(rng, 1) + messages
    if kind is not small_talk and rng.random() < 0.1:
        messages += small_talk(rng, 1)
    if messages[0].role == "user" and rng.random() < 0.25:
        messages.insert(0, Message("system", rng.choice(SYSTEM_PROMPTS)))
    return messages


def retelling(rng: random.Random) -> str:
    """Facts told and then recalled in another order: a dense exercise in looking back."""
    facts = draw_facts(rng, rng.randint(1, 5))
    lines = [context(rng, facts)]
    for fact in rng.sample(facts, len(facts)):
        lines.append(recall(rng, fact, [other for other in facts if other is not fact]))
    return " ".join(lines)


def recital(rng: random.Random) -> str:
    """Up to four facts, then nothing but the answers to questions that nobody asks."""
    facts = draw_facts(rng, rng.randint(1, 4))
    answers = [ask(rng, rng.choice(facts), kind).answer for kind in rng.choices(RECITED, k=14)]
    return f"{context(rng, facts)}\n{' '.join(answers)}"


def drill(rng: random.Random) -> str:
    """Random words, said over and over in the same order."""
    words = []
    for _ in range(rng.randint(3, 12)):
        vocabulary = rng.choice((NAMES, JOBS, COLOURS, THINGS, PLACES, None))
        words.append(rng.choice(vocabulary) if vocabulary else made_up_name(rng))
    return f" {' '.join(words)}" * rng.randint(2, 4)


def documents(seed: int) -> Iterator[str]:
    """Endless training documents, each from BOS to EOS; the same for the same seed."""
    rng = random.Random(seed)
    for number in itertools.count():
        draw = rng.random()
        if number < NUM_FIRST_RECITALS or draw < 0.1:
            text = BOS + recital(rng)
        elif draw < 0.12:
            text = BOS + drill(rng)
        elif draw < 0.7:
            text = render(dialogue(rng))
        elif draw < 0.85:
            text = BOS + story(rng, draw_facts(rng, rng.randint(1, 4)))
        elif draw < 0.92:
            text = BOS + retelling(rng)
        else:
            text = BOS + question_list(rng, draw_facts(rng, rng.randint(1, 4)), rng.randint(2, 6))
        yield text + EOS


def held_out_dialogues(seed: int, count: int, *, num_facts: int = 3) -> list[HeldOutDialogue]:
    """`count` dialogues whose every fact is held out, asking in turn for each part of a fact."""
    rng = random.Random(seed)
    kinds = ("place", "owner", "thing", "job", "colour")
    dialogues = []
    for index in range(count):
        facts = draw_facts(rng, num_facts, is_held_out)
        question = ask(rng, rng.choice(facts), kinds[index % len(kinds)])
        messages = [Message("user", f"{context(rng, facts)} {question.text}")]
        dialogues.append(HeldOutDialogue(question.kind, messages, question.answer))
    return dialogues
