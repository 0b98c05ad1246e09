"""Which documents are worth reading: the rules of Gopher, C4 and FineWeb, for words and characters.

C4's list of bad words is left out, as in FineWeb: it drops medicine and law with the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from instar.config import Config
from instar.corpus.document import Document, Step
from instar.corpus.lines import line_rules, page_rule, without_boilerplate
from instar.corpus.repetition import (
    Words,
    highest_count,
    repeated_runs,
    repeated_share,
    runs,
    single_characters,
    spaced_words,
    top_share,
)
from instar.corpus.script import UNSPACED, language_of_script
from instar.corpus.thresholds import (
    BOOKS,
    BOOKS_CHARACTERS,
    WEB_CHARACTERS,
    WEB_WORDS,
    Limits,
    limits_of,
)

PRESETS = {"web": (WEB_WORDS, WEB_CHARACTERS), "books": (BOOKS, BOOKS_CHARACTERS)}
"""For languages with spaces, and for those without."""

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
"""Gopher's."""
SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s|$)|[。！？…]+")
LETTER = re.compile(r"[^\W\d_]")
NOT_A_WORD, NOT_A_LETTER = re.compile(r"[\W_]+"), re.compile(r"[\W\d_]+")
NOT_A_DIGIT = re.compile(r"[^0-9０-９]+")
FEWEST_WORDS = 50
"""Repetition is not measured in shorter texts: a refrain is no machine's work."""


class QualityConfig(Config):
    """Which documents are good enough."""

    preset: Literal["web", "books", "none"] = "web"
    """``web``: all rules, at the papers' limits. ``books``: what holds for verse, plays and prose
    too. ``none``: no rule at all."""
    words: Limits = Limits()
    """Limits other than the preset's for languages with spaces between words."""
    characters: Limits = Limits()
    """The same for Chinese and Japanese, where every character counts as a word."""


class Quality(Step):
    """Removes lines that belong to no text, and drops documents that are none."""

    name = "quality"

    def __init__(self, config: QualityConfig) -> None:
        super().__init__()
        self.idle = config.preset == "none"
        words, characters = PRESETS.get(config.preset, PRESETS["books"])
        self.words = limits_of(words, config.words)
        self.characters = limits_of(characters, config.characters)

    def __call__(self, document: Document) -> str | None:
        """Edit ``document``'s lines; the first rule that it breaks, if any."""
        if self.idle:
            return None
        language = document.language or language_of_script(document.text[:1000])
        unspaced = language in UNSPACED
        limits = self.characters if unspaced else self.words
        rule = page_rule(document.text, limits)
        if rule:
            return rule
        document.text, removed = without_boilerplate(document.text, limits, unspaced)
        self.counts["lines removed"] += removed
        if unspaced:
            return _judge_characters(document.text, limits)
        return _judge_words(document.text, limits, language in ("en", ""))


def _judge_words(text: str, limits: Limits, is_english: bool) -> str | None:
    """The first rule that a text with spaces breaks."""
    words = text.split()
    count = len(words)
    if rule := _length_rule(count, limits):
        return rule
    mean = sum(map(len, words)) / max(count, 1)
    if limits.min_word_length and mean < limits.min_word_length:
        return "words too short"
    if limits.max_word_length and mean > limits.max_word_length:
        return "words too long"
    if is_english and limits.min_stop_words:
        # Looking for " the " is much faster than looking at every word, and nearly always enough.
        plain = sum(f" {word} " in text for word in STOP_WORDS)
        wanted = limits.min_stop_words
        if plain < wanted and len(STOP_WORDS & {word.lower() for word in words}) < wanted:
            return "too few stop words"
    least = (limits.min_letters or 0) * count
    # Most words are letters only; the others are looked into where these are not enough.
    if sum(map(str.isalpha, words)) < least and sum(map(bool, map(LETTER.search, words))) < least:
        return "too few letters"
    found = _first_broken(_mark_rules(text, count, limits), line_rules(text, limits))
    return found or _sentence_rule(text, limits) or _repetition_rule(spaced_words(words), limits)


def _judge_characters(text: str, limits: Limits) -> str | None:
    """The first rule that a Chinese or Japanese text breaks."""
    bare = NOT_A_WORD.sub("", text)
    if rule := _length_rule(len(bare), limits):
        return rule
    if limits.min_letters:
        all_but_spaces = sum(map(len, text.split()))
        if len(NOT_A_LETTER.sub("", bare)) < limits.min_letters * all_but_spaces:
            return "too few letters"
    found = _first_broken(_mark_rules(text, len(bare), limits), line_rules(text, limits))
    return found or _sentence_rule(text, limits) or _repetition_rule(bare, limits)


def _length_rule(count: int, limits: Limits) -> str | None:
    if limits.min_words and count < limits.min_words:
        return "too few words"
    if limits.max_words is not None and count > limits.max_words:
        return "too many words"
    return None


def _mark_rules(text: str, count: int, limits: Limits) -> Iterator[tuple[str, float, float | None]]:
    """Rules about single characters, as ``line_rules`` has them."""
    symbols = text.count("#") + text.count("…") + text.count("...")
    yield "too many symbols", symbols / max(count, 1), limits.max_symbols
    digits = len(NOT_A_DIGIT.sub("", text))
    yield "too many digits", digits / max(len(text), 1), limits.max_digits


def _first_broken(*rules: Iterator[tuple[str, float, float | None]]) -> str | None:
    """The name of the first rule whose share is too great."""
    for some in rules:
        for name, share, most in some:
            if most is not None and share > most:
                return name
    return None


def _sentence_rule(text: str, limits: Limits) -> str | None:
    """C4's least number of sentences."""
    wanted = limits.min_sentences or 0
    ends = SENTENCE_END.finditer(text)
    return None if all(next(ends, None) for _ in range(wanted)) else "too few sentences"


def _repetition_rule(words: Words | str, limits: Limits) -> str | None:
    """Gopher's rules about runs of words."""
    tops, repeats = limits.max_top_runs or {}, limits.max_repeated_runs or {}
    if len(words.ids if isinstance(words, Words) else words) < FEWEST_WORDS:
        return None
    if isinstance(words, str):
        words = single_characters(words)
    most_characters = int((words.ends[1:] - words.ends[:-1]).max())
    least = min(repeats.values(), default=1.0)
    for n, sums in runs(words.ids, max([*tops, *repeats], default=0)):
        if n not in tops and n not in repeats:
            continue
        count = highest_count(sums)
        if count == 1:  # nor does a longer run occur twice
            return None
        # A bound first, for counting is much cheaper than measuring.
        most = tops.get(n, 1.0)
        bound = count * n * most_characters / words.characters
        if bound > most and top_share(words, sums, n) > most:
            return f"top {n}-gram"
        if n in repeats:
            share = repeated_share(words, repeated_runs(sums), n)
            if share > repeats[n]:
                return f"repeated {n}-grams"
            if share <= least:  # longer runs cover no character that shorter ones do not
                repeats = {}
                if n > max(tops, default=0):
                    return None
    return None
