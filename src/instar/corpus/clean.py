"""First phase: each partition is read, and each of its documents goes through the steps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import instar
from instar.corpus.accounts import Accounts
from instar.corpus.columns import LINES, TEXT, Writer, number_of
from instar.corpus.config import CorpusConfig, LinesConfig
from instar.corpus.document import Document, Step
from instar.corpus.inputs import Partition
from instar.corpus.reading import Fault, Reading, read_piece
from instar.corpus.steps import StepsConfig, files_of, make_steps
from instar.files import read_json, write_json
from instar.lineage import hash_file, hash_value


@dataclass(frozen=True)
class Work:
    """One partition, and where it is worked on.

    Attributes:
        directory: For what the phases hand on.
        config: The recipe.
        partition: What to read.
    """

    directory: Path
    config: CorpusConfig
    partition: Partition

    def path(self, phase: str, suffix: str = ".parquet") -> Path:
        """The file that a phase makes of this partition."""
        return self.directory / phase / f"{self.partition.index:05d}{suffix}"

    def is_done(self, phase: str) -> bool:
        """Whether the phase has finished this partition: its accounts are written last."""
        return self.path(phase, ".json").exists()

    def key(self) -> str:
        """Names all that ``clean`` makes of, so that runs that differ elsewhere can share it."""
        config = self.config
        values = config.model_dump(
            mode="json", include={"steps", "lines", "cut", "largest_record_mb"}
        )
        source = config.inputs[self.partition.source]
        return hash_value(
            [
                instar.__version__,
                values,
                source.model_dump(mode="json", exclude={"weight"}),
                asdict(self.partition),
                [hash_file(path) for path in files_of(config.steps)],
            ]
        )

    def take_over(self, other: Path) -> None:
        """Use what an unfinished run, of another recipe or other inputs, made of this partition.

        Args:
            other: Where it worked.
        """
        accounts = other / "clean" / self.path("clean", ".json").name
        if self.is_done("clean") or not accounts.exists():
            return
        record = read_json(accounts)
        skipped = record["faults"]["documents"]
        if record["key"] != self.key() or (skipped and self.config.on_error == "fail"):
            return
        for phase, suffix in (("lines", ".parquet"), ("clean", ".parquet"), ("clean", ".json")):
            mine = self.path(phase, suffix)
            mine.parent.mkdir(parents=True, exist_ok=True)
            theirs = other / phase / mine.name
            if theirs.exists():  # or it came over before the work was stopped
                theirs.replace(mine)


def clean(work: Work) -> None:
    """Read a partition and clean it: writes ``clean/N.parquet``, its lines, and its accounts."""
    if work.is_done("clean"):
        return
    config = work.config
    steps, accounts = _steps(config.steps.model_dump_json()), Accounts()
    for step in steps:
        step.counts.clear()
    for name in ("read", *(step.name for step in steps)):
        accounts.flow(name)
    with Writer(work.path("clean"), TEXT) as texts, Writer(work.path("lines"), LINES) as lines:
        row = 0
        for document in _read(work, accounts):
            if not _passes(document, steps, accounts):
                continue
            texts.add(
                {
                    "text": document.text,
                    "title": document.title,
                    "place": document.place,
                    "language": document.language,
                },
                len(document.text),
            )
            if config.lines:
                number = number_of(work.partition.index, row)
                for line in hashes_of_lines(document.text, config.lines):
                    lines.add({"line": line, "document": number}, 16)
            row += 1
    for step in steps:
        accounts.flow(step.name).counts.update(step.counts)
    accounts.check()
    write_json(work.path("clean", ".json"), accounts.record() | {"key": work.key()})


@lru_cache(maxsize=1)
def _steps(config: str) -> list[Step]:
    """The steps, made once a process: some read models or whole exams."""
    return make_steps(StepsConfig.model_validate_json(config))


def _read(work: Work, accounts: Accounts) -> Iterator[Document]:
    """The documents of a partition; what cannot be read ends the work or is counted."""
    config = work.config
    how = Reading(
        config.inputs[work.partition.source], config.cut, int(config.largest_record_mb * 2**20)
    )
    flow = accounts.flow("read")
    for piece in work.partition.pieces:
        for found in read_piece(piece, how):
            if isinstance(found, Fault):
                if config.on_error == "fail":
                    raise found.refused()
                accounts.faults.add(Document(found.problem, found.place, how.input.called()))
            elif found.text.strip():
                flow.passed(len(found.text), len(found.text))
                yield found
            else:
                flow.dropped("no text", found, len(found.text))


def _passes(document: Document, steps: Sequence[Step], accounts: Accounts) -> bool:
    """Take a document through the steps, for as long as none drops it."""
    for step in steps:
        before = len(document.text)
        rule = step(document)
        if rule is not None:
            accounts.flow(step.name).dropped(rule, document, before)
            return False
        accounts.flow(step.name).passed(before, len(document.text))
    return True


def hashes_of_lines(text: str, config: LinesConfig) -> set[int]:
    """A number for each distinct line that is long enough to matter."""
    lines = {line.strip() for line in text.split("\n")}
    return {hash_of(line) for line in lines if len(line) >= config.shortest}


def hash_of(text: str) -> int:
    """64 bits of BLAKE2b, equal on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
