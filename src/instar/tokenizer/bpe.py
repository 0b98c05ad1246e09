"""Byte pair encoding: merge the most frequent pair of neighbours, again and again.

Text is cut into words, a word into its bytes. Whatever two tokens stand together most often
become one new token; that is all (Gage 1994; Sennrich et al. 2016, arXiv:1508.07909; on bytes:
Radford et al. 2019). Since every byte is a token, no text is ever unknown.

Merges and ids equal those of the Rust library ``tokenizers``, for every character that its
Unicode tables and those of ``regex`` know alike.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import regex

from instar.errors import UserError

SPECIAL_TOKENS = ["<pad>", "<unk>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
"""Control tokens; a token's place is its id."""

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word, with the space (or one sign) before it
    r"|\p{N}"  # every digit by itself, so that numbers line up in sums
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation
    r"|\s*[\r\n]+"  # line breaks
    r"|\s+(?!\S)|\s+"  # other white space, leaving the last space to the next word
)
"""Where words end: the regular expression of Qwen2. A merge never crosses it."""

WORD = regex.compile(PATTERN)

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_ORDER = [*_PRINTABLE, *sorted(set(range(256)) - set(_PRINTABLE))]
"""The bytes in the order of their ids (which GPT-2 gave them): printable ones first."""

FIRST_BYTE = len(SPECIAL_TOKENS)
FIRST_MERGE = FIRST_BYTE + 256

Merges = Sequence[tuple[bytes, bytes]]


def vocabulary(merges: Merges) -> dict[bytes, int]:
    """Token to id: the bytes, then what the merges make, in order. Control tokens are not in it."""
    ids = {bytes([byte]): FIRST_BYTE + i for i, byte in enumerate(BYTE_ORDER)}
    for i, (left, right) in enumerate(merges):
        ids[left + right] = FIRST_MERGE + i
    return ids


# In training, a word is a Python string whose characters are token ids: chr(id). Finding and
# replacing a pair is then `str.split` and `str.join`, which run at C speed, and two such strings
# compare as their ids do. The table turns bytes (read as Latin-1) into ids.
_TO_IDS = {byte: FIRST_BYTE + i for i, byte in enumerate(BYTE_ORDER)}


_GONE = -1


class _Corpus:
    """The distinct words, and how often each pair of neighbours occurs in them.

    Attributes:
        pair_counts: Pair (a string of two ids) to its number of occurrences.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(WORD.findall(text))
        self._words = [w.encode().decode("latin-1").translate(_TO_IDS) for w in counts]
        self._counts = list(counts.values())
        self.pair_counts: dict[str, int] = defaultdict(int)
        # Which words hold a pair. A word may stand here twice, or no longer hold the pair:
        # `merge` notices, and that costs less than keeping the lists exact.
        self._words_of: dict[str, list[int]] = defaultdict(list)
        for i, (word, n) in enumerate(zip(self._words, self._counts, strict=True)):
            for k in range(len(word) - 1):
                pair = word[k : k + 2]
                self.pair_counts[pair] += n
                self._words_of[pair].append(i)

    def merge(self, pair: str, new: str) -> dict[str, int]:
        """Put the token ``new`` wherever ``pair`` stands.

        Only the neighbours of the merged places change their counts; nothing is counted again.

        Returns:
            The pairs that this made, with their counts.
        """
        left, right = pair
        lost: dict[str, int] = defaultdict(int)
        made: dict[str, int] = defaultdict(int)
        for i in self._words_of.pop(pair):
            parts = self._words[i].split(pair)
            last = len(parts) - 1
            if last == 0:
                continue
            self._words[i] = new.join(parts)
            n = self._counts[i]
            for k, part in enumerate(parts):
                if part and k > 0:
                    lost[right + part[0]] += n
                    made[new + part[0]] += n
                    self._words_of[new + part[0]].append(i)
                if part and k < last:
                    lost[part[-1] + left] += n
                    made[part[-1] + new] += n
                    self._words_of[part[-1] + new].append(i)
                if not part and 0 < k < last:  # two merges side by side
                    lost[right + left] += n
                    made[new + new] += n
                    self._words_of[new + new].append(i)
        for gone, n in lost.items():
            self.pair_counts[gone] -= n
        self.pair_counts.update(made)  # all of them are new, since the token is
        del self.pair_counts[pair]
        return made


def check_size(vocab_size: int) -> None:
    """Raise ``UserError`` if a vocabulary of that size has no room for the bytes."""
    if vocab_size < FIRST_MERGE:
        raise UserError(
            f"vocab_size is {vocab_size}",
            f"Make it at least {FIRST_MERGE}: {FIRST_BYTE} control tokens and 256 bytes.",
        )


def train_bpe(
    texts: Iterable[str], vocab_size: int, progress: Callable[[int, int], None] | None = None
) -> list[tuple[bytes, bytes]]:
    """Learn merges from text.

    Of equally frequent pairs the one with the smaller ids is merged first, so the outcome depends
    on nothing but the text.

    Args:
        texts: The corpus; read once, only its distinct words are kept.
        vocab_size: Tokens wanted in all: 6 control tokens, 256 bytes, and the rest merges. A
            small corpus may run out of pairs before.
        progress: Called after every merge with the vocabulary's size now and at the end.

    Returns:
        The pairs in the order in which they were merged.

    Raises:
        UserError: ``vocab_size`` leaves no room for the bytes.
    """
    check_size(vocab_size)
    corpus = _Corpus(texts)
    tokens = {id: token for token, id in vocabulary([]).items()}
    merges: list[tuple[bytes, bytes]] = []
    heap = [(-n, pair) for pair, n in corpus.pair_counts.items()]
    heapq.heapify(heap)
    while heap and FIRST_MERGE + len(merges) < vocab_size:
        n, pair = heapq.heappop(heap)
        now = corpus.pair_counts[pair]
        if now != -n:  # other merges took some of it since it was pushed
            if now > 0:
                heapq.heappush(heap, (-now, pair))
            continue
        left, right = (tokens[ord(id)] for id in pair)
        new = FIRST_MERGE + len(merges)
        tokens[new] = left + right
        merges.append((left, right))
        for made, n in corpus.merge(pair, chr(new)).items():
            heapq.heappush(heap, (-n, made))
        if progress is not None:
            progress(new + 1, vocab_size)
    return merges


class BytePairEncoder:
    """Text to token ids and back, in Python.

    The Rust library does the same faster; this one is for reading, and a test holds them equal.

    Args:
        merges: What ``train_bpe`` returned.
    """

    def __init__(self, merges: Merges) -> None:
        self._ids = vocabulary(merges)
        self._tokens = {id: token for token, id in self._ids.items()}
        self._merges = {
            (self._ids[left], self._ids[right]): self._ids[left + right] for left, right in merges
        }
        self._encode_word = lru_cache(maxsize=1 << 16)(self._merge_word)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; control tokens in it are taken for plain text."""
        return [id for word in WORD.findall(text) for id in self._encode_word(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; control tokens vanish, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._tokens.get(id, b"") for id in ids).decode(errors="replace")

    def _merge_word(self, word: str) -> list[int]:
        """Apply the earliest-learned merge, leftmost first, until none applies.

        The tokens form a linked list and the possible merges a heap, so that a word of n bytes
        costs n log n steps, however long it is.
        """
        ids = [self._ids[bytes([byte])] for byte in word.encode()]
        end = len(ids)
        after = list(range(1, end + 1))
        before = list(range(-1, end - 1))
        heap: list[tuple[int, int]] = []  # (the merged token, where): ids grow with the merges

        def consider(at: int) -> None:
            """Put the merge of the token at ``at`` and the next on the heap, if there is one."""
            if at >= 0 and after[at] < end:
                merged = self._merges.get((ids[at], ids[after[at]]))
                if merged is not None:
                    heapq.heappush(heap, (merged, at))

        for at in range(end):
            consider(at)
        while heap:
            merged, at = heapq.heappop(heap)
            if after[at] == end or self._merges.get((ids[at], ids[after[at]])) != merged:
                continue  # one of the two has been merged otherwise since
            ids[at], ids[after[at]] = merged, _GONE
            after[at] = after[after[at]]
            if after[at] < end:
                before[after[at]] = at
            consider(before[at])
            consider(at)
        return [id for id in ids if id != _GONE]
