"""Last phase: what is kept goes out as text, divided in two, and then as tokens."""

from __future__ import annotations

import json
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TextIO

import numpy as np
import pyarrow.parquet as pq

from instar.corpus.accounts import Accounts, Flow
from instar.corpus.clean import Work, hash_of
from instar.corpus.columns import number_of, numbered
from instar.corpus.document import Document
from instar.corpus.duplicates import Copies
from instar.corpus.own import load_score
from instar.corpus.repeated import Repeated
from instar.data.encoding import encode_documents
from instar.data.shards import write_shard
from instar.files import atomic_directory, atomic_file, write_json
from instar.tokenizer.hf import Tokenizer

COPIES = "copies.npz"

PARTS = ("train", "valid")

FIELDS = [field.name for field in fields(Document)]

TOTALS = "totals.json"

SHARD_TOKENS = 1 << 26
"""A shard has at least so many tokens, and a batch of documents more, or is the last."""


def save_copies(directory: Path, exact: Copies, near: Copies) -> None:
    """Write down which documents are copies, and of which."""
    both = exact | near
    documents = np.array(sorted(both), dtype=np.int64)
    # Half of it would be taken for all.
    with atomic_file(directory / COPIES) as beside, beside.open("wb") as stream:
        np.savez(
            stream,
            document=documents,
            of=np.array([both[document] for document in documents.tolist()], dtype=np.int64),
            near=np.array([document in near for document in documents.tolist()], dtype=bool),
        )


class Copied:
    """What ``save_copies`` wrote down of one partition.

    Args:
        directory: Where it did.
        partition: Its number.
    """

    def __init__(self, directory: Path, partition: int) -> None:
        with np.load(directory / COPIES) as file:
            documents = file["document"]
            ends = [number_of(partition, 0), number_of(partition + 1, 0)]
            mine = slice(*np.searchsorted(documents, ends).tolist())
            numbers = documents[mine].tolist()
            self.of = dict(zip(numbers, file["of"][mine].tolist(), strict=True))
            self.near = dict(zip(numbers, file["near"][mine].tolist(), strict=True))


def is_held_out(hashed: int, share: float) -> bool:
    """Whether a document belongs to validation: a matter of its own words, and of nothing else.

    Args:
        hashed: The hash of all its words; those in repeated lines too, for which lines are
            repeated changes when more data arrives.
        share: How many documents belong there.
    """
    return hashed < share * 2**64


def write_documents(work: Work) -> None:
    """Write what is kept of a partition as ``train`` and ``valid`` JSON lines.

    What they would be sorted by, if the recipe asks for an order, goes to ``N.keys.npy``.
    """
    if work.is_done("documents"):
        return
    accounts = Accounts({"exact copies": Flow(), "near copies": Flow(), "lines": Flow()})
    copied = Copied(work.directory, work.partition.index)
    repeated = Repeated.load(work.directory)
    score = load_score(work.config.score) if work.config.score else len
    keys: list[float] = []
    totals = {part: Counter[str]() for part in PARTS}
    with ExitStack() as stack:
        streams: dict[str, TextIO] = {}
        for part in PARTS:
            path = work.path("documents", f".{part}.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            streams[part] = stack.enter_context(path.open("w", encoding="utf-8"))
        for document, number, hashed in _signed(work):
            if not _stays(document, number, copied, repeated, accounts):
                continue
            accounts.finished(document)
            part = PARTS[is_held_out(hashed, work.config.valid_share)]
            size = len(document.text.encode())
            totals[part].update(documents=1, characters=len(document.text), bytes=size)
            record = {name: value for name in FIELDS if (value := getattr(document, name))}
            streams[part].write(json.dumps(record, ensure_ascii=False) + "\n")
            if part == "train":
                keys.append(float(score(document.text)))
    np.save(work.path("documents", ".keys.npy"), np.array(keys))
    write_json(work.path("documents", ".json"), accounts.record() | {"totals": totals})


def _signed(work: Work) -> Iterator[tuple[Document, int, int]]:
    """The documents of a partition, each with its number and the hash of its words."""
    source = work.config.inputs[work.partition.source].called()
    hashes = iter(pq.read_table(work.path("signed"), columns=["hash"])["hash"].to_pylist())
    for numbers, table in numbered(work.path("clean"), work.partition.index):
        for number, row in zip(numbers.tolist(), table.to_pylist(), strict=True):
            yield Document(source=source, **row), number, next(hashes)


def _stays(
    document: Document, number: int, copied: Copied, repeated: Repeated, accounts: Accounts
) -> bool:
    """Whether a document is kept; if it is, repeated lines are taken out of it."""
    size = len(document.text)
    exact, near, lines = (accounts.flow(n) for n in ("exact copies", "near copies", "lines"))
    if number in copied.of:
        like = str(copied.of[number])
        if copied.near[number]:
            exact.passed(size, size)
            near.dropped("a near copy", document, size, like)
        else:
            exact.dropped("a copy", document, size, like)
        return False
    exact.passed(size, size)
    near.passed(size, size)
    left = repeated.without(document.text, number)
    if not left.strip():
        lines.dropped("nothing but repeated lines", document, size)
        return False
    lines.passed(size, len(left))
    lines.counts["documents with such lines"] += left != document.text
    document.text = left
    return True


@dataclass(frozen=True)
class Shard:
    """What one shard is made of.

    Attributes:
        work: Its partition (for its number and the recipe).
        tokenizer: Directory of the tokenizer.
        epochs: Source to how often each of its documents is learnt.
        sorted: Whether the documents are those that ``order/N.npy`` gives to this shard.
    """

    work: Work
    tokenizer: Path
    epochs: dict[str, float]
    sorted: bool

    @property
    def path(self) -> Path:
        """Its directory; it is there once it is complete."""
        return self.work.path("shards", "")


def write_tokens(shard: Shard) -> None:
    """Cut the documents of a shard into tokens: ``shards/N/train-000.npy`` and its like.

    They are written whenever they hold ``SHARD_TOKENS``, so that a partition of any size fits
    into memory; what each source gave goes to ``totals.json`` beside them.
    """
    if shard.path.exists():
        return
    tokenizer = Tokenizer.load(shard.tokenizer)
    totals: dict[str, dict[str, Counter[str]]] = {}
    with atomic_directory(shard.path) as directory:  # there once it is complete
        for part in PARTS:
            sums = totals[part] = defaultdict(Counter)
            waiting: deque[Counter[str]] = deque()
            ids: list[np.ndarray] = []
            lengths: list[np.ndarray] = []
            written = held = 0
            for some in encode_documents(_texts(shard, part, sums, waiting), tokenizer):
                for tokens in some.lengths.tolist():
                    waiting.popleft()["tokens"] += tokens
                ids.append(some.ids)
                lengths.append(some.lengths)
                held += len(some.ids)
                if held >= SHARD_TOKENS:
                    _flush(directory, f"{part}-{written:03d}", ids, lengths)
                    written, held = written + 1, 0
            if held:
                _flush(directory, f"{part}-{written:03d}", ids, lengths)
        write_json(directory / TOTALS, totals)


def _flush(directory: Path, name: str, ids: list[np.ndarray], lengths: list[np.ndarray]) -> None:
    """Write what is held as a shard, and hold it no longer."""
    write_shard(directory, name, np.concatenate(ids), np.cumsum(np.concatenate(lengths)))
    ids.clear()
    lengths.clear()


def _texts(
    shard: Shard, part: str, sums: dict[str, Counter[str]], waiting: deque[Counter[str]]
) -> Iterator[str]:
    """The texts of a shard; each one's source is counted, and waits to hear of its tokens."""
    for text, source, turn in _drawn(shard, part):
        sums[source].update(documents=1, repeats=int(turn > 0), characters=len(text))
        waiting.append(sums[source])
        yield text


def _drawn(shard: Shard, part: str) -> Iterator[tuple[str, str, int]]:
    """Text and source of the documents of a shard, each as often as the mixture says.

    Held-out documents are all taken, once. Repeats come after all others: side by side, in sight of
    each other, they would teach to copy. Only an order that is asked for keeps them together.
    """
    first, left = 0, True
    while left:
        left = False
        for record in _records(shard, part):
            text, source = record["text"], record["source"]
            turns = _turns(shard, text, source) if part == "train" else 1
            last = turns if shard.sorted else min(first + 1, turns)
            for turn in range(first, last):
                yield text, source, turn
            left = left or last < turns
        first += 1


def _turns(shard: Shard, text: str, source: str) -> int:
    """How often a document is learnt; a broken number of times in so large a share of them."""
    whole, rest = divmod(shard.epochs[source], 1)
    return int(whole) + (hash_of(text + "\0again") < rest * 2**64)


def _records(shard: Shard, part: str) -> Iterator[dict[str, str]]:
    """The documents of a shard: a partition's own, or those that an order gives to it."""
    work = shard.work
    if not (shard.sorted and part == "train"):
        with work.path("documents", f".{part}.jsonl").open(encoding="utf-8") as stream:
            yield from map(json.loads, stream)
        return
    mine = np.load(work.directory / "order" / f"{work.partition.index:05d}.npy")
    found: dict[int, dict[str, str]] = {}
    number = 0
    wanted = set(mine.tolist())
    for path in sorted((work.directory / "documents").glob("*.train.jsonl")):
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                if number in wanted:
                    found[number] = json.loads(line)
                number += 1
    yield from (found[number] for number in mine.tolist())
