"""A model that thinks aloud first: ``<think>...</think>`` is told apart from the answer.

The tags are those of DeepSeek-R1 (2025, arXiv:2501.12948) and Qwen3 (2025, arXiv:2505.09388).
Clients know the first part as ``reasoning_content``.
"""

from __future__ import annotations

from collections.abc import Sequence

from instar.serving.tags import Between
from instar.tokenizer.hf import Tokenizer

OPENING, CLOSING = "<think>", "</think>"

TAIL = 8
"""So many tokens at a prompt's end are looked at for an opening tag."""


class Thinking:
    """Splits a reply into what was thought and what is said.

    Args:
        begun: Whether the prompt itself opened the thinking, as some chat templates do.
    """

    def __init__(self, begun: bool = False) -> None:
        self._between = Between(OPENING, CLOSING, begun)
        self._blank = False

    def push(self, piece: str) -> tuple[str, str]:
        """Thought and answer in the next piece of text."""
        return self._split(self._between.push(piece))

    def flush(self) -> tuple[str, str]:
        """Thought and answer in what was held back."""
        return self._split(self._between.flush())

    def _split(self, parts: list[tuple[bool, str]]) -> tuple[str, str]:
        thought, answer = "", ""
        for inside, text in parts:
            # The line breaks behind either tag belong to the format.
            self._blank = self._blank or not text
            if self._blank:
                text = text.lstrip("\n")
                self._blank = not text
            if inside:
                thought += text
            else:
                answer += text
        return thought, answer


def begun(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends with an opening tag, so that the reply begins behind it."""
    tail = tokenizer.decode(list(prompt[-TAIL:]), skip_special=False)
    return tail.rstrip().endswith(OPENING)
