"""Ctrl-C and SIGTERM between two steps, never within one."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType

from instar.distributed import largest_over_ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal that was held back until everything was in a state worth saving.

    Attributes:
        signal: Which one; SIGTERM is what a machine sends that is about to be taken away.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.signal = number


class Interruptible:
    """While entered, the first signal is remembered and raised by ``check``; the second at once.

    So a training step, and the saving that follows it, always comes to its end.
    """

    def __init__(self) -> None:
        self.asked: int | None = None

    def __enter__(self) -> Interruptible:
        # Only the main thread may set signal handlers; elsewhere no signal arrives.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = {s: signal.signal(s, self._remember) for s in SIGNALS}
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            stop = KeyboardInterrupt()
            stop.signal = number  # type: ignore[attr-defined]
            raise stop
        self.asked = number
        print("\nfinishing this step; the same signal again stops at once", file=sys.stderr)

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal has come, to this rank or to another."""
        if asked := largest_over_ranks(self.asked or 0):
            raise Interrupted(asked)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._main:
            for number, handler in self._before.items():
                signal.signal(number, handler)
