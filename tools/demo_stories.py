"""Text for the demo model: short stories and dialogues in which facts recur.

Everything comes from the templates below and a seeded random generator. A document draws a handful
of facts ("Mira the baker keeps a red lantern in the attic") and later needs them again, in a
retelling or in the answer to a question, so a model that wants to predict it must look back over
its context. Some combinations never occur in training; the evaluation asks only about those.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from demo_words import (
    COLOURS,
    HOMES,
    JOBS,
    NAME_ENDS,
    NAME_MIDDLES,
    NAME_STARTS,
    NAME_VOWELS,
    NAMES,
    PLACES,
    SEASONS,
    THINGS,
    TIMES,
    WEATHER,
)

# One in so many (thing, place) and (name, thing) pairs is kept for the evaluation.
HELD_OUT_SHARE = 8


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One person with a job, who keeps one coloured thing in one place."""

    name: str
    job: str
    colour: str
    thing: str
    place: str


class Question(NamedTuple):
    """A question about a fact and the one right answer; `kind` is the part that is asked for."""

    kind: str
    text: str
    answer: str


def _held_out_pair(first: str, second: str) -> bool:
    return zlib.crc32(f"{first}/{second}".encode()) % HELD_OUT_SHARE == 0


def is_held_out(fact: Fact) -> bool:
    """True if the fact pairs its thing with a place and its name with a thing never trained on."""
    return _held_out_pair(fact.thing, fact.place) and _held_out_pair(fact.name, fact.thing)


def is_trained_on(fact: Fact) -> bool:
    """True if neither of the fact's pairs is held out."""
    return not (_held_out_pair(fact.thing, fact.place) or _held_out_pair(fact.name, fact.thing))


def made_up_name(rng: random.Random) -> str:
    """A pronounceable name such as "Teldor"; there are too many of them to learn by heart."""
    name = rng.choice(NAME_STARTS) + rng.choice(NAME_VOWELS) + rng.choice(NAME_MIDDLES)
    if rng.random() < 0.3:
        name += rng.choice(NAME_VOWELS) + rng.choice(NAME_MIDDLES)
    return name + rng.choice(NAME_ENDS)


def draw_facts(
    rng: random.Random, count: int, accept: Callable[[Fact], bool] = is_trained_on
) -> list[Fact]:
    """`count` facts that share no name, job, thing or place, each passing `accept`."""
    facts: list[Fact] = []
    while len(facts) < count:
        fact = Fact(
            name=made_up_name(rng) if rng.random() < 0.15 else rng.choice(NAMES),
            job=rng.choice(JOBS),
            colour=rng.choice(COLOURS),
            thing=rng.choice(THINGS),
            place=rng.choice(PLACES),
        )
        clashes = any(
            fact.name == other.name
            or fact.job == other.job
            or fact.thing == other.thing
            or fact.place == other.place
            for other in facts
        )
        if not clashes and accept(fact):
            facts.append(fact)
    return facts


def tell(rng: random.Random, fact: Fact, *, past: bool) -> str:
    """The whole fact in two or three short sentences, mostly in the same order."""
    n, j, c, t, p = fact.name, fact.job, fact.colour, fact.thing, fact.place
    is_, has, keeps, belongs = (
        ("was", "had", "kept", "belonged") if past else ("is", "has", "keeps", "belongs")
    )
    if rng.random() < 0.15:
        return rng.choice(
            (
                f"{n} {is_} a {j}. {n} {keeps} a {c} {t} {p}.",
                f"The {c} {t} {belongs} to {n}. {n} {is_} a {j}. The {t} {is_} {p}.",
            )
        )
    return f"{n} {is_} a {j}. {n} {rng.choice((has, keeps))} a {c} {t}. The {t} {is_} {p}."


def ask(rng: random.Random, fact: Fact, kind: str | None = None) -> Question:
    """A question about one part of `fact`; `kind` is place, owner, job, colour or thing."""
    n, j, c, t, p = fact.name, fact.job, fact.colour, fact.thing, fact.place
    if kind is None:
        kind = rng.choice(("place", "place", "owner", "owner", "job", "colour", "thing"))
    if kind == "place":
        text = rng.choice(
            (
                f"Where is the {t}?",
                f"Where is the {t}?",
                f"Where is the {c} {t}?",
                f"Where is {n}'s {t}?",
                f"Where does {n} keep the {t}?",
                f"Where can I find the {t}?",
            )
        )
        return Question(kind, text, f"The {t} is {p}.")
    if kind == "owner":
        text, answer = rng.choice(
            (
                (f"Who has the {t}?", f"The {t} belongs to {n}."),
                (f"Who has the {c} {t}?", f"The {t} belongs to {n}."),
                (f"Who owns the {t}?", f"The {t} belongs to {n}."),
                (f"Whose is the {t}?", f"The {t} belongs to {n}."),
                (f"Who is the {j}?", f"The {j} is {n}."),
            )
        )
        return Question(kind, text, answer)
    if kind == "job":
        text = rng.choice(
            (f"What does {n} do?", f"What does {n} do?", f"What is {n}'s job?", f"Who is {n}?")
        )
        return Question(kind, text, f"I remember that {n} is a {j}.")
    if kind == "colour":
        text = rng.choice((f"What colour is the {t}?", f"What color is the {t}?"))
        return Question(kind, text, f"The {t} is {c}.")
    text = rng.choice((f"What does {n} have?", f"What does {n} have?", f"What does {n} keep?"))
    return Question("thing", text, f"I remember that {n} has a {c} {t}.")


def filler(rng: random.Random, facts: Sequence[Fact]) -> str:
    """A sentence that adds nothing to the facts but stands between them and their return."""
    n, m = rng.choice(facts).name, rng.choice(facts).name
    weather, time, season = rng.choice(WEATHER), rng.choice(TIMES), rng.choice(SEASONS)
    options = [
        f"It was a {weather} {time} in {season}.",
        f"The {season} was {weather} that year.",
        f"The {time} was {weather}.",
        f"The people of the {rng.choice(HOMES)} liked {n}.",
        f"{n} sang a song.",
        f"{n} made a pot of soup.",
    ]
    if n != m:
        options += [
            f"{n} and {m} were good friends.",
            f"{n} met {m} at the market.",
            f"{n} told {m} a long story.",
        ]
    return rng.choice(options)


def recall(rng: random.Random, fact: Fact, others: Sequence[Fact]) -> str:
    """A later part of a story, in which the fact comes back."""
    n, j, c, t, p = fact.name, fact.job, fact.colour, fact.thing, fact.place
    m = rng.choice(others).name if others else "Somebody"
    return rng.choice(
        (
            f"Later somebody asked where the {t} was. It was {p}.",
            f"Later somebody asked who had the {t}. It was {n}.",
            f'"Where is the {t}?" asked {m}. "The {t} is {p}," said {n}.',
            f'"Who has the {c} {t}?" asked {m}. "I have it," said {n} the {j}.',
            f"{m} looked for the {t}. The {c} {t} was {p}.",
            f"{m} wanted to see the {c} {t}. So {n} went to look {p}.",
            f"{m} found a {c} {t} {p}. It belonged to {n} the {j}.",
            f"Everybody knew that the {t} {p} belonged to {n}.",
            f"{n} still had the {c} {t}. It was {p}.",
            f"In the end {n} the {j} came back for the {c} {t}.",
        )
    )


def story(rng: random.Random, facts: Sequence[Fact]) -> str:
    """A story in one paragraph: every fact is told, then every fact comes back at least once."""
    people = list(facts)
    sentences = []
    for index, fact in enumerate(people):
        if index == 0 and rng.random() < 0.6:
            sentences.append(
                f"Once there was a {fact.job} called {fact.name}. "
                f"{fact.name} kept a {fact.colour} {fact.thing} {fact.place}."
            )
        else:
            sentences.append(tell(rng, fact, past=rng.random() < 0.8))
        if rng.random() < 0.4:
            sentences.append(filler(rng, people))
    returns = people + rng.choices(people, k=rng.randint(0, 2))
    rng.shuffle(returns)
    for fact in returns:
        sentences.append(recall(rng, fact, [other for other in people if other is not fact]))
        if rng.random() < 0.25:
            sentences.append(filler(rng, people))
    sentences.append(rng.choice(("The end.", f"{people[0].name} was happy. The end.")))
    return " ".join(sentences)


def context(rng: random.Random, facts: Sequence[Fact]) -> str:
    """The facts in random order, now and then with something between them."""
    sentences = []
    for fact in rng.sample(list(facts), len(facts)):
        sentences.append(tell(rng, fact, past=rng.random() < 0.2))
        if rng.random() < 0.15:
            sentences.append(filler(rng, facts))
    return " ".join(sentences)


def question_list(rng: random.Random, facts: Sequence[Fact], num_questions: int) -> str:
    """A context and questions about it in plain text, for completion without a chat template."""
    lines = [context(rng, facts)]
    for _ in range(num_questions):
        question = ask(rng, rng.choice(facts))
        lines.append(f"Question: {question.text}\nAnswer: {question.answer}")
    return "\n".join(lines)
