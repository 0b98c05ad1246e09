"""Where each rule of quality draws its line: for words and for characters, for the web and books.

The numbers for the web and for languages with spaces are those of three papers:

- Gopher: Rae et al. 2021, arXiv:2112.11446, appendix A and table A1;
- C4: Raffel et al. 2020, arXiv:1910.10683, section 2.2;
- FineWeb: Penedo et al. 2024, arXiv:2406.17557, section 3.6.

Those for Chinese and Japanese are ours, as are those for books; the docstrings of
``WEB_CHARACTERS`` and ``BOOKS`` say how they came about.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Le

from instar.config import Config

Count = Annotated[int, Ge(0)] | None
Share = Annotated[float, Ge(0), Le(1)] | None
Length = Annotated[float, Ge(0)] | None


class Limits(Config):
    """The limits of all rules; what is left out is as the preset has it.

    A least of 0 and a greatest share of 1 switch a rule off. "Words" are characters in Chinese and
    Japanese, spaces and punctuation not counted.
    """

    min_words: Count = None
    """Fewer: "too few words" (Gopher)."""
    max_words: Count = None
    """More: "too many words" (Gopher)."""
    min_word_length: Length = None
    """Mean length of words in characters; less: "words too short" (Gopher)."""
    max_word_length: Length = None
    """More: "words too long" (Gopher)."""
    min_stop_words: Count = None
    """So many different ones of the, be, to, of, and, that, have, with; fewer: "too few stop words"
    (Gopher). English only."""
    min_letters: Share = None
    """Words with a letter in them, of all that stands between spaces; in Chinese, letters of all
    characters. Less: "too few letters" (Gopher)."""
    max_symbols: Share = None
    """Number signs and ellipses for each word; more: "too many symbols" (Gopher)."""
    max_digits: Share = None
    """Digits of all characters; more: "too many digits"."""
    max_bullet_lines: Share = None
    """Lines that begin with a bullet; more: "too many bullets" (Gopher)."""
    max_ellipsis_lines: Share = None
    """Lines that end with an ellipsis; more: "too many ellipses" (Gopher)."""
    max_duplicate_lines: Share = None
    """Lines that stood before; more: "duplicate lines" (Gopher)."""
    max_duplicate_line_characters: Share = None
    """Characters in them; more: "duplicate line characters" (Gopher 0.2, FineWeb 0.1)."""
    max_duplicate_paragraphs: Share = None
    """Paragraphs that stood before; more: "duplicate paragraphs" (Gopher)."""
    max_duplicate_paragraph_characters: Share = None
    """Characters in them; more: "duplicate paragraph characters" (Gopher)."""
    max_top_runs: dict[int, float] | None = None
    """For each n, the share of characters within the most frequent run of n words; more: "top
    n-gram" (Gopher)."""
    max_repeated_runs: dict[int, float] | None = None
    """For each n, the share of characters within runs of n words that stood before; more:
    "repeated n-grams" (Gopher)."""
    min_sentences: Count = None
    """Fewer: "too few sentences" (C4)."""
    min_line_words: Count = None
    """Shorter lines are removed from the text (C4)."""
    unfinished_lines: bool | None = None
    """Keep lines without a full stop or the like at their end; C4 removes them."""
    boilerplate: bool | None = None
    """Keep lines about JavaScript, cookies and terms of use, and pages with a curly bracket or
    "lorem ipsum"; C4 removes both."""
    min_finished_lines: Share = None
    """Lines that end like a sentence; not more: "unfinished lines" (FineWeb)."""
    max_short_lines: Share = None
    """Lines shorter than ``short_line``; as many or more: "short lines" (FineWeb)."""
    short_line: Count = None
    """Characters (FineWeb)."""


WEB_WORDS = Limits(
    min_words=50,
    max_words=100_000,
    min_word_length=3.0,
    max_word_length=10.0,
    min_stop_words=2,
    min_letters=0.8,
    max_symbols=0.1,
    max_digits=0.2,
    max_bullet_lines=0.9,
    max_ellipsis_lines=0.3,
    max_duplicate_lines=0.3,
    max_duplicate_line_characters=0.1,
    max_duplicate_paragraphs=0.3,
    max_duplicate_paragraph_characters=0.2,
    max_top_runs={2: 0.20, 3: 0.18, 4: 0.16},
    max_repeated_runs={5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10},
    min_sentences=3,
    min_line_words=5,
    unfinished_lines=True,
    boilerplate=False,
    min_finished_lines=0.12,
    max_short_lines=0.67,
    short_line=30,
)
"""The web, in languages with spaces: the papers' numbers. Lines without a full stop stay, as in
FineWeb, which found that C4's rule about them alone loses 30% of all tokens. The limit for digits
is ours: tables and lists of telephone numbers, which no rule of the papers names."""

WEB_CHARACTERS = WEB_WORDS.model_copy(
    update={
        "min_words": 80,
        "max_words": 160_000,
        "min_word_length": 0.0,
        "max_word_length": 1000.0,
        "min_stop_words": 0,
        "min_letters": 0.6,
        "max_symbols": 0.06,
        "max_top_runs": {3: 0.20, 5: 0.18, 6: 0.16},
        "max_repeated_runs": {8: 0.20, 10: 0.18, 11: 0.17, 13: 0.15, 14: 0.13, 16: 0.12},
        "min_sentences": 2,
        "min_line_words": 8,
        "short_line": 10,
    }
)
"""The web, in Chinese and Japanese; ours.

A Chinese word has about 1.6 characters, so that lengths and run lengths are the papers' times 1.6
(13 characters stand for 8 words), and most limits on shares are theirs. What does not carry over
was read off 619 replies of eighty characters or more in clean modern Chinese, so that a rule loses
about as many of them as of 300 web pages in English, three in a hundred at most: letters of all
characters (the first percentile of the replies is 0.58), digits (the 99th is 0.18), repeated runs
(the 97th is 0.18 for 8 characters, where that of the web pages is 0.14 for 5 words). A short line
has ten characters, about thirty letters of English; half of the replies' lines have more than
forty. Two sentences are enough: Chinese joins with commas what English ends with full stops."""

BOOKS = Limits(
    min_words=10,
    max_words=100_000_000,
    min_word_length=2.0,
    max_word_length=15.0,
    min_stop_words=0,
    min_letters=0.5,
    max_symbols=0.3,
    max_digits=0.5,
    max_bullet_lines=1.0,
    max_ellipsis_lines=1.0,
    max_duplicate_lines=0.7,
    max_duplicate_line_characters=0.7,
    max_duplicate_paragraphs=0.7,
    max_duplicate_paragraph_characters=0.7,
    max_top_runs={2: 0.5, 4: 0.5},
    max_repeated_runs={5: 0.7, 10: 0.6},
    min_sentences=0,
    min_line_words=0,
    unfinished_lines=True,
    boilerplate=True,
    min_finished_lines=0.0,
    max_short_lines=1.0,
    short_line=0,
)
"""Verse, plays and prose; ours.

Half as much again as the most that 200 pieces of Shakespeare's plays and 10,000 Tang poems have,
and often more: duplicate lines 0.39 (speakers' names), the top 2-gram 0.21, repeated 5-grams 0.27.
What is left to drop are fragments of less than ten words, and pages of rules, dots and numbers."""

BOOKS_CHARACTERS = BOOKS.model_copy(update={"min_word_length": 0.0, "max_word_length": 1000.0})
"""The same in Chinese and Japanese: a quatrain of five-character lines has 20 characters."""


def limits_of(preset: Limits, own: Limits) -> Limits:
    """A preset with those limits changed that somebody has set."""
    return preset.model_copy(update=own.model_dump(exclude_none=True))
