"""What a run needs to go on where it stopped, and where that is kept while it runs."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from instar.data.sources import Source
from instar.files import read_json, write_json
from instar.training.meter import Meter
from instar.training.optimizer import Optimizers


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: Optimizer steps done, skipped ones included.
        tokens: Tokens that went through training.
        best_loss: Lowest validation loss so far.
        worse: Validations since then.
        skipped: Steps refused because a gradient was not finite.
        wall_s: Seconds on the clock, over all sittings.
        cpu_s: Processor seconds, over all sittings.
        metrics_bytes: Length of the metrics file that belongs to this state.
        finished: Whether training is over (all steps done, or stopped early).
        means: What the source measured at the last step, and the learning rate.
    """

    step: int = 0
    tokens: int = 0
    best_loss: float = float("inf")
    worse: int = 0
    skipped: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    metrics_bytes: int = 0
    finished: bool = False
    means: dict[str, float] = field(default_factory=dict)


class WorkDirectory:
    """The folder beside a stage's output in which its unfinished run lives.

    Args:
        out: Where the finished checkpoint will be.
        fingerprint: Of the config and everything the stage reads; a folder that was left by
            another config is thrown away.
    """

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.path = out.with_name(f".{out.name}.work")
        mark = self.path / "fingerprint.json"
        if not mark.exists() or read_json(mark) != fingerprint:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            write_json(mark, fingerprint)

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / "metrics.jsonl"

    @property
    def best(self) -> Path:
        """The weights with the lowest validation loss."""
        return self.path / "best.pt"

    @property
    def state(self) -> Path:
        """Everything needed to go on."""
        return self.path / "state.pt"

    def remove(self) -> None:
        """The run is finished; nothing in here is needed any more."""
        shutil.rmtree(self.path, ignore_errors=True)


def save_tensors(path: Path, value: Any) -> None:
    """Write tensors and plain values, whole or not at all."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        # Through a stream of ours a full disk is an OSError; torch's own writer hides it.
        with beside.open("wb") as stream:
            torch.save(value, stream)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_state(
    work: WorkDirectory,
    progress: Progress,
    objective: nn.Module,
    optimizers: Optimizers,
    source: Source,
    meter: Meter,
) -> None:
    """Write everything needed to go on from this step, bit for bit."""
    state = {
        "progress": asdict(progress),
        "objective": objective.state_dict(),
        "optimizers": optimizers.state_dict(),
        "source": source.state_dict(),
        "meter": meter.state_dict(),
    }
    save_tensors(work.state, state)


def load_state(
    work: WorkDirectory,
    objective: nn.Module,
    optimizers: Optimizers,
    source: Source,
    meter: Meter,
) -> Progress:
    """Go on from the last saved step, or from the beginning.

    Metrics that were written after that step are cut off: they will be written again.
    """
    if not work.state.exists():
        work.metrics.unlink(missing_ok=True)
        return Progress()
    state = torch.load(work.state, weights_only=True, map_location="cpu")
    objective.load_state_dict(state["objective"])
    optimizers.load_state_dict(state["optimizers"])
    source.load_state_dict(state["source"])
    meter.load_state_dict(state["meter"])
    progress = Progress(**state["progress"])
    if work.metrics.exists():
        os.truncate(work.metrics, progress.metrics_bytes)
    return progress
