"""Where the safety filter stands in the server: before the model, and behind it."""

from __future__ import annotations

from collections.abc import Sequence

from instar.data.schema import Message
from instar.serving.errors import ApiError
from instar.serving.safety import Filter, Gate

WITHHELD = "(The reply was withheld by the safety filter.)"
"""What stands for a reply that the filter stops."""


def screen_prompt(screen: Filter | None, texts: Sequence[str]) -> None:
    """Refuse a request whose texts the filter stops; raises as ``screen_turns``."""
    screen_turns(screen, [{"role": "user", "content": text} for text in texts])


def screen_turns(screen: Filter | None, turns: Sequence[Message]) -> None:
    """Refuse a request with a turn that the filter stops, whoever is said to have spoken it.

    Raises:
        ApiError: With the filter's reason.
    """
    if screen is None:
        return
    verdict = screen.check_turns(turns)
    if not verdict.allowed:
        message = f"the request was stopped by the safety filter: {verdict.reason}"
        raise ApiError(400, message, "content_filter")


class ScreenedText:
    """A reply that the filter reads while it is written; where it stops it, that is said instead.

    Args:
        screen: The filter, if there is one.
    """

    def __init__(self, screen: Filter | None) -> None:
        self._gate = Gate(screen) if screen else None

    @property
    def stopped(self) -> bool:
        """Whether nothing more comes through."""
        return self._gate is not None and not self._gate.verdict.allowed

    def push(self, piece: str, last: bool) -> str:
        """Take more text in and return what may be shown.

        Args:
            piece: The text.
            last: Whether nothing follows.
        """
        if self._gate is None:
            return piece
        if self.stopped:
            return ""
        shown = self._gate.flush(piece) if last else self._gate.push(piece)
        return shown + WITHHELD if self.stopped else shown

    def close(self) -> None:
        """Nobody listens any more: the decision is logged, if it is not yet."""
        if self._gate is not None:
            self._gate.close()
