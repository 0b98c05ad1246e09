"""When a reply ends: at a stop token, at a stop string, or when it is long enough."""

from __future__ import annotations

from dataclasses import dataclass

from instar.errors import UserError


@dataclass(frozen=True)
class Stopping:
    """What ends a reply.

    Attributes:
        token_ids: Drawing one of these ends the reply; its text is never shown.
        strings: The reply ends before the first of these.
        max_new_tokens: The most tokens to draw, the stop token included.

    Raises:
        UserError: A stop string is empty, or not even one token is allowed.
    """

    token_ids: frozenset[int]
    strings: tuple[str, ...] = ()
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}", "Choose 1 or more.")
        if "" in self.strings:
            raise UserError("a stop string is empty", "Remove it or give it a character.")


class StopScanner:
    """Looks for stop strings in text that arrives in pieces.

    Text that could still become a stop string is held back, so none is ever shown in part. The
    string that is complete first wins, however the text was cut.

    Args:
        strings: The stop strings.

    Attributes:
        found: Whether one has appeared; nothing after it is shown.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.strings = strings
        self.found = False
        self._held = ""

    def push(self, piece: str) -> str:
        """Take more text in and return what is safe to show."""
        if self.found:
            return ""
        if not self.strings:
            return piece
        text = self._held + piece
        matches = [(text.find(s) + len(s), text.find(s)) for s in self.strings if s in text]
        if matches:
            self.found, self._held = True, ""
            return text[: min(matches)[1]]
        safe = len(text) - max((overlap(text, s) for s in self.strings), default=0)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """What was held back; it cannot become a stop string any more."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest ending of ``text`` that is a beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
