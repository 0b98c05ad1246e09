"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

import psutil
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from instar.lineage import peak_gpu_bytes

PLAIN_EVERY_S = 15.0
"""Seconds between two lines when no terminal is attached."""

SHOWN = ("loss", "valid loss", "reward", "accuracy", "kl")
"""The metrics worth a place on the live line, in this order."""


class Display:
    """Shows which stage runs, how far it is, how fast, and how much memory it takes.

    Args:
        console: Where to write; by default standard output, and nowhere on ranks other than 0.
    """

    def __init__(self, console: Console | None = None) -> None:
        if console is None:
            from instar.distributed import is_main  # loads torch, which work on text does without

            console = Console(highlight=False, quiet=not is_main())
        self.console = console
        self._live = self.console.is_terminal and not self.console.quiet
        self._bar = Progress(
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("", total=None, text="", visible=False)
        self._process = psutil.Process()
        self._shown: dict[str, float] = {}
        self._speed = 0.0
        self._spoke = time.perf_counter()
        self._first: tuple[int, float] | None = None
        self._name = ""

    def __enter__(self) -> Display:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def stage(self, name: str, what: str = "") -> None:
        """A new stage, or a new part of one, begins."""
        self._name, self._shown, self._speed = name, {}, 0.0
        self._spoke, self._first = time.perf_counter(), None
        # A new task, because an old one cannot forget its total.
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=None, text=what)

    def metrics(self, values: Mapping[str, float], tokens_per_s: float | None = None) -> None:
        """New figures for the line."""
        self._shown |= values
        if tokens_per_s:
            self._speed = tokens_per_s

    def step(self, done: int, total: int) -> None:
        """``done`` of ``total`` steps are over."""
        now = time.perf_counter()
        # What earlier sittings did says nothing about how fast this one is; nor does rich count it.
        if self._first is None or done < self._first[0]:
            self._first = done, now
        if self._live:
            self._bar.update(self._task, completed=done, total=total, text=self._text())
        elif now - self._spoke > PLAIN_EVERY_S:
            self._spoke = now
            first, began = self._first
            left = (now - began) / (done - first) * (total - done) if done > first else None
            told = "" if left is None else f", {left:.0f} s left"
            self.console.print(f"{self._name}: {done}/{total} {self._text()}{told}", soft_wrap=True)

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, soft_wrap=True)

    def _text(self) -> str:
        """The figures of the moment."""
        figures = [f"{name} {self._shown[name]:.3f}" for name in SHOWN if name in self._shown]
        if self._speed:
            figures.append(f"{self._speed:,.0f} tok/s")
        figures.append(f"{self._process.memory_info().rss / 2**30:.1f} GiB")
        if gpu := peak_gpu_bytes():
            figures.append(f"GPU {gpu / 2**30:.1f} GiB")
        return " · ".join(figures)
