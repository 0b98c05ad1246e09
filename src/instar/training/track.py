"""The trackers that people already use, each by name and each a few lines.

``metrics.jsonl`` is written in any case; these show the same rows elsewhere as well. None of them
is a dependency: whoever asks for one has it.

A run that goes on after a stop goes on in its trackers too: the id under which each knows it lies
beside the run. A run that was killed repeats the steps since its last saved state. TensorBoard then
forgets what it was told of them; the others show those points twice, in the same place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

from instar.errors import UserError
from instar.files import read_json, write_json

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab"]

PROJECT = "instar"

IDS = "trackers.json"
"""File of a work directory with the ids under which trackers know the run."""


class Tracker(Protocol):
    """Shows the rows of a run."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Show one row."""
        ...

    def close(self) -> None:
        """The run is over, or stopped."""
        ...


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        name: Such as ``mini/sft``.
        directory: Where trackers that write files may do so.
        config: The stage's settings, shown beside the curves.
        work: Lives as long as the unfinished run; without it every sitting is a run of its own.
    """

    name: str
    directory: Path
    config: Mapping[str, Any]
    work: Path | None = None

    def known(self, package: str) -> str | None:
        """The id under which a tracker got to know the run, in an earlier sitting."""
        return self._ids().get(package)

    def remember(self, package: str, known: str) -> None:
        """Keep a tracker's id of the run for the sittings to come."""
        if self.work:
            write_json(self.work / IDS, self._ids() | {package: known})

    def _ids(self) -> dict[str, str]:
        path = self.work / IDS if self.work else None
        return read_json(path) if path and path.exists() else {}


class TensorBoard:
    """Event files in ``<directory>/tensorboard``; look with ``tensorboard --logdir``.

    Each time that the steps begin anew (another sitting, a run that diverged and went back), so
    does a file, which tells TensorBoard to forget what it knew from that step on.
    """

    def __init__(self, run: TrackedRun) -> None:
        module = _imported("torch.utils.tensorboard", "tensorboard")
        self._open = module.SummaryWriter
        self._place = str(run.directory / "tensorboard" / run.name)
        self._writer: Any = None
        self._step = 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One scalar a value."""
        if self._writer is None or step < self._step:
            self.close()
            self._writer = self._open(self._place, purge_step=step)
        self._step = step
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Write what is not written yet."""
        if self._writer is not None:
            self._writer.close()


class RunLike:
    """Those that speak as Weights & Biases does.

    Args:
        package: Which.
        run: What it is to show.
        known: The run's id there; one that is known goes on.
        told: What else it is asked.
    """

    def __init__(self, package: str, run: TrackedRun, known: str, **told: Any) -> None:
        self.module = _imported(package, package)
        self.module.init(project=PROJECT, config=dict(run.config), resume="allow", **told)
        run.remember(package, known)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One row."""
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is not sent yet."""
        self.module.finish()


class WeightsAndBiases(RunLike):
    """Weights & Biases, told the step as a metric of its own.

    Its own count of steps cannot go back, as a run that diverged does: rows would be ignored.
    """

    def __init__(self, run: TrackedRun) -> None:
        known = run.known("wandb") or uuid4().hex
        place = str(run.directory)
        super().__init__("wandb", run, known, id=known, name=run.name, dir=place)
        self.module.define_metric("step")
        self.module.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One row."""
        self.module.log({**values, "step": step})


class SwanLab(RunLike):
    """SwanLab, which keeps its own files in ``<directory>/swanlab``."""

    def __init__(self, run: TrackedRun) -> None:
        known = run.known("swanlab") or uuid4().hex
        place = str(run.directory / "swanlab")
        super().__init__("swanlab", run, known, id=known, experiment_name=run.name, logdir=place)


class Trackio(RunLike):
    """Trackio, which knows runs by their names: each has one of its own."""

    def __init__(self, run: TrackedRun) -> None:
        known = run.known("trackio") or f"{run.name} {uuid4().hex[:6]}"
        super().__init__("trackio", run, known, name=known)


class MLflow:
    """A run of the experiment ``instar`` on whichever server MLflow's settings name.

    Without any, ``<directory>/mlflow.db``; look with ``mlflow ui --backend-store-uri sqlite:///…``.
    Rows are written in the background: the database takes a tenth of a second for each.
    """

    def __init__(self, run: TrackedRun) -> None:
        self.module = _imported("mlflow", "mlflow")
        if not self.module.is_tracking_uri_set():
            self.module.set_tracking_uri(f"sqlite:///{run.directory.resolve() / 'mlflow.db'}")
        self.module.set_experiment(PROJECT)
        if known := run.known("mlflow"):
            self.module.start_run(run_id=known)
        else:
            begun = self.module.start_run(run_name=run.name)
            self.module.log_params(_flat(run.config))
            run.remember("mlflow", begun.info.run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One row."""
        self.module.log_metrics(dict(values), step=step, synchronous=False)

    def close(self) -> None:
        """Write what is not written yet."""
        self.module.flush_async_logging()
        self.module.end_run()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under the names that the command line has for them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        flat |= {f"{prefix}{key}": value} if inner is None else inner
    return flat


class Lenient:
    """A tracker whose failures are told once, and do not end a run that may have taken days."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.failed = False

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One row, if all went well so far."""
        self._try(lambda: self.tracker.log(values, step))

    def close(self) -> None:
        """The end, if all went well so far."""
        self._try(self.tracker.close)

    def _try(self, action: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            action()
        except Exception as error:
            self.failed = True
            print(
                f"the tracker {self.name} failed and is left out from here on: {error}",
                file=sys.stderr,
            )


TRACKERS: dict[TrackerName, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
    "mlflow": MLflow,
    "swanlab": SwanLab,
}


def open_tracker(which: TrackerName, run: TrackedRun) -> Tracker:
    """Begin to track a run, or go on with what an earlier sitting of it began.

    Raises:
        UserError: The tracker's package is not installed.
    """
    try:
        return Lenient(which, TRACKERS[which](run))
    except Exception as error:
        if isinstance(error, UserError) or not run.known(which):
            raise
        print(f"{which} cannot go on with the run ({error}) and begins another", file=sys.stderr)
        run.remember(which, "")
        return Lenient(which, TRACKERS[which](run))


def _imported(module: str, package: str) -> Any:
    """A tracker's module."""
    try:
        return import_module(module)
    except ImportError:
        raise UserError(
            f"the tracker {package} is not installed", f"pip install {package}, or leave it out."
        ) from None
