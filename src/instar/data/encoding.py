"""Documents as arrays of token ids, for texts without an end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import regex
from tokenizers import Encoding

from instar.tokenizer.hf import Tokenizer

BATCH_CHARACTERS = 1 << 18
"""Text that is encoded at once: enough to keep every core busy, little enough that its memory is
used again by the next (a call with all texts is slower)."""

AHEAD = 2
"""Batches that are encoded while another becomes an array. The library uses all cores for each,
but waits for the last text of each; then the other one fills in."""

BATCH_PARTS = 1 << 15
"""The most texts of a batch, for those that are a word long, or empty."""

LONGEST_STRETCH = 1 << 20
"""Characters of a document that are encoded as one; the library needs a hundred bytes a token."""

LINE = regex.compile(r"\n(?=\S)")
"""Where a line ends and the next begins with something visible."""

SPACED = regex.compile(r"\p{L}(?= \p{L})")
"""Where a word ends and a space and another word follow."""


@dataclass(frozen=True)
class Encoded:
    """Some documents as ids.

    Attributes:
        ids: Each as ``<bos> text <eos>``, behind one another ``(N,)``; tokenizers like GPT-2's
            have no ``<bos>``, and what ends one document begins the next.
        lengths: How many ids each of them has ``(documents,)``.
    """

    ids: np.ndarray
    lengths: np.ndarray


def id_type(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    """The smallest type of number that holds every id."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def pack_documents(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """All documents behind one another, each as ``<bos> text <eos>``, as one array of ids."""
    pieces = [encoded.ids for encoded in encode_documents(texts, tokenizer)]
    return np.concatenate(pieces) if pieces else np.zeros(0, id_type(tokenizer))


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Documents as arrays of ids, some megabytes of text at a time, for texts without an end.

    While one batch becomes an array, the next ones are encoded in threads. Memory holds the texts
    and the library's records of these few, and the ids of what is to be given out next. A document
    comes whole, however long it is.

    Args:
        texts: The documents.
        tokenizer: Turns them into ids.
    """
    dtype = id_type(tokenizer)
    held, lengths = list[np.ndarray](), [0]  # the last length is of a document still under way
    for parts, encoded in _encoded_ahead(_batches(texts), tokenizer):
        size, before = 0, len(tokenizer.before)
        for part, encoding in zip(parts, encoded, strict=True):
            more = before * part.begins + len(encoding) + part.ends
            size += more
            lengths[-1] += more
            lengths += [0] * part.ends
        # One list at a time: its numbers are made, copied and forgotten within the cache.
        rows = _rows(parts, encoded, tokenizer)
        held.append(np.fromiter(chain.from_iterable(rows), dtype, size))
        if parts[-1].ends:
            yield Encoded(np.concatenate(held), np.array(lengths[:-1], dtype=np.int64))
            held, lengths = [], [0]


class _Part(NamedTuple):
    """A stretch of a document, and whether it is its first and its last."""

    text: str
    begins: bool
    ends: bool


def _rows(
    parts: Sequence[_Part], encoded: Sequence[Encoding], tokenizer: Tokenizer
) -> Iterator[Sequence[int]]:
    """The ids of the parts, and what stands around the documents."""
    before, eos = tokenizer.before, (tokenizer.eos_id,)
    for part, encoding in zip(parts, encoded, strict=True):
        if part.begins:
            yield before
        yield encoding.ids
        if part.ends:
            yield eos


def _batches(texts: Iterable[str]) -> Iterator[list[_Part]]:
    """Parts of documents to be encoded at once."""
    batch, size = list[_Part](), 0
    for text in texts:
        left = len(text)
        for stretch in stretches(text):
            batch.append(_Part(stretch, left == len(text), left == len(stretch)))
            left -= len(stretch)
            size += len(stretch)
            if size >= BATCH_CHARACTERS or len(batch) == BATCH_PARTS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encoded_ahead(
    batches: Iterable[list[_Part]], tokenizer: Tokenizer
) -> Iterator[tuple[list[_Part], list[Encoding]]]:
    """Each batch with its ids; the next ones are encoded while the caller works on this."""
    ahead = deque[tuple[list[_Part], Future[list[Encoding]]]]()
    with ThreadPoolExecutor(AHEAD) as threads:
        for batch in batches:
            texts = [part.text for part in batch]
            ahead.append((batch, threads.submit(tokenizer.encodings, texts)))
            if len(ahead) > AHEAD:
                done, ids = ahead.popleft()
                yield done, ids.result()
        while ahead:
            done, ids = ahead.popleft()
            yield done, ids.result()


def stretches(text: str) -> Iterator[str]:
    """A very long text in parts that may be encoded by themselves, so that memory stays bounded.

    The cuts are where no token crosses: before a line, or else before the space of a word. Only
    a text that has none of these for ``LONGEST_STRETCH`` characters is cut anywhere.
    """
    at = 0
    while len(text) - at > LONGEST_STRETCH:
        window = text[at : at + LONGEST_STRETCH + 1]
        found = max((m.end() for m in LINE.finditer(window)), default=0)
        if not found:
            found = max((m.end() for m in SPACED.finditer(window)), default=LONGEST_STRETCH)
        yield window[:found]
        at += found
    yield text[at:]
