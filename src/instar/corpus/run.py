"""A corpus in the making: what there is to read, and where each part of it is worked on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import instar
from instar.corpus.accounts import MANIFEST
from instar.corpus.clean import Work
from instar.corpus.config import CorpusConfig
from instar.corpus.hub import hub_rows
from instar.corpus.inputs import Piece, Surveyed, divide, find_files, named, survey
from instar.corpus.reading import Fault
from instar.corpus.steps import files_of
from instar.errors import UserError
from instar.files import read_json
from instar.lineage import LINEAGE, hash_file, hash_value
from instar.training.display import Display

WORK = ".work"
"""Where a corpus is worked on, within its directory, until it is whole."""

MADE = ("documents", "shards", "tokenizer")
"""What is put into the directory of a corpus, in place of what such names had there."""

HUB_ROWS = 50_000
"""Rows of a hub dataset that make a partition, whatever their size."""


@dataclass
class Run:
    """A corpus in the making.

    Attributes:
        config: The recipe.
        out: Where the corpus goes.
        sources: For each input, what there is to read.
        ignored: Files of the inputs whose kind is not known.
        faults: Files that could not be opened.
        seconds: Phase to the time it took in this sitting.
    """

    config: CorpusConfig
    out: Path
    sources: list[list[Surveyed]]
    ignored: list[Path]
    faults: list[Fault]
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        score = Path(self.config.score.rpartition(":")[0] or "no file")
        self.fingerprint = hash_value(
            [
                self.config.model_dump(mode="json"),
                [[(f.path, f.sha256) for f in files] for files in self.sources],
                self.config.tokenizer
                and self.config.tokenizer.path
                and hash_file(self.config.tokenizer.path / "tokenizer.json"),
                [hash_file(path) for path in files_of(self.config.steps)],
                hash_file(score) if score.is_file() else "",
                instar.__version__,
            ]
        )
        partitions = divide(self.sources, int(self.config.partition_mb * 2**20))
        self.directory = self.out / WORK / self.fingerprint[:16]
        self.work = [Work(self.directory, self.config, partition) for partition in partitions]

    def records(self, phase: str) -> Iterator[dict[str, Any]]:
        """What a phase noted of each partition, in order."""
        return (read_json(work.path(phase, ".json")) for work in self.work)


def surveyed(config: CorpusConfig, out: Path, display: Display) -> Run:
    """Find and hash what there is to read."""
    if not config.inputs:
        raise UserError("there is no input", "Name one: --input PATH.")
    names = Counter(source.called() for source in config.inputs)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UserError(f"two inputs are called {twice[0]!r}", "Give one another `name`.")
    display.stage("survey", "hashing the inputs")
    found = [find_files(source.path) for source in config.inputs]
    size = int(config.partition_mb * 2**20)
    faults: list[Fault] = []

    def look(path: Path) -> list[Surveyed]:
        try:
            str(path).encode()
            return [survey(path, size, keep_whole=not config.cut)]
        except UnicodeEncodeError:
            fault = Fault(named(path), "has a name that is not UTF-8")
        except OSError as error:
            fault = Fault(named(path), f"cannot be read ({error.strerror})")
        if config.on_error == "fail":
            raise fault.refused()
        faults.append(fault)
        return []

    sources: list[list[Surveyed]] = []
    with ThreadPoolExecutor() as threads:  # hashing leaves the interpreter to others
        for source, (files, _) in zip(config.inputs, found, strict=True):
            parts = list(threads.map(look, files)) if files else [[_on_the_hub(source.path)]]
            sources.append([file for part in parts for file in part])
    faults.sort(key=lambda fault: fault.place)
    return Run(config, out, sources, [path for _, ignored in found for path in ignored], faults)


def _on_the_hub(path: str) -> Surveyed:
    """A dataset of the hub, in stretches of rows."""
    rows = hub_rows(path)
    pieces = tuple(
        Piece(path, "hub", start, min(start + HUB_ROWS, len(rows)))
        for start in range(0, len(rows), HUB_ROWS)
    )
    return Surveyed(path, rows._fingerprint, rows.dataset_size or 0, pieces)


def check_place(config: CorpusConfig, out: Path) -> None:
    """Raise ``UserError`` if the corpus would replace what is not one, or become its own input."""
    done = out / MANIFEST
    is_corpus = (out / WORK).exists() or (done.exists() and "fingerprint" in read_json(done))
    others = [name for name in (*MADE, MANIFEST, LINEAGE) if (out / name).exists()]
    if others and not is_corpus:
        raise UserError(
            f"{out} holds {others[0]!r}, which no corpus left there",
            "Name a new directory with --out.",
        )
    for source in config.inputs:
        folder = Path(source.path)
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{out} lies within the input {source.path}, and would be read the next time",
                "Name a directory outside of it with --out.",
            )
