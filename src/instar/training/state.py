"""What a run needs to go on where it stopped, and where that is kept while it runs."""

from __future__ import annotations

import glob
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from instar.data.sources import Source
from instar.distributed import default_device, is_main, on_main
from instar.errors import Elsewhere, UserError
from instar.files import read_json, settle, write_json, write_text
from instar.lineage import hash_file
from instar.model.sharding import each_tensor
from instar.training.meter import Meter
from instar.training.optimizer import Optimizers
from instar.training.parallel import Learner

MARK, STATES = "fingerprint.json", "state-*.pt"
"""What a run was made with, and where it stood."""

KEPT_STATES = 2
"""So many saved states are kept, in case the newest is damaged."""


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: Optimizer steps done, skipped ones included.
        tokens: Tokens that went through training.
        best_loss: Lowest validation loss so far.
        worse: Validations since then.
        skipped: Steps refused because a gradient was not finite or far too long.
        refused: How many of those came last, without a good step between them.
        usual_norm: Running mean of the gradient's length, where there was any.
        norms: How many gradients it is the mean of.
        rollbacks: How often the run went back to an earlier state; `skipped` and `best_loss`
            remember what was seen on the way that was given up.
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
    refused: int = 0
    usual_norm: float = 0.0
    norms: int = 0
    rollbacks: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    metrics_bytes: int = 0
    finished: bool = False
    means: dict[str, float] = field(default_factory=dict)


class WorkDirectory:
    """The folder beside a stage's output in which its unfinished run lives.

    Another unfinished run, made from other settings or other data, is kept beside it (of several,
    the one that was last worked on), and goes on when it is asked for again.

    Args:
        out: Where the finished checkpoint will be.
        fingerprint: Of the config and everything the stage reads.
        note: Told of a run that is put aside.
    """

    def __init__(
        self, out: Path, fingerprint: str, note: Callable[[str], None] = lambda _: None
    ) -> None:
        self.path = _work_of(out)
        if _mark(self.path) == fingerprint:
            return
        self._put_aside(note)
        asked = self._aside(fingerprint)
        if _mark(asked) == fingerprint:
            asked.rename(self.path)
        else:
            self.path.mkdir(parents=True)
            write_json(self.path / MARK, fingerprint)
        others = self.path.parent.glob(f"{glob.escape(self.path.name)}.*")
        for forgotten in sorted(others, key=lambda work: work.stat().st_mtime)[:-1]:
            _discard(forgotten)

    def _put_aside(self, note: Callable[[str], None]) -> None:
        """Make room for another run; what had only begun is not kept."""
        mark = _mark(self.path)
        beyond = [p for p in self.path.glob("state-*") if not p.name.startswith("state-000001.")]
        if mark and beyond:
            aside = self._aside(mark)
            _discard(aside)
            self.path.rename(aside)
            note(
                f"an unfinished run with other settings or data is kept in {aside}; it goes on "
                "when they are back"
            )
        else:
            _discard(self.path)

    def _aside(self, mark: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{mark[:12]}")

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / "metrics.jsonl"

    @property
    def speed(self) -> Path:
        """How fast it went: apart from the metrics, which are the same whenever they are made."""
        return self.path / "speed.jsonl"

    @property
    def resources(self) -> Path:
        """What the run took of the machine; a sample every few seconds."""
        return self.path / "resources.jsonl"

    @property
    def best(self) -> Path:
        """The weights with the lowest validation loss."""
        return self.path / "best.pt"

    def states(self) -> list[Path]:
        """The saved states, newest first; one without its checksum was not written to the end."""
        found = self.path.glob(STATES)
        return sorted((path for path in found if checksum_of(path).exists()), reverse=True)

    def remove(self) -> None:
        """The run is finished; nothing in here is needed any more."""
        _discard(self.path)


def _work_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.work")


def _mark(work: Path) -> str | None:
    """The fingerprint of what made a folder; none where it is no whole one."""
    return read_json(work / MARK) if (work / MARK).exists() else None


def _discard(work: Path) -> None:
    # First what makes the rest count, lest half of it be taken for a run to go on with.
    (work / MARK).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def sweep(out: Path, fingerprint: str) -> None:
    """Remove what a run that is finished has left, if it was killed before it could."""
    if _mark(_work_of(out)) in (None, fingerprint):
        _discard(_work_of(out))


def checksum_of(path: Path) -> Path:
    """The file that holds the SHA-256 of another."""
    return path.with_name(f"{path.name}.sha256")


class _Hashing:
    """A stream that knows the SHA-256 of what went through it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.stream.write(data)

    def flush(self) -> None:
        self.stream.flush()


def save_tensors(path: Path, value: Any) -> None:
    """Write tensors and plain values, whole or not at all, and their checksum beside them."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        # Through a stream of ours a full disk is an OSError; torch's own writer hides it.
        with beside.open("wb") as stream:
            hashing = _Hashing(stream)
            torch.save(value, hashing)  # type: ignore[arg-type]
            stream.flush()
            os.fsync(stream.fileno())
        checksum_of(path).unlink(missing_ok=True)
        os.replace(beside, path)
        write_text(checksum_of(path), hashing.digest.hexdigest())
    finally:
        beside.unlink(missing_ok=True)


def load_tensors(path: Path) -> Any:
    """What ``save_tensors`` wrote, on the CPU of every rank.

    Raises:
        ValueError: The file is not what was written.
    """
    on_main(lambda: check_tensors(path))
    return _read(path)


def check_tensors(path: Path) -> None:
    """Raise ``ValueError`` if the file is not what was written."""
    if hash_file(path) != checksum_of(path).read_text(encoding="utf-8"):
        raise ValueError("its checksum is wrong")


def load_best(work: WorkDirectory) -> Any:
    """The weights with the lowest validation loss.

    Raises:
        UserError: They are damaged.
    """
    try:
        return load_tensors(work.best)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(
            f"the best weights, in {work.best}, are damaged ({error})",
            "Delete that file and run the same command again: the last weights are kept instead.",
        ) from None


def _read(path: Path) -> Any:
    """Tensors on the CPU.

    Where GPUs take them away they are read from the file when somebody looks at them, so that the
    ranks of a node do not each hold a whole state.
    """
    mapped = default_device().type == "cuda"
    return torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)


@dataclass
class Saver:
    """Writes states in the background, one after the other, while training goes on.

    Rank 0 writes; the others take part in gathering what is spread over them, and in reading. A
    state holds whole tensors, so that any number of ranks can go on from it.
    """

    work: WorkDirectory
    learner: Learner
    optimizers: Optimizers
    source: Source
    meter: Meter
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    _writing: Future[None] | None = field(default=None, init=False)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Whatever ended the run: what was begun is written to its end."""
        self._pool.shutdown()

    def save(self, progress: Progress) -> None:
        """Copy everything needed to go on from this step, bit for bit, and begin to write it.

        Raises:
            OSError: Neither the state before this one nor this one could be written.
        """
        try:
            self.wait()
            failed = False
        except (OSError, Elsewhere):
            failed = True  # perhaps there is room again; if not, it must be known now
        state = {
            "progress": asdict(progress),
            "objective": self.learner.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "source": _copied(self.source.state_dict()),
            "meter": _copied(self.meter.state_dict()),
        }
        if is_main():
            self._writing = self._pool.submit(self._write, state)
        if failed:
            self.wait()

    def wait(self) -> None:
        """Until what was begun is on the disk; all ranks wait.

        Raises:
            OSError: It could not be written; the other ranks get ``Elsewhere``.
        """
        on_main(self._join)

    def _join(self) -> None:
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _write(self, state: dict[str, Any]) -> None:
        if self.work.metrics.exists():
            settle(self.work.metrics)  # no state is to know of rows that a power cut undoes
        before = self.work.states()
        # Numbered, not named by step: a run that went back comes to the same step twice.
        number = 1 + (int(before[0].stem.removeprefix("state-")) if before else 0)
        save_tensors(self.work.path / f"state-{number:06d}.pt", state)
        kept = self.work.states()[:KEPT_STATES]
        for old in set(self.work.path.glob(STATES)) - set(kept):
            # The checksum first: a state without one does not count.
            checksum_of(old).unlink(missing_ok=True)
            old.unlink(missing_ok=True)

    def load(self, warn: Callable[[str], None]) -> Progress | None:
        """Go on from the newest whole state; nothing is changed where there is none.

        Metrics that were written after that step are cut off: they will be written again.

        Args:
            warn: Told of each damaged state, which is then put aside.

        Raises:
            OSError: As ``wait`` does; or a state cannot be read, which says nothing about it.
            UserError: All states are damaged.
        """
        self.wait()
        path = on_main(lambda: self._newest(warn))
        if path is None:
            return None
        state = _read(path)
        self.learner.load_state_dict(state["objective"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.source.load_state_dict(_copied(state["source"]))
        self.meter.load_state_dict(_copied(state["meter"]))
        progress = Progress(**state["progress"])
        if is_main() and self.work.metrics.exists():
            os.truncate(self.work.metrics, progress.metrics_bytes)
        return progress

    def _newest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest whole state; damaged ones are then called so, and do not count."""
        found, metrics = self.work.states(), self.work.metrics
        damaged: list[Path] = []
        for path in found:
            try:
                check_tensors(path)
                written = _read(path)["progress"]["metrics_bytes"]
                if written > (metrics.stat().st_size if metrics.exists() else 0):
                    raise ValueError("metrics that belong to it are missing")
            except (ValueError, pickle.UnpicklingError) as error:
                warn(f"{path} is damaged ({error}); going back to the one before it")
                damaged.append(path)
                continue
            for other in damaged:
                checksum_of(other).unlink()
                other.rename(other.with_name(f"{other.name}.damaged"))
            return path
        if found:
            raise UserError(
                f"no saved state in {self.work.path} is whole",
                "Delete that folder to begin again.",
            )
        return None


def _copied(value: Any) -> Any:
    """The same values in memory of their own, on the CPU."""
    return each_tensor(lambda tensor: tensor.detach().to("cpu", copy=True), value)
