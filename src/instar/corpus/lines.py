"""What lines say of a page: menus, notices and lists, removed line by line or judged together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from instar.corpus.repetition import duplicate_shares
from instar.corpus.script import UNSPACED, language_of_script
from instar.corpus.thresholds import Limits

POLICIES = (
    "javascript",
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
    # Ours: what the feet of Chinese pages say.
    "隐私政策",
    "使用条款",
    "服务条款",
    "版权所有",
)
"""Lines with one of these are about the page and not of it (C4)."""
PLACEHOLDER = "lorem ipsum"
FINISHED = tuple(".!?…\"'”’。！？｡」』")
"""How lines of prose end: C4's terminal punctuation, in its Chinese and curly forms too."""
BULLETS = tuple("•‣▪◦●○■□–—*-·")
"""What list items begin with."""
ELLIPSES = ("...", "…")
FEWEST_LINES = 4
"""Of fewer lines, shares say nothing: a paragraph with its title has half of its lines short."""


def page_rule(text: str, limits: Limits) -> str | None:
    """C4's rules about a whole page: code, and text that only fills space."""
    if not limits.boilerplate:
        if "{" in text:
            return "curly bracket"
        if PLACEHOLDER in text.lower():
            return PLACEHOLDER
    return None


def without_boilerplate(text: str, limits: Limits, unspaced: bool) -> tuple[str, int]:
    """The lines that C4 would keep, and how many it would not; empty lines stay.

    Args:
        text: Of the document.
        limits: Say which lines are to go.
        unspaced: Whether every character counts as a word.
    """
    lowered = text.lower()
    suspects = () if limits.boilerplate else tuple(p for p in POLICIES if p in lowered)
    if not (suspects or limits.min_line_words or not limits.unfinished_lines):
        return text, 0
    lines = text.split("\n")
    kept = [line for line in lines if not line or _keeps(line, limits, suspects, unspaced)]
    if len(kept) == len(lines):
        return text, 0
    return "\n".join(kept).strip("\n"), len(lines) - len(kept)


def _keeps(line: str, limits: Limits, suspects: Sequence[str], unspaced: bool) -> bool:
    """Whether a line stays."""
    least = limits.min_line_words or 0
    words = len(line) if unspaced else len(line.split(None, least))
    # A Chinese line of an English page is one "word", whatever it says.
    if words < least and (len(line) < least or language_of_script(line) not in UNSPACED):
        return False
    if not limits.unfinished_lines and not (
        line.endswith(FINISHED) and not line.endswith(ELLIPSES)
    ):
        return False
    lowered = line.lower() if suspects else ""
    return not any(suspect in lowered for suspect in suspects)


def line_rules(text: str, limits: Limits) -> Iterator[tuple[str, float, float | None]]:
    """Rules of shares: the name, the share that the text has, and the greatest that it may have."""
    lines = [line.strip() for line in text.split("\n") if line]
    if len(lines) > 1:
        number, characters = duplicate_shares(lines)
        yield "duplicate lines", number, limits.max_duplicate_lines
        yield "duplicate line characters", characters, limits.max_duplicate_line_characters
    if "\n\n" in text:
        number, characters = duplicate_shares([part for part in text.split("\n\n") if part])
        yield "duplicate paragraphs", number, limits.max_duplicate_paragraphs
        most = limits.max_duplicate_paragraph_characters
        yield "duplicate paragraph characters", characters, most
    if len(lines) < FEWEST_LINES:
        return
    # Called for each line of a corpus, so that what is switched off is not counted.
    if (most := limits.max_bullet_lines) != 1:
        yield "too many bullets", _share(lines, BULLETS, str.startswith), most
    if (most := limits.max_ellipsis_lines) != 1:
        yield "too many ellipses", _share(lines, ELLIPSES, str.endswith), most
    if limits.min_finished_lines:
        unfinished = 1 - _share(lines, FINISHED, str.endswith)
        yield "unfinished lines", unfinished, 1 - limits.min_finished_lines
    if limits.short_line:
        short = sum(len(line) < limits.short_line for line in lines) / len(lines)
        yield "short lines", short, limits.max_short_lines


def _share(
    lines: Sequence[str], marks: tuple[str, ...], has: Callable[[str, tuple[str, ...]], bool]
) -> float:
    """Of lines that begin or end with one of ``marks``."""
    return sum(has(line, marks) for line in lines) / len(lines)
