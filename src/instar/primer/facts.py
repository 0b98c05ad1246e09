"""A fact is (entity, attribute, value), and can be stated or asked for in many ways.

About a third of the entities are *held out*: the readings state their facts, but no question about
them is ever asked in training. The exam asks those questions, so it measures whether the model
learned to look up what it has read, which is more than repeating answers it was shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from instar.data.schema import Language
from instar.primer.question import Question
from instar.primer.split import Split, split_of
from instar.primer.tables import table

LANGUAGES: tuple[Language, ...] = ("en", "zh")
HELD_OUT_SHARE = 0.35
DRAW = 23073
"""Which random draw decides who is held out. This one trains the countries that people try first,
and Spain and Portugal, whose names are part of the names of languages."""
HELD_OUT_KINDS = ("country", "animal", "element")
DISTRACTORS = 8
"""How many wrong answers a question carries; an exam lists them all. They are answers to other
training questions: were they the answers of held-out entities, preferences would unlearn those."""

Form = Literal["statement", "same", "different", "list"]

_TABLES = {
    "country": ("countries", ("capital", "continent", "language")),
    "animal": ("animals", ("class", "home", "food")),
    "element": ("elements", ("symbol", "number", "kind")),
    "planet": ("planets", ("order", "type")),
    "season": ("seasons", ("weather", "next")),
}
KINDS = tuple(_TABLES)


@dataclass(frozen=True, eq=False)
class Entity:
    """Something that facts are about, named in both languages.

    Attributes:
        kind: One of ``KINDS``.
        name: Language to name.
        attributes: Attribute to language to value.
    """

    kind: str
    name: dict[Language, str]
    attributes: dict[str, dict[Language, str]]


@dataclass(frozen=True, eq=False)
class Fact:
    """One attribute of an entity, in one language."""

    entity: Entity
    attribute: str
    language: Language

    @property
    def name(self) -> str:
        """What the entity is called."""
        return self.entity.name[self.language]

    @property
    def value(self) -> str:
        """What is true of it."""
        return self.entity.attributes[self.attribute][self.language]


@cache
def entities(kind: str) -> tuple[Entity, ...]:
    """All entities of a kind, in the order of their table."""
    name, attributes = _TABLES[kind]
    return tuple(
        Entity(
            kind,
            {language: row[language] for language in LANGUAGES},
            {a: {language: row[f"{a}_{language}"] for language in LANGUAGES} for a in attributes},
        )
        for row in table(name)
    )


def held_out(entity: Entity) -> bool:
    """Whether questions about ``entity`` are kept for the exam."""
    if entity.kind not in HELD_OUT_KINDS:
        return False
    return split_of(f"{DRAW} {entity.name['en']}", HELD_OUT_SHARE) == "exam"


@cache
def values(kind: str, attribute: str, language: Language) -> tuple[str, ...]:
    """The distinct values that an attribute takes, in the order of the table."""
    return tuple(dict.fromkeys(e.attributes[attribute][language] for e in entities(kind)))


@cache
def known_values(kind: str, attribute: str, language: Language) -> frozenset[str]:
    """The values that belong to at least one entity that is not held out."""
    known = (e for e in entities(kind) if not held_out(e))
    return frozenset(e.attributes[attribute][language] for e in known)


@cache
def statements(attribute: str, language: Language, form: Form = "statement") -> tuple[str, ...]:
    """Templates that state an attribute; the first is the plain one that answers use."""
    rows = table("statements")
    wanted = (attribute, language, form)
    return tuple(
        r["template"] for r in rows if (r["attribute"], r["language"], r["form"]) == wanted
    )


@cache
def phrasings(attribute: str, language: Language, part: Split = "train") -> tuple[str, ...]:
    """Templates that ask for an attribute; those for the exam are never used in training."""
    rows = table("questions")
    wanted = (attribute, language, part)
    return tuple(r["template"] for r in rows if (r["attribute"], r["language"], r["use"]) == wanted)


def with_article(noun: str) -> str:
    """``noun`` after "a" or "an", by its first letter."""
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"


def fill(template: str, **slots: str) -> str:
    """``template`` with its slots filled; ``{a_x}`` is slot ``x`` with an English article."""
    articles = {f"a_{s}": with_article(x) for s, x in slots.items() if f"{{a_{s}}}" in template}
    text = template.format(**slots, **articles)
    return text[0].upper() + text[1:] if template.isascii() else text  # English begins in capitals


def state(fact: Fact, template: str) -> str:
    """The sentence that ``template`` makes of ``fact``."""
    return fill(template, name=fact.name, value=fact.value)


def compare(first: Fact, second: Fact, template: str) -> str:
    """The sentence that ``template`` makes of the same attribute of two entities."""
    return fill(
        template, first=first.name, second=second.name, value=first.value, other=second.value
    )


def question(entity: Entity, attribute: str, language: Language, phrasing: str) -> Question:
    """``entity`` asked for ``attribute``.

    Args:
        entity: Whom the question is about.
        attribute: One of the entity's attributes.
        language: Language of question and answer.
        phrasing: A template from ``phrasings``.
    """
    fact = Fact(entity, attribute, language)
    known = known_values(entity.kind, attribute, language)
    wrong = [v for v in wrong_values(fact) if v in known]
    return Question(
        prompt=fill(phrasing, name=fact.name),
        answer=fact.value,
        sentence=state(fact, statements(attribute, language)[0]),
        distractors=tuple(wrong[:DISTRACTORS]),
        language=language,
        kind="knowledge",
    )


def wrong_values(fact: Fact) -> tuple[str, ...]:
    """The other values of the attribute, those that follow in the table first.

    Neighbours in a table are alike (countries of one continent), so the first are the hardest.
    Values that the right sentence happens to contain (Rome in "罗马尼亚", Romania) are left out.
    """
    everything = values(fact.entity.kind, fact.attribute, fact.language)
    sentence = state(fact, statements(fact.attribute, fact.language)[0])
    start = everything.index(fact.value)
    others = everything[start + 1 :] + everything[:start]
    return tuple(v for v in others if v not in sentence)
