"""A place for a filter that reads what people ask and what models answer."""

from __future__ import annotations

from typing import Protocol

from instar.serving.errors import ApiError


class Verdict(Protocol):
    """What a filter found."""

    @property
    def allowed(self) -> bool:
        """Whether the text may pass."""
        ...

    @property
    def reason(self) -> str:
        """Why."""
        ...


class Screen(Protocol):
    """Any filter."""

    def check(self, text: str, role: str, /) -> Verdict:
        """Judge a text that somebody of ``role`` (``user`` or ``assistant``) wrote."""
        ...


WITHHELD = "(The reply was withheld by the safety filter.)"
"""What stands for a reply that a filter stops."""


def screen_prompt(screen: Screen | None, texts: list[str]) -> None:
    """Refuse a request whose texts a filter stops.

    Raises:
        ApiError: With the filter's reason.
    """
    for text in texts if screen else []:
        assert screen is not None
        verdict = screen.check(text, "user")
        if not verdict.allowed:
            message = f"the request was stopped by the safety filter: {verdict.reason}"
            raise ApiError(400, message, "content_filter")


class ScreenedText:
    """A reply that is read by a filter while it is written: whole sentences pass, or nothing more.

    Args:
        screen: The filter, if there is one.
    """

    def __init__(self, screen: Screen | None) -> None:
        self._screen = screen
        self._said = self._held = ""
        self.stopped = False

    def push(self, piece: str, last: bool) -> str:
        """Take more text in and return what may be shown.

        Args:
            piece: The text.
            last: Whether nothing follows.
        """
        if self._screen is None:
            return piece
        if self.stopped:
            return ""
        self._held += piece
        end = len(self._held) if last else _sentences(self._held)
        if not end:
            return ""
        shown, self._held = self._held[:end], self._held[end:]
        self._said += shown
        if self._screen.check(self._said, "assistant").allowed:
            return shown
        self.stopped = True
        return WITHHELD


def _sentences(text: str) -> int:
    """Where the last whole sentence of a text ends."""
    return 1 + max(text.rfind(mark) for mark in ".!?\n。！？")
