"""Documents that stand in the corpus more than once.

What must be compared with everything else are numbers: a hash of each document, and of the bands
of its MinHash signature. A column engine brings equal numbers together, on one machine or on many;
only documents that meet another are looked at here.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from instar.corpus.clean import Work, hash_of
from instar.corpus.columns import Writer, numbered, turns
from instar.corpus.config import NearConfig

MOST_RIVALS = 100
"""A document is compared with so many others at most, those first that share most bands."""

BATCH = 4096
"""Documents that one core signs at a time."""

SURE = 0.98
"""Chance at least that two documents exactly as similar as the threshold are compared at all."""

HASHES = pa.schema([("document", pa.int64()), ("hash", pa.uint64())])
"""A document's number, and the hash of its words."""

BANDS = pa.schema([("document", pa.int64()), ("band", pa.uint64())])
"""A document's number, and the hash of one band of its signature."""

Copies = dict[int, int]
"""A document's number to that of the one it is a copy of."""


def bands_for(threshold: float, hashes: int) -> tuple[int, int]:
    """How many bands, of how many MinHash values each.

    Two documents are compared if all values of some band agree. At similarity s that happens with
    probability ``1 - (1 - s^r)^b`` (Leskovec et al., "Mining of Massive Datasets", section 3.4.2).
    Long bands compare few pairs in vain; the longest that find what they must are taken.
    """
    for rows in range(hashes, 1, -1):
        if 1 - (1 - threshold**rows) ** (hashes // rows) >= SURE:
            return hashes // rows, rows
    return hashes, 1


def words_of(text: Any) -> Any:
    """A column of texts as words with a space between: characters where a script has no spaces."""
    from daft.functions import lower, regexp_replace

    spaceless = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])"
    only_words = regexp_replace(lower(text), r"[^\p{L}\p{N}\p{M}]+", " ")
    return regexp_replace(only_words, spaceless, " $1 ")


def sign(work: Work) -> None:
    """Give the documents of a partition the numbers by which copies find each other.

    Writes ``signed/N.parquet`` (hashes), last, and ``bands/N.parquet``.
    """
    if work.path("signed").exists():
        return
    near = work.config.near
    with Writer(work.path("signed"), HASHES) as hashes, Writer(work.path("bands"), BANDS) as bands:
        for documents, table in numbered(work.path("clean"), work.partition.index, ["text"]):
            exact = np.array([_exact(text.as_py()) for text in table["text"]], dtype=np.uint64)
            hashes.table(pa.table({"document": documents, "hash": exact}, HASHES))
            if near:
                bands.table(_bands(documents, table, near))


def _exact(text: str) -> int:
    """The hash of a document's words, whatever the white space between them."""
    return hash_of(" ".join(text.split()))


def _bands(documents: np.ndarray, table: pa.Table, near: NearConfig) -> pa.Table:
    """The bands of each document that has words."""
    import daft
    from daft import col
    from daft.functions import minhash

    count, rows = bands_for(near.threshold, near.hashes)
    words = words_of(col("text"))
    signature = minhash(
        words, num_hashes=near.hashes, ngram_size=near.ngram, hash_function="xxhash3_64"
    )
    # In batches, so that all cores have some; the numbers put them in order again.
    frame = daft.from_arrow(table.append_column("document", pa.array(documents)))
    frame = frame.into_batches(BATCH).select(col("document"), signature.alias("signature"))
    signed = frame.to_arrow().sort_by("document")
    values = signed["signature"].combine_chunks().flatten().to_numpy()
    values = values.reshape(len(table), near.hashes)
    full = (values != np.iinfo(values.dtype).max).any(axis=1)  # a text without words has no minimum
    values = values[full, : count * rows].reshape(-1, count, rows)
    return pa.table(
        {"document": documents[full].repeat(count), "band": hash_bands(values).ravel()}, BANDS
    )


def hash_bands(values: np.ndarray) -> np.ndarray:
    """One number a band.

    Args:
        values: MinHash values ``(N, bands, rows)``.

    Returns:
        ``(N, bands)``; equal values in different bands give different numbers.
    """
    hashed = np.zeros(values.shape[:2], dtype=np.uint64)
    hashed += np.arange(1, values.shape[1] + 1, dtype=np.uint64)
    for row in range(values.shape[2]):  # as FNV-1a mixes, 32 bits at a time
        hashed = (hashed ^ values[:, :, row]) * np.uint64(0x100000001B3)
        hashed ^= hashed >> np.uint64(29)
    return hashed


def meetings(files: Sequence[Path], column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents that share a value of ``column`` with another.

    Yields:
        Their numbers and those values, in the order of values, then of numbers.
    """
    import daft
    from daft import col, lit

    passes = turns(files)
    for turn in range(passes):
        frame = daft.read_parquet([str(file) for file in files]).select("document", column)
        frame = frame.where(f"{column} % {passes} = {turn}") if passes > 1 else frame
        sizes = frame.groupby(column).agg(col("document").count().alias("size"))
        shared = sizes.where(col("size") > lit(1)).select(column)
        met = frame.join(shared, on=column, how="semi").to_arrow()
        documents, values = met["document"].to_numpy(), met[column].to_numpy()
        order = np.lexsort((documents, values))
        yield documents[order], values[order]


def exact_copies(directory: Path, partitions: int) -> Copies:
    """Documents with the same words as an earlier one, which stays."""
    copies: Copies = {}
    for documents, hashes in meetings(_files(directory, "signed", partitions), "hash"):
        begins = np.flatnonzero(np.diff(hashes, prepend=hashes[:1] ^ np.uint64(1)))
        lengths = np.diff(begins, append=len(hashes))
        firsts = documents[begins].repeat(lengths)
        later = documents != firsts
        copies.update(zip(documents[later].tolist(), firsts[later].tolist(), strict=True))
    return copies


def near_copies(
    directory: Path,
    partitions: int,
    near: NearConfig,
    gone: Copies,
    progress: Callable[[int, int], None],
) -> Copies:
    """Documents whose similarity to an earlier one *that stays* reaches the threshold.

    So whatever is dropped has a like in what is kept. The signatures only say which documents to
    compare; their similarity is that of their n-grams, counted.

    Args:
        directory: Where ``sign`` wrote.
        partitions: How many there are.
        near: What counts as similar.
        gone: Exact copies, which are not looked at again.
        progress: Told how many partitions are done.
    """
    met = _Met(meetings(_files(directory, "bands", partitions), "band"), gone)
    kept: dict[int, np.ndarray] = {}
    kept_in: defaultdict[int, list[int]] = defaultdict(list)
    copies: Copies = {}
    for partition, file in enumerate(_files(directory, "clean", partitions)):
        for document, words in _words(file, partition, met.documents):
            bands = met.bands_of(document)
            mine = shingles(words, near.ngram)
            # Those that share most bands are the likeliest; pages of one template all share some.
            rivals = Counter(other for band in bands for other in kept_in[band])
            tried = (rival for rival, _ in rivals.most_common(MOST_RIVALS))
            like = next((r for r in tried if _alike(mine, kept[r], near.threshold)), None)
            if like is not None:
                copies[document] = like
                continue
            kept[document] = mine
            for band in bands:
                kept_in[band].append(document)
        progress(partition + 1, partitions)
    return copies


class _Met:
    """Documents that share a band with another.

    Args:
        meetings: Their numbers and bands, as ``meetings`` gives them.
        gone: Documents that are left out.

    Attributes:
        documents: Their numbers ``(N,)``, ascending.
    """

    def __init__(self, meetings: Iterable[tuple[np.ndarray, np.ndarray]], gone: Copies) -> None:
        left_out = np.array(sorted(gone), dtype=np.int64)
        parts = [(d[stay], b[stay]) for d, b in meetings for stay in [~np.isin(d, left_out)]]
        numbers = np.concatenate([d for d, _ in parts] or [np.zeros(0, np.int64)])
        bands = np.concatenate([b for _, b in parts] or [np.zeros(0, np.uint64)])
        order = np.lexsort((bands, numbers))
        self._bands = bands[order]
        self.documents, self._begins = np.unique(numbers[order], return_index=True)
        self._ends = np.append(self._begins[1:], len(bands))

    def bands_of(self, document: int) -> list[int]:
        """The bands that a document shares with others."""
        place = int(np.searchsorted(self.documents, document))
        return self._bands[self._begins[place] : self._ends[place]].tolist()


def _files(directory: Path, phase: str, partitions: int) -> list[Path]:
    return [directory / phase / f"{index:05d}.parquet" for index in range(partitions)]


def _words(file: Path, partition: int, wanted: np.ndarray) -> Iterator[tuple[int, str]]:
    """Number and words of each document of a partition that is wanted."""
    import daft
    from daft import col

    for documents, table in numbered(file, partition, ["text"]):
        mask = np.isin(documents, wanted)
        if mask.any():
            frame = daft.from_arrow(table.filter(pa.array(mask)))
            words = frame.select(words_of(col("text")).alias("words")).to_pydict()["words"]
            yield from zip(documents[mask].tolist(), words, strict=True)


def shingles(words: str, ngram: int) -> np.ndarray:
    """A number for each distinct n-gram of a text, ascending; a short text is one n-gram."""
    numbers = np.array([zlib.crc32(word.encode()) for word in words.split()], dtype=np.uint64)
    ngram = min(ngram, len(numbers))
    hashed = np.zeros(len(numbers) - ngram + 1, dtype=np.uint64)
    for place in range(ngram):
        hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + numbers[place : place + len(hashed)]
    return np.unique(hashed)


def _alike(a: np.ndarray, b: np.ndarray, threshold: float) -> bool:
    """Whether the Jaccard similarity ``|A and B| / |A or B|`` reaches the threshold."""
    if min(len(a), len(b)) < threshold * max(len(a), len(b)):
        return False
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both >= threshold * (len(a) + len(b) - both)
