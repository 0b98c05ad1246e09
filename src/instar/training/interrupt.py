"""Ctrl-C between two steps, never within one."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType


class Interrupted(KeyboardInterrupt):
    """Ctrl-C that was held back until everything was in a state worth saving."""


class Interruptible:
    """While entered, the first Ctrl-C is remembered and raised by ``check``; the second at once.

    So a training step, and the saving that follows it, always comes to its end.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interruptible:
        # Only the main thread may set signal handlers; elsewhere Ctrl-C never arrives.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing this step; Ctrl-C again stops at once", file=sys.stderr)

    def check(self) -> None:
        """Raise ``Interrupted`` if Ctrl-C was pressed."""
        if self.asked:
            raise Interrupted

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)
