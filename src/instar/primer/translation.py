"""Words and sentences that say the same in Chinese and English.

About a quarter of the dictionary is held out: its words are stated in the readings, but training
never asks for them. Sentences are built from frames, so there are far more of them than training
shows; a fixed share of them is kept for the exam.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from instar.data.schema import Language
from instar.primer.facts import DISTRACTORS, fill, phrasings, statements
from instar.primer.question import Question
from instar.primer.split import Split, split_of
from instar.primer.tables import Row, table

HELD_OUT_WORDS = 0.25
EXAM_SENTENCES = 0.15

_SUBJECTS = (
    ("I", "我"),
    ("you", "你"),
    ("we", "我们"),
    ("they", "他们"),
    ("he", "他"),
    ("she", "她"),
)
_PLAIN = 4
"""The first so many subjects take the verb's plain form in the present tense."""


@dataclass(frozen=True)
class Parallel:
    """One sentence in both languages."""

    en: str
    zh: str

    @property
    def split(self) -> Split:
        """Whether training may show it or only the exam."""
        return split_of(f"sentence {self.en}", EXAM_SENTENCES)


def word_split(word: Row) -> Split:
    """Whether training may ask for this row of the dictionary or only the exam."""
    return split_of(f"word {word['en']}", HELD_OUT_WORDS)


@cache
def words(part: Split | None = None) -> tuple[Row, ...]:
    """The dictionary: all of it, the part that training asks for, or the part held out."""
    everything = table("dictionary")
    if part is None:
        return everything
    return tuple(w for w in everything if word_split(w) == part)


def state_word(word: Row, target: Language, template: str) -> str:
    """A statement that gives ``word`` in the ``target`` language."""
    return fill(template, name=word[_other(target)], value=word[target])


def word_question(word: Row, target: Language, asked: Language, phrasing: str) -> Question:
    """How to say ``word`` in the language ``target``, asked in the language ``asked``."""
    return Question(
        prompt=fill(phrasing, name=word[_other(target)]),
        answer=word[target],
        sentence=state_word(word, target, statements(f"word_{target}", asked)[0]),
        distractors=other_words(word, target)[:DISTRACTORS],
        language=asked,
        kind="translation",
    )


@cache
def _group(name: str) -> tuple[Row, ...]:
    return tuple(w for w in words() if w["group"] == name)


def other_words(word: Row, target: Language) -> tuple[str, ...]:
    """The other words of its group in the ``target`` language, beginning with the next."""
    group = _group(word["group"])
    start = group.index(word)
    others = group[start + 1 :] + group[:start]
    return tuple(w[target] for w in others if w[target] not in word[target])


def sentences(rng: random.Random, part: Split, every_word: bool = False) -> Iterator[Parallel]:
    """Endless random sentences.

    Args:
        rng: Chooses frames and words.
        part: Whether to draw those that training may show, or those kept for the exam.
        every_word: Use the whole dictionary rather than only the words that training asks for.
    """
    frames = table("frames")
    while True:
        sentence = _build(rng, rng.choice(frames), every_word)
        if sentence.split == part:
            yield sentence


def sentence_question(sentence: Parallel, target: Language, phrasing: str) -> Question:
    """The request to translate ``sentence`` into ``target``; the right reply is the translation."""
    source, answer = (sentence.en, sentence.zh) if target == "zh" else (sentence.zh, sentence.en)
    return Question(
        prompt=fill(phrasing, name=source),
        answer=answer,
        sentence=answer,
        distractors=(),
        language=target,
        kind="translation",
    )


def sentence_phrasings(target: Language, part: Split) -> tuple[str, ...]:
    """Requests for a sentence in ``target``, each in the language of the sentence given."""
    return phrasings(f"sentence_{target}", _other(target), part)


def _build(rng: random.Random, frame: Row, every_word: bool) -> Parallel:
    en: dict[str, str] = {}
    zh: dict[str, str] = {}
    for slot in ("x", "y"):
        if frame[slot]:
            word = rng.choice(_candidates(frame[slot], every_word))
            en[slot], zh[slot] = word["en"], word["zh"]
            en[f"{slot}s"] = word["plural_en"] or word["en"]
            if slot == "x":
                zh["m"] = word["measure_zh"]
    if frame["subject"] != "none":
        subjects = _SUBJECTS[:_PLAIN] if frame["subject"] == "plain" else _SUBJECTS
        en["s"], zh["s"] = rng.choice(subjects)
    return Parallel(fill(frame["en"], **en), fill(frame["zh"], **zh))


@cache
def _candidates(group: str, every_word: bool) -> tuple[Row, ...]:
    return tuple(w for w in _group(group) if every_word or word_split(w) == "train")


def _other(language: Language) -> Language:
    return "zh" if language == "en" else "en"
