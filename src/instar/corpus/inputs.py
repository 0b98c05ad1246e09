"""What there is to read: files found, hashed, and divided into partitions of like size."""

from __future__ import annotations

import codecs
import glob
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge
from pydantic import field_validator

from instar.config import Config
from instar.errors import UserError

KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "list",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "parquet",
    ".warc": "warc",
    ".html": "html",
    ".htm": "html",
}
"""What a file's name says of how it is read; `.gz` or `.zst` may follow, but for parquet."""

PACKED = (".gz", ".zst")

CHUNK = 1 << 20

_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class InputConfig(Config):
    """One source of text."""

    path: str
    """A file, a folder, a pattern such as `books/*.txt`, or a dataset on the Hugging Face hub:
    `Salesforce/wikitext:wikitext-2-raw-v1` (before the colon its name, after it the subset)."""
    name: str = ""
    """What the accounts call it; by default the last part of its path."""
    text: str = ""
    """The column that holds the text, or a pattern of columns: `{title}\\n{paragraphs}`. By default
    the first that is there of text, content, raw_content, body, markdown and paragraphs."""
    weight: Annotated[float, Ge(0)] = 1.0
    """How much of it to take beside the others: 2 for twice its share."""
    encoding: str = "utf-8"
    """Of text, JSON and CSV files; GB18030 for older Chinese ones."""

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, encoding: str) -> str:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ValueError("no such encoding; write utf-8, gb18030, big5, latin-1, ...") from None
        return encoding

    def called(self) -> str:
        """Its name in the accounts."""
        return self.name or re.split(r"[/:]", self.path.rstrip("/"))[-1]


@dataclass(frozen=True)
class Piece:
    """A file, or a stretch of one.

    Attributes:
        path: The file; a hub dataset's name for ``kind`` "hub".
        kind: How it is read: a value of ``KINDS``, or "hub".
        start: Its first byte.
        stop: The byte after its last; None for the file's end.
        line: Number of its first line.
    """

    path: str
    kind: str
    start: int = 0
    stop: int | None = None
    line: int = 1


@dataclass(frozen=True)
class Partition:
    """Work that is either finished or not.

    Attributes:
        index: Its number, by which results are put in order.
        source: Number of the input that it belongs to.
        pieces: What to read.
        hashes: Of the file of each piece.
        size: About how many bytes.
    """

    index: int
    source: int
    pieces: tuple[Piece, ...]
    hashes: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class Surveyed:
    """What a look through a file found.

    Attributes:
        path: The file.
        sha256: Of its bytes.
        size: Bytes.
        pieces: The file in pieces of at most about the size that was asked for.
    """

    path: str
    sha256: str
    size: int
    pieces: tuple[Piece, ...]


def kind_of(path: Path) -> str | None:
    """How a file is read, or None where its name does not say."""
    name = path.with_suffix("") if path.suffix in PACKED else path
    kind = KINDS.get(name.suffix.lower())
    return None if kind == "parquet" and path.suffix in PACKED else kind


def find_files(path: str) -> tuple[list[Path], list[Path]]:
    """The files that a path, folder or pattern stands for; nothing for a dataset on the hub.

    Returns:
        Those to read, in the order of their names; those in a folder whose kind is not known.

    Raises:
        UserError: There is nothing there, or nothing that can be read.
    """
    place = Path(path)
    if place.is_file():
        if kind_of(place) is None:
            raise UserError(f"{path}: its name does not say how to read it", _known())
        return [place], []
    if place.is_dir():
        found = sorted(p for p in place.rglob("*") if p.is_file() and not _is_hidden(p, place))
    else:
        found = sorted(Path(p) for p in glob.glob(path, recursive=True) if Path(p).is_file())
        if not found and is_on_hub(path):
            return [], []
    if not found:
        raise UserError(f"nothing to read at {path}", "Name a file, a folder or a pattern.")
    readable = [p for p in found if kind_of(p)]
    if not readable:
        raise UserError(f"no file at {path} that could be read", _known())
    return readable, [p for p in found if not kind_of(p)]


def _is_hidden(path: Path, folder: Path) -> bool:
    """Whether a file, or a folder on the way to it, is not meant to be seen, as `.git`."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def named(path: Path) -> str:
    """A file for the accounts; what is not Unicode in its name becomes question marks."""
    return str(path).encode(errors="replace").decode()


def is_on_hub(path: str) -> bool:
    """Whether a path that is nowhere on the disk looks like a dataset's name."""
    return bool(_HUB.fullmatch(path)) and not path.startswith(".") and kind_of(Path(path)) is None


def _known() -> str:
    return f"Known endings: {', '.join(KINDS)}; packed with {' or '.join(PACKED)}."


def survey(path: Path, size: int, keep_whole: bool = False) -> Surveyed:
    """Look through a file once: its hash, and where it may be cut.

    Plain text is cut after blank lines, JSON lines at their ends; other files are one piece.

    Args:
        path: The file.
        size: Bytes of a piece, at most, but for the rest of a paragraph or line.
        keep_whole: Leave plain text in one piece.
    """
    kind = kind_of(path)
    assert kind is not None
    ends = {"lines": b"\n"} if keep_whole else {"text": b"\n\n", "lines": b"\n"}
    end = ends.get(kind) if path.suffix not in PACKED else None
    digest, whole = hashlib.sha256(), 0
    starts: list[tuple[int, int]] = [(0, 1)]
    with path.open("rb") as stream:
        for at, line, chunk in _chunks(stream):
            digest.update(chunk)
            whole = at + len(chunk)
            due = starts[-1][0] + size
            if end is None or whole <= due:
                continue
            found = chunk.find(end, max(0, due - at))
            if found >= 0:
                cut = found + len(end)
                starts.append((at + cut, line + chunk.count(b"\n", 0, cut)))
    starts = [start for start in starts if start[0] < whole or start[0] == 0]
    stops = [start for start, _ in starts[1:]]
    pieces = tuple(
        Piece(str(path), kind, start, stop, line)
        for (start, line), stop in zip(starts, [*stops, None], strict=True)
    )
    return Surveyed(str(path), digest.hexdigest(), whole, pieces)


def _chunks(stream: object) -> Iterator[tuple[int, int, bytes]]:
    """Place, number of the first line, and bytes of each stretch of a file."""
    at, line = 0, 1
    while chunk := stream.read(CHUNK):  # type: ignore[attr-defined]
        yield at, line, chunk
        at, line = at + len(chunk), line + chunk.count(b"\n")


def divide(sources: list[list[Surveyed]], size: int) -> list[Partition]:
    """Partitions of about ``size`` bytes, each of one source, in the order of the files."""
    partitions: list[Partition] = []

    def close(source: int, held: list[tuple[Piece, str]], length: int) -> None:
        if held:
            pieces, hashes = zip(*held, strict=True)
            partitions.append(Partition(len(partitions), source, pieces, hashes, length))

    for number, files in enumerate(sources):
        held: list[tuple[Piece, str]] = []
        total = 0
        for file in files:
            for piece in file.pieces:
                # Rows of a hub dataset have no known size: each stretch of them is a partition.
                length = (piece.stop or file.size) - piece.start if piece.kind != "hub" else size
                if held and total + length > size:
                    close(number, held, total)
                    held, total = [], 0
                held.append((piece, file.sha256))
                total += length
        close(number, held, total)
    return partitions
