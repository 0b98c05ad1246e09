"""Texts that are nearly equal, side by side, with what differs marked."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import regex

WORDS = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]|[\p{L}\p{M}\p{N}]+|\s+|.", regex.DOTALL)
"""What is compared: words, in scripts without spaces characters."""

Marked = list[tuple[str, bool]]
"""A text in pieces; of each, whether it differs."""


def compare(kept: str, copies: Sequence[str]) -> tuple[Marked, list[Marked]]:
    """Mark what differs between a text and its copies.

    Args:
        kept: The text.
        copies: Others like it.

    Returns:
        The text, marked where any of the copies differs from it; the copies, each marked where
        it differs from the text.
    """
    words = WORDS.findall(kept)
    differs = [False] * len(words)
    marked = list[Marked]()
    for copy in copies:
        theirs = WORDS.findall(copy)
        flags = [False] * len(theirs)
        # Common words are no junk here: without `autojunk=False` long texts would compare badly.
        matcher = SequenceMatcher(None, words, theirs, autojunk=False)
        for kind, begin, end, their_begin, their_end in matcher.get_opcodes():
            if kind != "equal":
                differs[begin:end] = [True] * (end - begin)
                flags[their_begin:their_end] = [True] * (their_end - their_begin)
        marked.append(_joined(theirs, flags))
    return _joined(words, differs), marked


def _joined(words: Sequence[str], flags: Sequence[bool]) -> Marked:
    """Neighbours that are marked alike as one piece."""
    pieces: Marked = []
    for word, flag in zip(words, flags, strict=True):
        if pieces and pieces[-1][1] == flag:
            pieces[-1] = (pieces[-1][0] + word, flag)
        else:
            pieces.append((word, flag))
    return pieces
