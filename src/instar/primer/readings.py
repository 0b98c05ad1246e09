"""Readings state every fact many times, in many words and orders; only ``extra`` sources ask.

That is what lets a small model use later what it read: a fact seen in one fixed sentence is stored
as that sentence, a fact seen in many is stored as a fact (Allen-Zhu & Li, *Physics of Language
Models: Part 3.1*, arXiv:2309.14316). Entities come round in shuffled cycles, so each gets the same
number of sentences, and their full names are repeated where a book would say "it".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

from instar.data.schema import Document, Language
from instar.primer.facts import (
    HELD_OUT_KINDS,
    Entity,
    Fact,
    compare,
    entities,
    fill,
    state,
    statements,
)
from instar.primer.split import Split, split_of
from instar.primer.stories import story
from instar.primer.tables import table
from instar.primer.translation import sentences, state_word, words

Extra = Callable[[random.Random, Language], str]
"""Another source of paragraphs: given a random generator and a language, it returns one."""

HELD_OUT_SHARE = 1 / 16
"""How many documents are kept for validation; as many are kept for the exam."""

T = TypeVar("T")


def readings(
    rng: random.Random, language: Language, extra: Sequence[Extra] = ()
) -> Iterator[Document]:
    """Endless short documents in one language, most of them 40 to 200 words long.

    Args:
        rng: Chooses everything.
        language: Language of the documents.
        extra: Further sources of paragraphs, which together make up two fifths.
    """
    knowledge = _knowledge(rng, language)
    dictionary = _dictionary(rng, language)
    small = _small_facts(rng, language)
    sources: list[tuple[float, Callable[[], str]]] = [
        (0.46, lambda: next(knowledge)),
        (0.08, lambda: next(dictionary)),
        (0.04, lambda: story(rng, language)),
        (0.03, lambda: next(small)),
    ]
    if extra:
        sources.append((0.39, lambda: rng.choice(extra)(rng, language)))
    shares, makers = zip(*sources, strict=True)
    while True:
        yield {"text": rng.choices(makers, shares)[0](), "language": language}


def corpus(
    seed: int, n_bytes: int, extra: Sequence[Extra] = (), part: Split = "train"
) -> Iterator[Document]:
    """Readings in both languages in turn, until they hold ``n_bytes`` bytes of UTF-8.

    No document of one split ever equals a document of the other, whatever the seeds.

    Args:
        seed: Same seed, same documents.
        n_bytes: How much text to produce; the last document may exceed it a little.
        extra: Further sources of paragraphs, see ``readings``.
        part: The split to draw.
    """
    streams = [
        readings(random.Random(f"{seed} {part} {language}"), language, extra)
        for language in ("en", "zh")
    ]
    produced = 0
    while produced < n_bytes:
        for stream in streams:
            document = next(d for d in stream if _split(d["text"]) == part)
            produced += len(document["text"].encode())
            yield document


def _split(text: str) -> Split:
    return split_of(text, HELD_OUT_SHARE, HELD_OUT_SHARE)


def _cycle(rng: random.Random, items: Sequence[T]) -> Iterator[T]:
    """All items again and again, in a new order each time round."""
    while True:
        yield from rng.sample(items, len(items))


def _join(sentences: Sequence[str], language: Language) -> str:
    return (" " if language == "en" else "").join(sentences)


# --- Knowledge


def _knowledge(rng: random.Random, language: Language) -> Iterator[str]:
    """Paragraphs about countries, animals and elements; every form goes through all entities."""
    sizes = [len(entities(kind)) for kind in HELD_OUT_KINDS]
    forms = (_profiles, _attribute, _comparison, _list)
    cycles = {(k, form): _cycle(rng, entities(k)) for k in HELD_OUT_KINDS for form in forms}
    while True:
        kind = rng.choices(HELD_OUT_KINDS, sizes)[0]
        form = rng.choices(forms, (0.6, 0.2, 0.1, 0.1))[0]
        yield form(rng, cycles[kind, form], language)


def _profiles(rng: random.Random, cycle: Iterator[Entity], language: Language) -> str:
    """Everything about one to four entities: one after the other, or all mixed."""
    count = rng.choices((1, 2, 3, 4), (0.3, 0.3, 0.2, 0.2))[0]
    told = []
    for entity in _take(cycle, count):
        facts = [Fact(entity, a, language) for a in entity.attributes]
        told += _permuted(rng, facts * (2 if count <= 2 else 1))
    if rng.random() < 0.3:
        rng.shuffle(told)
    return _join(told, language)


def _attribute(rng: random.Random, cycle: Iterator[Entity], language: Language) -> str:
    """One attribute of several entities."""
    group = _take(cycle, rng.randint(6, 9))
    attribute = rng.choice(list(group[0].attributes))
    return _join(_permuted(rng, [Fact(e, attribute, language) for e in group]), language)


def _comparison(rng: random.Random, cycle: Iterator[Entity], language: Language) -> str:
    """Two entities side by side, attribute by attribute, then each in its own words."""
    pair = _take(cycle, 2)
    told = []
    for attribute in rng.sample(list(pair[0].attributes), len(pair[0].attributes)):
        first, second = (Fact(e, attribute, language) for e in rng.sample(pair, 2))
        form = "same" if first.value == second.value else "different"
        told.append(compare(first, second, rng.choice(statements(attribute, language, form))))
        told += _permuted(rng, [first, second])
    return _join(told, language)


def _list(rng: random.Random, cycle: Iterator[Entity], language: Language) -> str:
    """One attribute of many entities, a line each."""
    group = _take(cycle, rng.randint(6, 10))
    attribute = rng.choice(list(group[0].attributes))
    title = statements(attribute, language, "list")[0]
    facts = [Fact(e, attribute, language) for e in group]
    colon = ": " if language == "en" else "："
    return "\n".join([title, *(f"{f.name}{colon}{f.value}" for f in facts)])


def _take(cycle: Iterator[Entity], count: int) -> list[Entity]:
    """The next ``count`` different entities (where two rounds meet, one can come twice)."""
    taken: list[Entity] = []
    while len(taken) < count:
        entity = next(cycle)
        if entity not in taken:
            taken.append(entity)
    return taken


def _permuted(rng: random.Random, facts: Sequence[Fact]) -> list[str]:
    """The facts in random order, each in a random phrasing, repeated ones in different ones."""
    ordered = sorted(facts, key=lambda f: f.attribute)
    told = []
    for attribute, group in groupby(ordered, key=lambda f: f.attribute):
        alike = list(group)
        templates = statements(attribute, alike[0].language)
        chosen = rng.sample(templates, len(alike))
        told += [state(f, t) for f, t in zip(alike, chosen, strict=True)]
    rng.shuffle(told)
    return told


# --- Everything else


def _dictionary(rng: random.Random, language: Language) -> Iterator[str]:
    """Words with their translation, and sentences beside theirs."""
    word_cycle = _cycle(rng, words())
    parallels = sentences(rng, "train", every_word=True)
    pattern = "English: {} Chinese: {}" if language == "en" else "英文：{} 中文：{}"
    while True:
        told = []
        for _ in range(rng.randint(3, 6)):
            word = next(word_cycle)
            for target in rng.sample(("en", "zh"), 2):
                template = rng.choice(statements(f"word_{target}", language))
                told.append(state_word(word, target, template))
        for _ in range(rng.randint(1, 3)):
            sentence = next(parallels)
            told.append(pattern.format(sentence.en, sentence.zh))
        yield _join(told, language)


def _small_facts(rng: random.Random, language: Language) -> Iterator[str]:
    """Opposites, planets, seasons and the words of machine learning."""
    skies = _cycle(rng, entities("planet") + entities("season"))
    pairs = _cycle(rng, table("opposites"))
    terms = _cycle(rng, table("ml_terms"))
    while True:
        match rng.randrange(3):
            case 0:
                facts = [Fact(e, a, language) for e in _take(skies, 4) for a in e.attributes]
                told = [state(f, rng.choice(statements(f.attribute, language))) for f in facts]
            case 1:
                told = [_opposite(rng, next(pairs), language) for _ in range(6)]
            case _:
                told = [_definition(rng, next(terms), language) for _ in range(4)]
        yield _join(told, language)


def _opposite(rng: random.Random, row: dict[str, str], language: Language) -> str:
    sides = rng.sample((row[language], row[f"opposite_{language}"]), 2)
    template = rng.choice(statements("opposite", language))
    return fill(template, name=sides[0], value=sides[1])


def _definition(rng: random.Random, row: dict[str, str], language: Language) -> str:
    template = rng.choice(statements("definition", language))
    return fill(template, name=row[language], value=row[f"definition_{language}"])
