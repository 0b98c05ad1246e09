"""A model that thinks aloud first: ``<think>...</think>`` is told apart from the answer.

The tags are those of DeepSeek-R1 (2025, arXiv:2501.12948) and Qwen3 (2025, arXiv:2505.09388).
Clients know the first part as ``reasoning_content``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from instar.generation.stopping import overlap
from instar.tokenizer.hf import Tokenizer

OPENING, CLOSING = "<think>", "</think>"

TAIL = 8
"""So many tokens at a prompt's end are looked at for an opening tag."""


class Thinking:
    """Splits a reply into what was thought and what is said.

    Thinking comes first: a tag further on is a word of the answer.

    Args:
        begun: Whether the prompt itself opened the thinking, as some chat templates do.
    """

    def __init__(self, begun: bool = False) -> None:
        self._part: Literal["start", "thought", "answer"] = "thought" if begun else "start"
        self._held = ""
        self._behind_tag = False

    def push(self, piece: str) -> tuple[str, str]:
        """Thought and answer in the next piece of text."""
        text, self._held = self._held + piece, ""
        if self._part == "start":
            bare = text.lstrip()
            if OPENING.startswith(bare) and bare != OPENING:  # nothing yet, or half a tag
                self._held = text
                return "", ""
            self._part = "thought" if bare.startswith(OPENING) else "answer"
            self._behind_tag = self._part == "thought"
            text = bare.removeprefix(OPENING) if self._behind_tag else text
        if self._part == "answer":
            return "", self._trimmed(text)
        thought, closed, answer = text.partition(CLOSING)
        if not closed:
            safe = len(text) - overlap(text, CLOSING)
            self._held = text[safe:]
            return self._trimmed(text[:safe]), ""
        thought = self._trimmed(thought)
        self._part, self._behind_tag = "answer", True
        return thought, self._trimmed(answer)

    def flush(self) -> tuple[str, str]:
        """Thought and answer in what was held back."""
        held, self._held = self._held, ""
        return (held, "") if self._part == "thought" else ("", held)

    def _trimmed(self, text: str) -> str:
        """Text without the line breaks behind either tag, which belong to the format."""
        if self._behind_tag:
            text = text.lstrip("\n")
            self._behind_tag = not text
        return text


def begun(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends with an opening tag, so that the reply begins behind it."""
    tail = tokenizer.decode(list(prompt[-TAIL:]), skip_special=False)
    return tail.rstrip().endswith(OPENING)
