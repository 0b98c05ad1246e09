"""A new subject for a model that has finished school: rivers, instruments and gods.

None of it is in the primer's mixture. It is there to be taught afterwards (`instar continual`), so
that one can see what is learnt and what is forgotten meanwhile. All facts are taught; the exam asks
for them in phrasings that were never used.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Gt

from instar.config import Config
from instar.data.readers import write_jsonl
from instar.data.schema import Conversation, ExamItem, Language
from instar.primer.conversations import ADDRESSED_SHARE, addressed
from instar.primer.facts import LANGUAGES, Entity, fill
from instar.primer.question import Question
from instar.primer.tables import table

Positive = Annotated[int, Gt(0)]
Use = Literal["statement", "train", "exam"]

NAME = "subject"
"""What the exam is called."""
ABOUT_SHARE = 0.1
"""Share of conversations that ask for both facts of an entity at once."""

_TABLES = {
    "river": ("rivers", ("sea", "land")),
    "instrument": ("instruments", ("family", "origin")),
    "god": ("gods", ("domain", "people")),
}


class SubjectConfig(Config):
    """How much of the new subject to write."""

    conversations: Positive = 12_000
    """Conversations to learn from."""
    valid: Positive = 200
    """Conversations for validation, drawn anew of the same kind."""
    exam_items: Positive = 480
    """Questions of the exam; there are 576."""


def write_subject(config: SubjectConfig, seed: int, directory: Path) -> dict[str, int]:
    """Write ``conversations.jsonl``, ``valid.jsonl`` and ``exams.jsonl``.

    Args:
        config: How much.
        seed: Same seed, same files, byte for byte.
        directory: Where to; must exist.

    Returns:
        File name to number of lines.
    """
    files = {
        "conversations": islice(
            conversations(random.Random(f"{seed} train")), config.conversations
        ),
        "valid": islice(conversations(random.Random(f"{seed} valid")), config.valid),
        "exams": exam(seed, config.exam_items),
    }
    return {name: write_jsonl(directory / f"{name}.jsonl", rows) for name, rows in files.items()}


@cache
def subjects() -> tuple[Entity, ...]:
    """Everything that there is to learn about."""
    return tuple(
        Entity(
            kind,
            {language: row[language] for language in LANGUAGES},
            {a: {language: row[f"{a}_{language}"] for language in LANGUAGES} for a in attributes},
        )
        for kind, (name, attributes) in _TABLES.items()
        for row in table(name)
    )


@cache
def templates(attribute: str, language: Language, use: Use) -> tuple[str, ...]:
    """Sentences that state an attribute, or ask for it in training or in the exam."""
    wanted = (attribute, language, use)
    return tuple(
        row["template"]
        for row in table("subject")
        if (row["attribute"], row["language"], row["use"]) == wanted
    )


def asked(entity: Entity, attribute: str, language: Language, phrasing: str) -> Question:
    """A question about one fact; its distractors are all other values of the attribute."""
    name, value = entity.name[language], entity.attributes[attribute][language]
    others = (e.attributes[attribute][language] for e in subjects() if e.kind == entity.kind)
    return Question(
        prompt=fill(phrasing, name=name),
        answer=value,
        sentence=_stated(entity, attribute, language),
        distractors=tuple(dict.fromkeys(other for other in others if other != value)),
        language=language,
        kind="knowledge",
    )


def _stated(entity: Entity, attribute: str, language: Language) -> str:
    (template,) = templates(attribute, language, "statement")
    value = entity.attributes[attribute][language]
    return fill(template, name=entity.name[language], value=value)


def conversations(rng: random.Random) -> Iterator[Conversation]:
    """Endless questions with their answers, in both languages, some with words around them."""
    while True:
        entity, language = rng.choice(subjects()), rng.choice(LANGUAGES)
        if rng.random() < ABOUT_SHARE:
            yield _turns(*_about(rng, entity, language))
            continue
        attribute = rng.choice(list(entity.attributes))
        phrasing = rng.choice(templates(attribute, language, "train"))
        question = asked(entity, attribute, language, phrasing)
        if rng.random() < ADDRESSED_SHARE:
            question = addressed(question, rng)
        yield _turns(question.prompt, question.sentence)


def _about(rng: random.Random, entity: Entity, language: Language) -> tuple[str, str]:
    """All that there is to say about an entity."""
    article = "the " if language == "en" and entity.kind != "god" else ""
    phrasing = rng.choice(templates("about", language, "train"))
    gap = " " if language == "en" else ""
    sentences = [_stated(entity, attribute, language) for attribute in entity.attributes]
    return fill(phrasing, name=article + entity.name[language]), gap.join(sentences)


def _turns(prompt: str, reply: str) -> Conversation:
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    }


def exam(seed: int, n: int) -> list[ExamItem]:
    """``n`` questions at most, in phrasings that no conversation uses, about all the facts.

    The verifier ``answer`` wants the right value and none of the others.
    """
    everything: list[tuple[Entity, str, Language, str]] = [
        (entity, attribute, language, phrasing)
        for entity in subjects()
        for attribute in entity.attributes
        for language in LANGUAGES
        for phrasing in templates(attribute, language, "exam")
    ]
    random.Random(f"{seed} exam").shuffle(everything)
    return [_item(*place) for place in everything[:n]]


def _item(entity: Entity, attribute: str, language: Language, phrasing: str) -> ExamItem:
    question = asked(entity, attribute, language, phrasing)
    return {
        "exam": NAME,
        "messages": [{"role": "user", "content": question.prompt}],
        "verifier": "answer",
        "answer": question.answer,
        "options": list(question.distractors),
        "tags": {"language": language, "kind": entity.kind, "attribute": attribute},
    }
