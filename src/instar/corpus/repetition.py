"""How much of a text is said more than once: by lines, by paragraphs, by runs of words.

The measures of Gopher (Rae et al. 2021, arXiv:2112.11446, table A1). Words are numbers here, and
runs of them 64-bit sums, so that sorting does all the work: time grows as n log n, and all run
lengths of a thousand words take less than a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint64]
Lengths = npt.NDArray[np.int64]

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio, odd: neighbouring numbers land far apart. Two different runs among a
million have the same sum with a probability of 2^-25."""


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a text as numbers.

    Attributes:
        ids: One number for each word; equal words have equal numbers.
        ends: Characters before the first word, up to the end of it, of the second, ...: one more
            than words.
    """

    ids: Ids
    ends: Lengths

    @property
    def characters(self) -> int:
        """Of all the words together, without what stands between them."""
        return int(self.ends[-1])


def spaced_words(words: Sequence[str]) -> Words:
    """Words of a language that puts spaces between them."""
    ids = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    return Words(ids, _ends(np.fromiter(map(len, words), np.int64, len(words))))


def single_characters(text: str) -> Words:
    """Every character is a word; ``text`` has no spaces left."""
    ids = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    return Words(ids * MULTIPLIER, np.arange(len(ids) + 1))


def _ends(lengths: Lengths) -> Lengths:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))


def runs(ids: Ids, longest: int) -> Iterator[tuple[int, Ids]]:
    """For n = 1 to ``longest``: n, and a number for each run of n words, by where it begins."""
    sums = ids
    for n in range(1, longest + 1):
        if n > 1:
            if len(ids) < n:
                return
            sums = sums[:-1] * MULTIPLIER + ids[n - 1 :]
            sums ^= sums >> np.uint64(29)
        yield n, sums


def highest_count(sums: Ids) -> int:
    """How often the most frequent run occurs. Cheap: sorting alone needs no places."""
    ordered = np.sort(sums)
    changes = np.flatnonzero(ordered[1:] != ordered[:-1])
    if len(changes) == len(ordered) - 1:
        return 1
    edges = np.concatenate(([-1], changes, [len(ordered) - 1]))
    return int((edges[1:] - edges[:-1]).max())


def top_share(words: Words, sums: Ids, n: int) -> float:
    """The share of characters within the run that occurs most often; 0 where none occurs twice.

    Args:
        words: Of the text.
        sums: A number for each run of ``n`` words.
        n: Words of a run.
    """
    order = np.argsort(sums, kind="stable")
    ordered = sums[order]
    begins = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    counts = np.diff(np.append(begins, len(ordered)))
    most = int(counts.max())
    if most == 1:
        return 0.0
    first = order[begins[counts == most]]
    longest = int((words.ends[first + n] - words.ends[first]).max())
    return min(most * longest / max(words.characters, 1), 1.0)


def repeated_runs(sums: Ids) -> npt.NDArray[np.bool_]:
    """Where a run begins that has stood in the text before."""
    order = np.argsort(sums, kind="stable")  # stable: of equal runs, the first comes first
    ordered = sums[order]
    again = np.zeros(len(sums), dtype=bool)
    again[order[1:]] = ordered[1:] == ordered[:-1]
    return again


def repeated_share(words: Words, again: npt.NDArray[np.bool_], n: int) -> float:
    """The share of characters within runs that have stood before, each character counted once."""
    change = np.zeros(len(words.ids) + 1, dtype=np.int64)
    begins = np.flatnonzero(again)
    change[begins] += 1
    np.subtract.at(change, begins + n, 1)
    covered = np.cumsum(change[:-1]) > 0
    return float(np.diff(words.ends)[covered].sum()) / max(words.characters, 1)


def duplicate_shares(parts: Sequence[str]) -> tuple[float, float]:
    """Of lines or paragraphs that stood before: their share in number, and in characters."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0.0, 0.0
    characters = sum(map(len, parts))
    repeated = characters - sum(map(len, distinct))
    return 1 - len(distinct) / len(parts), repeated / max(characters, 1)
