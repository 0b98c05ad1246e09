"""Plain functions with a cadence that watch a run: log, validate, save."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

from instar.distributed import is_main, largest_over_ranks, on_main
from instar.lineage import Stopwatch
from instar.training.display import Display
from instar.training.loop import TrainingConfig
from instar.training.meter import Meter
from instar.training.optimizer import Optimizers
from instar.training.parallel import Learner
from instar.training.state import Progress, Saver, WorkDirectory, save_tensors
from instar.training.track import Tracker

SAVE_EVERY_S = 60.0
"""The most work that a power cut can cost, in seconds, while saving is quick."""

SAVING_SHARE = 0.05
"""The most of the time that may go into saving; large models are saved less often."""


def due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens ``every`` so many steps happens now; always at the end."""
    return last or (every > 0 and step % every == 0)


class MetricsFile:
    """Rows of ``metrics.jsonl`` and ``speed.jsonl``, shown by trackers as well.

    Metrics are the same for every run that learns the same, however often it was stopped; what
    the clock says stands apart from them. Only rank 0 writes.
    """

    def __init__(self, work: WorkDirectory, trackers: Sequence[Tracker] = ()) -> None:
        self.work, self.trackers = work, trackers

    def append(self, row: Mapping[str, float | int | str], progress: Progress) -> None:
        """Write a row and note in ``progress`` how long the file now is."""
        if is_main():
            progress.metrics_bytes = _append(self.work.metrics, row)
            self._show(str(row["split"]), row, progress.step)

    def append_speed(self, row: Mapping[str, float | int], progress: Progress) -> None:
        """Write a row about the clock."""
        if is_main():
            _append(self.work.speed, row)
            self._show("speed", row, progress.step)

    def _show(self, group: str, row: Mapping[str, float | int | str], step: int) -> None:
        shown = {f"{group}/{key}": v for key, v in row.items() if isinstance(v, float | int)}
        del shown[f"{group}/step"]
        for tracker in self.trackers:
            tracker.log(shown, step)


def _append(path: Path, row: Mapping[str, float | int | str]) -> int:
    """Add a JSON line to a file; returns how long the file now is."""
    with path.open("a", encoding="utf-8") as stream:
        # A refused step has no loss; JSON knows no NaN.
        known = {k: v if not isinstance(v, float) or isfinite(v) else None for k, v in row.items()}
        stream.write(json.dumps(known) + "\n")
        return stream.tell()


@dataclass
class Log:
    """Writes a row of metrics now and then, and moves the display at every step."""

    config: TrainingConfig
    meter: Meter
    file: MetricsFile
    display: Display
    watch: Stopwatch
    _tokens: int = field(default=0, init=False)
    _wall_s: float = field(default=0.0, init=False)

    def __call__(self, progress: Progress) -> None:
        """After each step."""
        progress.wall_s, progress.cpu_s = self.watch.wall_s, self.watch.cpu_s
        if due(progress.step, self.config.log_every, progress.finished):
            elapsed = progress.wall_s - self._wall_s
            # A run that went back has fewer tokens than it had.
            tokens = max(0, progress.tokens - self._tokens)
            speed = tokens / elapsed if self._wall_s else 0.0
            self._tokens, self._wall_s = progress.tokens, progress.wall_s
            means = {**self.meter.means(), **progress.means}
            row = {
                "step": progress.step,
                "split": "train",
                **means,
                "tokens": progress.tokens,
                "skipped": progress.skipped,
            }
            self.file.append(row, progress)
            clock = {"elapsed_s": round(progress.wall_s, 3), "tokens_per_s": round(speed, 1)}
            self.file.append_speed({"step": progress.step, **clock}, progress)
            self.display.metrics(means, speed)
        self.display.step(progress.step, self.config.steps)


@dataclass
class Validate:
    """Measures held-out data now and then; keeps the best weights; ends a run that got worse."""

    config: TrainingConfig
    measure: Callable[[], dict[str, float]]
    learner: Learner
    work: WorkDirectory
    file: MetricsFile
    display: Display
    optimizers: Optimizers

    def __call__(self, progress: Progress) -> None:
        """After each step."""
        if due(progress.step, self.config.validate_every, progress.finished):
            with self.optimizers.averaged():
                self._validate(progress)

    def _validate(self, progress: Progress) -> None:
        with self.learner.measuring():
            mine = self.measure()
        measured = on_main(lambda: mine)  # ranks must decide alike, to the last bit
        self.file.append({"step": progress.step, "split": "valid", **measured}, progress)
        self.display.metrics({f"valid {k}": v for k, v in measured.items()})
        if measured["loss"] < progress.best_loss:
            progress.best_loss, progress.worse = measured["loss"], 0
            if self.config.keep_best:
                best = self.learner.state_dict()
                if is_main():
                    save_tensors(self.work.best, best)
        else:
            progress.worse += 1
            if self.config.patience and progress.worse >= self.config.patience:
                progress.finished = True
                self.display.note(
                    f"stopped early at step {progress.step}: no better validation loss "
                    f"than {progress.best_loss:.4f} in {progress.worse} tries"
                )


@dataclass
class Save:
    """Saves the state from which an interrupted run goes on."""

    config: TrainingConfig
    saver: Saver
    _saved: float = field(default_factory=time.monotonic, init=False)
    _pause_s: float = field(default=SAVE_EVERY_S, init=False)

    def __call__(self, progress: Progress) -> None:
        """After each step; not after a refused one, which may be the first of a divergence."""
        # Clocks differ between ranks, and all must save at the same step.
        waited = largest_over_ranks(int(time.monotonic() - self._saved > self._pause_s))
        wanted = waited or due(progress.step, self.config.save_every, progress.finished)
        if wanted and not progress.refused:
            began = time.monotonic()
            self.saver.save(progress)
            self._saved = time.monotonic()
            self._pause_s = max(SAVE_EVERY_S, (self._saved - began) / SAVING_SHARE)
