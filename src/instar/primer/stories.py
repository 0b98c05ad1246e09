"""A story is someone, a want, an obstacle, an effort and an ending.

Stories give the model what lists of facts cannot: sentences that follow from each other, and names
that must be remembered until the end.
"""

from __future__ import annotations

import random
from functools import cache

from instar.data.schema import Language
from instar.primer.facts import fill
from instar.primer.tables import table
from instar.primer.translation import words

_PARTS = ("opening", "want", "obstacle", "effort", "ending", "moral")


def story(rng: random.Random, language: Language) -> str:
    """One short story in ``language``."""
    hero, friend = rng.sample(table("names"), 2)
    thing = rng.choice([w for w in words() if w["group"] == "thing"])
    place = rng.choice([w for w in words() if w["group"] == "place"])
    slots = {
        "hero": hero[language],
        "friend": friend[language],
        "thing": thing[language],
        "measure": thing["measure_zh"],
        "place": place[language],
        "pet": rng.choice(_templates("pet", language)),
    }
    told = [fill(rng.choice(_templates(part, language)), **slots) for part in _PARTS]
    return (" " if language == "en" else "").join(told)


@cache
def _templates(part: str, language: Language) -> tuple[str, ...]:
    rows = table("stories")
    return tuple(r["template"] for r in rows if (r["part"], r["language"]) == (part, language))
