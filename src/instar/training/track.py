"""The trackers that people already use, each by name and each a few lines.

``metrics.jsonl`` is written in any case; these show the same rows elsewhere as well. None of them
is a dependency: whoever asks for one has it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from instar.errors import UserError

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab"]

PROJECT = "instar"


class Tracker(Protocol):
    """Shows the rows of a run."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Show one row."""
        ...

    def close(self) -> None:
        """The run is over, or stopped."""
        ...


class TensorBoard:
    """Event files in ``<directory>/tensorboard``; look with ``tensorboard --logdir``."""

    def __init__(self, name: str, directory: Path, config: Mapping[str, Any]) -> None:
        module = _imported("torch.utils.tensorboard", "tensorboard")
        self.writer = module.SummaryWriter(str(directory / "tensorboard" / name))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One scalar a value."""
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Write what is not written yet."""
        self.writer.close()


class RunLike:
    """Those that speak as Weights & Biases does: trackio and SwanLab.

    Args:
        package: Which.
        name: Of the run.
        directory: Where offline data goes, for those that can be told.
        config: Shown beside the curves.
    """

    def __init__(self, package: str, name: str, directory: Path, config: Mapping[str, Any]) -> None:
        self.module = _imported(package, package)
        told: dict[str, Any] = {"project": PROJECT, "config": dict(config)}
        if package == "swanlab":
            told |= {"experiment_name": name, "logdir": str(directory / package)}
        else:
            told["name"] = name
        if package == "wandb":
            told["dir"] = str(directory)
        self.module.init(**told)

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

    def __init__(self, name: str, directory: Path, config: Mapping[str, Any]) -> None:
        super().__init__("wandb", name, directory, config)
        self.module.define_metric("step")
        self.module.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One row."""
        self.module.log({**values, "step": step})


class MLflow:
    """A run of the experiment ``instar`` on whichever server MLflow's settings name.

    Without any, ``<directory>/mlflow.db``; look with ``mlflow ui --backend-store-uri sqlite:///…``.
    Rows are written in the background: the database takes a tenth of a second for each.
    """

    def __init__(self, name: str, directory: Path, config: Mapping[str, Any]) -> None:
        self.module = _imported("mlflow", "mlflow")
        if not self.module.is_tracking_uri_set():
            self.module.set_tracking_uri(f"sqlite:///{directory.resolve() / 'mlflow.db'}")
        self.module.set_experiment(PROJECT)
        self.module.start_run(run_name=name)
        self.module.log_params(_flat(config))

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


def open_tracker(
    which: TrackerName, name: str, directory: Path, config: Mapping[str, Any]
) -> Tracker:
    """Begin to track a run.

    Args:
        which: The tracker.
        name: Of the run, such as ``mini/sft``.
        directory: Where trackers that write files may do so.
        config: The stage's settings.

    Raises:
        UserError: The tracker's package is not installed.
    """
    if which == "tensorboard":
        return Lenient(which, TensorBoard(name, directory, config))
    if which == "wandb":
        return Lenient(which, WeightsAndBiases(name, directory, config))
    if which == "mlflow":
        return Lenient(which, MLflow(name, directory, config))
    return Lenient(which, RunLike(which, name, directory, config))


def _imported(module: str, package: str) -> Any:
    """A tracker's module."""
    try:
        return import_module(module)
    except ImportError:
        raise UserError(
            f"the tracker {package} is not installed", f"pip install {package}, or leave it out."
        ) from None
