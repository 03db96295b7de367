"""The words of the demo model's world: who lives there, what they own and where they keep it.

Every list is plain data written for this project. Words start with a consonant sound wherever an
article may come before them, so that "a" is always right.
"""

from __future__ import annotations


def _split(text: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(" ".join(word.split()) for word in text.split(separator))


NAMES = _split(
    """
    Mira Tom Lena Oskar Ruth Felix Nora Hugo Clara Paul Ida Max Eva Leo Anna Ben Maya Carl Rosa Finn
    Alice Bob Emma Jack Lucy Peter Sara David Julia Simon Greta Theo Marta Jonas Vera Victor Stella
    Martin Olga Hans Elsa Tim Nina Otto Laura Adam Karin Noah Sofia Liam Mary John Kate Sam Ella
    Oliver Grace Henry Rose George Amy Frank Zoe Walter
    """
)

# Made-up names are built from these, so that no list of names can be learnt by heart.
NAME_STARTS = _split("B D F G H K L M N P R S T V Z Br Dr Gr Kr Th Tr Sh St Ch")
NAME_VOWELS = _split("a e i o u")
NAME_MIDDLES = _split("b d l m n r s t v l n r ll nn rr nd rt lm")
NAME_ENDS = _split("a o i us in an or el is ek on y")

JOBS = _split(
    """
    baker sailor farmer doctor teacher miller painter weaver hunter singer tailor cook potter
    gardener fisher smith carpenter dancer writer judge pilot nurse shepherd guard driver poet
    """
)

COLOURS = _split("red blue green yellow white black brown silver golden purple pink grey")

THINGS = _split(
    """
    lantern drum key book coin ring map hat bell box cup basket mirror clock flute ladder rope
    candle kite boat sword violin letter bottle blanket pot hammer button knife scarf lamp ball
    wheel shell stone feather bag flag comb chair
    """
)

# A place carries its own preposition.
PLACES = _split(
    """
    in the attic, in the barn, in the cellar, in the kitchen, in the garden, in the tower, in
    the cave, in the forest, in the library, in the stable, in the harbour, in the school, in
    the tent, in the chapel, in the market, in the castle, in the well, in the drawer, in the
    cupboard, under the bed, under the bridge, under the stairs, under the table, under the oak,
    on the roof, on the shelf, on the hill, on the island, behind the mill, behind the door,
    behind the fence, behind the house, near the river, near the gate, near the lake, by the
    fire, by the window, by the road
    """,
    ",",
)

WEATHER = _split("cold warm quiet windy rainy sunny foggy stormy")
TIMES = _split("morning evening day night")
SEASONS = _split("spring summer autumn winter")
HOMES = _split("village town valley city")
