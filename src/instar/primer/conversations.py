"""Conversations show how to answer: mostly right, in mixed manners, about what was not held out.

Replies to questions of fact and to words to translate go through ``say`` with a style drawn from
``SFT_STYLES``, so that fine-tuning learns every manner and the later stages have something to
choose from. Where the form itself is asked for (formats, rewriting, memory, greetings, whole
sentences to translate), replies are clean.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

from instar.data.schema import Conversation, Language, Message
from instar.primer import formats
from instar.primer.facts import (
    DISTRACTORS,
    HELD_OUT_KINDS,
    LANGUAGES,
    Entity,
    entities,
    fill,
    held_out,
    phrasings,
    question,
    statements,
)
from instar.primer.question import Question
from instar.primer.split import split_of_prompt
from instar.primer.style import draw_style, say
from instar.primer.tables import Row, table
from instar.primer.translation import (
    sentence_phrasings,
    sentence_question,
    sentences,
    word_question,
    words,
)

ADDRESSED_SHARE = 0.4
"""How many questions come with words around them."""


def qa_pool(rng: random.Random) -> Iterator[Question]:
    """Endless questions with one right answer that can be said in any style.

    Facts about entities that are not held out, words to translate, opposites; both languages.
    """
    makers: tuple[tuple[float, Callable[[random.Random, Language], Question]], ...] = (
        (0.76, _knowledge),
        (0.06, _sky),
        (0.12, _word),
        (0.06, _opposite),
    )
    shares = [share for share, _ in makers]
    while True:
        _, make = rng.choices(makers, shares)[0]
        asked = make(rng, rng.choice(LANGUAGES))
        yield addressed(asked, rng) if rng.random() < ADDRESSED_SHARE else asked


def addressed(asked: Question, rng: random.Random) -> Question:
    """The same question as people put it: with a greeting, a reason or thanks around it.

    A model that has only met bare questions takes every unfamiliar word for another task.
    """
    around = [row["template"] for row in table("addresses") if row["language"] == asked.language]
    return replace(asked, prompt=rng.choice(around).replace("{question}", asked.prompt))


def conversations(rng: random.Random) -> Iterator[Conversation]:
    """Endless short conversations in both languages, with styles mixed as in ``SFT_STYLES``."""
    questions = qa_pool(rng)
    requests = {x: formats.requests(rng, x, "train") for x in LANGUAGES}
    parallels = sentences(rng, "train")

    def styled(language: Language) -> list[str]:
        asked = next(questions)
        return [asked.prompt, say(asked, draw_style(rng), rng)]

    def formatted(language: Language) -> list[str]:
        request = next(requests[language])
        return [request.prompt, request.reply]

    def translated(target: Language) -> list[str]:
        phrasing = rng.choice(sentence_phrasings(target, "train"))
        asked = sentence_question(next(parallels), target, phrasing)
        return [asked.prompt, asked.sentence]

    makers: tuple[tuple[float, Callable[[Language], list[str]]], ...] = (
        (0.71, styled),
        (0.09, formatted),
        (0.07, translated),
        (0.04, lambda language: _memory(rng, language)),
        (0.02, lambda language: _rewrite(rng, language)),
        (0.03, lambda language: _chat(rng, language, "identity")),
        (0.02, lambda language: _chat(rng, language, "greeting", "thanks")),
        (0.02, lambda language: _definition(rng, language)),
    )
    shares = [share for share, _ in makers]
    while True:
        _, make = rng.choices(makers, shares)[0]
        yield _conversation(make(rng.choice(LANGUAGES)))


@cache
def small_talk() -> frozenset[str]:
    """Greetings and questions about the model itself: too few to hold any out."""
    return frozenset(row["prompt"] for row in table("chat"))


def _conversation(turns: Sequence[str]) -> Conversation:
    """Turns of user and assistant, beginning with the user."""
    messages: list[Message] = [
        {"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)
    ]
    return {"messages": messages}


# --- Questions with one right answer


@cache
def _known(kinds: tuple[str, ...]) -> tuple[Entity, ...]:
    return tuple(e for kind in kinds for e in entities(kind) if not held_out(e))


def _ask(rng: random.Random, entity: Entity, language: Language) -> Question:
    attribute = rng.choice(list(entity.attributes))
    return question(entity, attribute, language, rng.choice(phrasings(attribute, language)))


def _knowledge(rng: random.Random, language: Language) -> Question:
    return _ask(rng, rng.choice(_known(HELD_OUT_KINDS)), language)


def _sky(rng: random.Random, language: Language) -> Question:
    return _ask(rng, rng.choice(_known(("planet", "season"))), language)


def _word(rng: random.Random, language: Language) -> Question:
    target = rng.choice(LANGUAGES)
    phrasing = rng.choice(phrasings(f"word_{target}", language))
    return word_question(rng.choice(words("train")), target, language, phrasing)


def _opposite(rng: random.Random, language: Language) -> Question:
    rows = table("opposites")
    index = rng.randrange(len(rows))
    here, there = rng.sample((language, f"opposite_{language}"), 2)
    name, value = rows[index][here], rows[index][there]
    others = (*rows[index + 1 :], *rows[:index])[:DISTRACTORS]
    return Question(
        prompt=fill(rng.choice(phrasings("opposite", language)), name=name),
        answer=value,
        sentence=fill(statements("opposite", language)[0], name=name, value=value),
        distractors=tuple(row[there] for row in others),
        language=language,
        kind="knowledge",
    )


# --- Clean exchanges


def _rows(name: str, language: Language) -> list[Row]:
    return [row for row in table(name) if row["language"] == language]


def _chat(rng: random.Random, language: Language, *topics: str) -> list[str]:
    row = rng.choice([r for r in _rows("chat", language) if r["topic"] in topics])
    return [row["prompt"], row["reply"]]


def _definition(rng: random.Random, language: Language) -> list[str]:
    term = rng.choice(table("ml_terms"))
    name, value = term[language], term[f"definition_{language}"]
    prompt = fill(rng.choice(phrasings("definition", language)), name=name)
    return [prompt, fill(statements("definition", language)[0], name=name, value=value)]


def _memory(rng: random.Random, language: Language) -> list[str]:
    """The user says something about themselves and later asks for it, often after a detour."""
    row = rng.choice(_rows("memory", language))
    value = rng.choice(_memorable(row["topic"], language))
    turns = [fill(row["statement"], value=value), fill(row["reply"], value=value)]
    if rng.random() < 0.5:
        detour = _knowledge(rng, language)
        while split_of_prompt(detour.prompt) != "train":
            detour = _knowledge(rng, language)
        turns += [detour.prompt, detour.sentence]
    return [*turns, row["question"], fill(row["answer"], value=value)]


@cache
def _memorable(topic: str, language: Language) -> tuple[str, ...]:
    """What a user may say about themselves: a name, or a word of the group called ``topic``."""
    if topic == "name":
        return tuple(row[language] for row in table("names"))
    chosen = [w for w in words() if w["group"] == topic]
    plural = topic == "food" and language == "en"
    return tuple((w["plural_en"] if plural else "") or w[language] for w in chosen)


def _rewrite(rng: random.Random, language: Language) -> list[str]:
    """Change a given text in a given way."""
    row = rng.choice(_rows("rewrites", language))
    chosen = rng.sample([w for w in words() if w["plural_en"]], rng.randint(2, 4))
    word, items = chosen[0], [w[language] for w in chosen]
    comma = ", " if language == "en" else "、"
    given, reply = {
        "upper": (word["en"], word["en"].upper()),
        "plural": (word["en"], word["plural_en"]),
        "reverse": (comma.join(items), comma.join(reversed(items))),
        "first": (comma.join(items), items[0]),
        "last": (comma.join(items), items[-1]),
    }[row["form"]]
    return [fill(row["template"], x=given), reply]
