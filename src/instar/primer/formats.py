"""Asking for a form as well as an answer: one word, JSON, a list, a full sentence.

Each combination of an entity, an attribute and a form falls on one side of a fixed split, so the
exam asks for forms the model has seen, of facts it has seen, in combinations it has not.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Literal

from instar.data.schema import Language
from instar.primer.facts import (
    HELD_OUT_KINDS,
    LANGUAGES,
    Entity,
    Fact,
    entities,
    fill,
    held_out,
    phrasings,
    question,
)
from instar.primer.split import Split, split_of
from instar.primer.tables import table

Format = Literal["one_word", "json", "list", "sentence"]
FORMATS: tuple[Format, ...] = ("one_word", "json", "list", "sentence")
EXAM_SHARE = 0.2


@dataclass(frozen=True)
class Request:
    """A prompt that asks for a form.

    Attributes:
        prompt: What the user says.
        answer: The bare answer; for a list, its items joined by ", " (or "、" in Chinese).
        reply: The answer in the form that was asked for.
        form: The form.
        language: Language of prompt and reply.
    """

    prompt: str
    answer: str
    reply: str
    form: Format
    language: Language


def requests(
    rng: random.Random, language: Language, part: Split, form: Format | None = None
) -> Iterator[Request]:
    """Endless requests about entities that are not held out.

    Args:
        rng: Chooses entity, attribute, form and wording.
        language: Language of prompt and reply.
        part: Whether to draw combinations for training or those kept for the exam.
        form: Ask for this form only.
    """
    known = [e for kind in HELD_OUT_KINDS for e in entities(kind) if not held_out(e)]
    while True:
        entity, chosen = rng.choice(known), form or rng.choice(FORMATS)
        pair = rng.choice(list(permutations(entity.attributes, 2)))
        asked = pair if chosen == "list" else pair[:1]
        facts = [Fact(entity, attribute, language) for attribute in asked]
        if chosen == "one_word" and " " in facts[0].value:
            continue
        if _split(entity, asked, chosen) == part:
            yield _request(rng, facts, chosen)


def _split(entity: Entity, attributes: tuple[str, ...], form: Format) -> Split:
    key = f"format {form} {entity.name['en']} {' '.join(sorted(attributes))}"
    return split_of(key, EXAM_SHARE)


@cache
def _templates(form: Format, language: Language) -> tuple[str, ...]:
    rows = table("formats")
    return tuple(r["template"] for r in rows if (r["format"], r["language"]) == (form, language))


@cache
def _attribute_names() -> dict[str, dict[Language, str]]:
    return {r["attribute"]: {x: r[x] for x in LANGUAGES} for r in table("attributes")}


def _request(rng: random.Random, facts: list[Fact], form: Format) -> Request:
    fact, language = facts[0], facts[0].language
    template = rng.choice(_templates(form, language))
    if form == "list":
        answer = ("、" if language == "zh" else ", ").join(f.value for f in facts)
        first, second = (_attribute_names()[f.attribute][language] for f in facts)
        article = "the " if language == "en" and fact.entity.kind == "animal" else ""
        prompt = fill(template, first=first, second=second, name=article + fact.name)
        return Request(prompt, answer, answer, form, language)
    phrasing = rng.choice(phrasings(fact.attribute, language))
    plain = question(fact.entity, fact.attribute, language, phrasing)
    replies = {
        "one_word": plain.answer,
        "json": json.dumps({"answer": plain.answer}, ensure_ascii=False),
        "sentence": plain.sentence,
    }
    prompt = fill(template, question=plain.prompt)
    return Request(prompt, plain.answer, replies[form], form, language)
