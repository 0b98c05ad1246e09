"""Exams on what was read but never asked: held-out facts, unseen translations, unseen formats.

Every function returns the same items for the same seed, half of them in each language, and no
prompt twice.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from instar.data.schema import ExamItem, Language
from instar.errors import UserError
from instar.primer.facts import (
    HELD_OUT_KINDS,
    LANGUAGES,
    Fact,
    entities,
    held_out,
    phrasings,
    question,
    wrong_values,
)
from instar.primer.formats import Format, requests
from instar.primer.split import Split
from instar.primer.translation import (
    other_words,
    sentence_phrasings,
    sentence_question,
    sentences,
    word_question,
    words,
)

_PARTS: tuple[Split, Split] = ("exam", "train")
_FORMATS: dict[Format, str] = {
    "one_word": "one_word",
    "json": "json_answer",
    "list": "comma_list",
}
"""The formats that are examined, with the verifier that judges them."""
_PATIENCE = 1000
"""Draws without a new prompt after which an exam is taken to be exhausted."""


def knowledge_exam(seed: int, n: int = 400) -> list[ExamItem]:
    """Facts about held-out entities, in phrasings seen in training and in new ones.

    The verifier ``answer`` wants the right value and none of ``options``, all other values.
    """
    return _fill("knowledge", n, [_knowledge(random.Random(f"{seed} {x}"), x) for x in LANGUAGES])


def translation_exam(seed: int, n: int = 400) -> list[ExamItem]:
    """Half held-out words (verifier ``answer``), half unseen sentences (``exact_text``)."""
    streams = [
        stream(random.Random(f"{seed} {x}"), x)
        for stream in (_words, _sentences)
        for x in LANGUAGES
    ]
    return _fill("translation", n, streams)


def format_exam(seed: int, n: int = 400) -> list[ExamItem]:
    """Known facts in forms that training asked for, in combinations it never asked for.

    ``one_word`` and ``json_answer`` want the answer in that form and nothing else; ``comma_list``
    wants exactly the items of ``answer``, which are separated by ", " or "、".
    """
    streams = [
        _formats(random.Random(f"{seed} {x} {f}"), x, f) for f in _FORMATS for x in LANGUAGES
    ]
    return _fill("format", n, streams)


def _fill(exam: str, n: int, streams: list[Iterator[ExamItem]]) -> list[ExamItem]:
    """``n`` items with different prompts, taken from the streams in turn."""
    items: dict[str, ExamItem] = {}
    turn = 0
    while len(items) < n:
        stream = streams[turn % len(streams)]
        turn += 1
        for _ in range(_PATIENCE):
            item = next(stream)
            prompt = item["messages"][0]["content"]
            if prompt not in items:
                items[prompt] = item
                break
        else:
            raise UserError(
                f"the {exam} exam has no more than about {len(items)} different items, not {n}",
                "Ask for fewer",
            )
    return list(items.values())


def _item(
    exam: str, prompt: str, answer: str, verifier: str, options: tuple[str, ...], **tags: str
) -> ExamItem:
    return {
        "exam": exam,
        "messages": [{"role": "user", "content": prompt}],
        "verifier": verifier,
        "answer": answer,
        "options": list(options),
        "tags": tags,
    }


def _knowledge(rng: random.Random, language: Language) -> Iterator[ExamItem]:
    facts = [
        Fact(entity, attribute, language)
        for kind in HELD_OUT_KINDS
        for entity in entities(kind)
        if held_out(entity)
        for attribute in entity.attributes
    ]
    while True:
        for index, fact in enumerate(rng.sample(facts, len(facts))):
            part = _PARTS[index % 2]
            phrasing = rng.choice(phrasings(fact.attribute, language, part))
            asked = question(fact.entity, fact.attribute, language, phrasing)
            yield _item(
                "knowledge",
                asked.prompt,
                asked.answer,
                "answer",
                wrong_values(fact),
                language=language,
                kind=fact.entity.kind,
                attribute=fact.attribute,
                phrasing="new" if part == "exam" else "seen",
            )


def _words(rng: random.Random, language: Language) -> Iterator[ExamItem]:
    while True:
        for index, word in enumerate(rng.sample(words("exam"), len(words("exam")))):
            target, part = rng.choice(LANGUAGES), _PARTS[index % 2]
            phrasing = rng.choice(phrasings(f"word_{target}", language, part))
            asked = word_question(word, target, language, phrasing)
            yield _item(
                "translation",
                asked.prompt,
                asked.answer,
                "answer",
                other_words(word, target),
                language=language,
                kind="word",
                direction=f"to_{target}",
                phrasing="new" if part == "exam" else "seen",
            )


def _sentences(rng: random.Random, language: Language) -> Iterator[ExamItem]:
    for sentence in sentences(rng, "exam"):
        part = rng.choice(_PARTS)
        phrasing = rng.choice(sentence_phrasings(language, part))
        asked = sentence_question(sentence, language, phrasing)
        yield _item(
            "translation",
            asked.prompt,
            asked.answer,
            "exact_text",
            (),
            language=language,
            kind="sentence",
            direction=f"to_{language}",
            phrasing="new" if part == "exam" else "seen",
        )


def _formats(rng: random.Random, language: Language, form: Format) -> Iterator[ExamItem]:
    for asked in requests(rng, language, "exam", form):
        yield _item(
            "format",
            asked.prompt,
            asked.answer,
            _FORMATS[form],
            (),
            language=language,
            kind=form,
        )
