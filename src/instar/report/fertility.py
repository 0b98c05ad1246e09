"""How many bytes a tokenizer puts into a token: which lines it cuts best, and which worst."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from instar.tokenizer.hf import Tokenizer

LINES = 4000
"""About so many lines of the corpus are looked at."""

SHORTEST_BYTES = 24
"""Shorter lines are left out; among them, chance decides (eight Chinese characters are as long)."""

LONGEST = 240
"""Characters of a line that are looked at, and shown."""

EXTREMES = 10
"""Lines that are shown at each end."""


class Origin(NamedTuple):
    """Where a line came from: the least of its document that needs to be remembered."""

    place: str
    source: str
    language: str


@dataclass(frozen=True)
class Line:
    """A line, and how it was cut.

    Attributes:
        place: Where its document came from.
        pieces: Its text, cut where tokens end, and how many tokens each piece has: more than one
            where a character is cut itself.
        size: Bytes.
        tokens: How many there are.
    """

    place: str
    pieces: list[tuple[str, int]]
    size: int
    tokens: int

    @property
    def ratio(self) -> float:
        """Bytes a token."""
        return self.size / self.tokens


@dataclass(frozen=True)
class Fertility:
    """What a sample of lines tells.

    Attributes:
        lines: How many were looked at.
        most: The most bytes a token, best first.
        least: The fewest, worst first.
        languages: Language to bytes and tokens.
        sources: Source to bytes and tokens.
    """

    lines: int
    most: list[Line]
    least: list[Line]
    languages: dict[str, tuple[int, int]]
    sources: dict[str, tuple[int, int]]


def measure(documents: Path, tokenizer: Tokenizer) -> Fertility | None:
    """Look at lines from all over a corpus.

    Args:
        documents: Directory with JSON lines.
        tokenizer: Cuts them.

    Returns:
        None if there is no line that is long enough.
    """
    sample = dict(sample_lines(documents))  # each line once
    if not sample:
        return None
    encoded = tokenizer.encode_batch(list(sample))
    rows = [
        (len(line.encode()), line, ids) for line, ids in zip(sample, encoded, strict=True) if ids
    ]
    rows.sort(key=lambda row: (-row[0] / len(row[2]), row[1]))

    def shown(some: Sequence[tuple[int, str, list[int]]]) -> list[Line]:
        return [
            Line(sample[line].place, cut(ids, tokenizer), size, len(ids))
            for size, line, ids in some
        ]

    ends = min(EXTREMES, len(rows) // 2 or 1)  # of a very small corpus, no line at both ends
    return Fertility(
        lines=len(rows),
        most=shown(rows[:ends]),
        least=shown(rows[: -ends - 1 : -1] if len(rows) > ends else []),
        languages=_sums((sample[line].language, size, ids) for size, line, ids in rows),
        sources=_sums((sample[line].source, size, ids) for size, line, ids in rows),
    )


def _sums(rows: Iterator[tuple[str, int, list[int]]]) -> dict[str, tuple[int, int]]:
    """Bytes and tokens by name, whoever has most bytes first."""
    sums: dict[str, tuple[int, int]] = {}
    for name, size, ids in rows:
        before = sums.get(name, (0, 0))
        sums[name] = before[0] + size, before[1] + len(ids)
    return dict(sorted(sums.items(), key=lambda item: -item[1][0]))


def sample_lines(documents: Path, most: int = LINES) -> Iterator[tuple[str, Origin]]:
    """Lines at even distances through a corpus of any size, each with where it came from.

    Only the documents that are looked at are read, one at a time. Long ones give more lines.

    Args:
        documents: Directory with JSON lines.
        most: About how many.
    """
    paths = sorted(documents.glob("*.jsonl"))
    stride = max(1, sum(path.stat().st_size for path in paths) // most)
    for path in paths:
        with path.open("rb") as stream:
            while row := stream.readline():
                record = json.loads(row)
                lines = [line.strip()[:LONGEST] for line in record["text"].split("\n")]
                lines = [line for line in lines if len(line.encode()) >= SHORTEST_BYTES]
                origin = Origin(*(record.get(key, "") for key in Origin._fields))
                wanted = max(1, len(row) // stride)
                for line in lines[:: max(1, len(lines) // wanted)][:wanted]:
                    yield line, origin
                if len(row) < stride:  # on to wherever the next line is due
                    stream.seek(stride - len(row) - 1, 1)
                    stream.readline()


def cut(ids: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """The text of tokens in pieces that are whole characters, each with its number of tokens.

    Args:
        ids: Tokens of one text.
        tokenizer: Whose they are.
    """
    pieces: list[tuple[str, int]] = []
    held, count = b"", 0
    for token in ids:
        content = tokenizer.token_bytes(token)
        # A control token, such as the one for what is unknown, has no bytes but a name.
        held += content or tokenizer.decode([token], skip_special=False).encode()
        count += 1
        try:
            text = held.decode()
        except UnicodeDecodeError:
            continue
        pieces.append((text, count))
        held, count = b"", 0
    return [*pieces, (held.decode(errors="replace"), count)] if count else pieces
