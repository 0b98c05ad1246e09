"""An n-gram model: what counting alone can do, so that we know what the network adds.

Interpolated Kneser–Ney smoothing with modified discounts (Chen & Goodman 1998, TR-10-98,
section 3) is the strongest classical baseline. It predicts a token from the few before it:

    p(w | h) = max(c(hw) - D(c(hw)), 0) / c(h) + gamma(h) p(w | h'),

where ``h'`` is the context ``h`` without its oldest token and ``gamma(h)`` is exactly the mass
that the discounts ``D`` took away. The highest order counts occurrences. Every lower order counts
in how many *different* contexts an n-gram was seen: "Francisco" is frequent, but only ever after
"San", so it is a poor guess after anything else. (Nothing stands left of ``<bos>``, so n-grams that
begin with it keep their plain counts.) Below the unigrams lies the uniform distribution.

Everything is sorted arrays: an n-gram of token ids is packed into one 64-bit integer, oldest
token in the highest bits, so that counting is sorting, and looking up is bisection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from instar.data.schema import Document
from instar.errors import UserError

if TYPE_CHECKING:
    from instar.evaluation.exams import ExamResult
    from instar.tokenizer.hf import Tokenizer

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    """The n-grams of one length.

    Attributes:
        grams: Packed n-grams that were seen, ascending.
        share: ``(c - D(c)) / c(h)`` of each.
        contexts: Packed contexts that were seen, ascending.
        backoff: ``gamma(h)`` of each.
    """

    grams: Ints
    share: Floats
    contexts: Ints
    backoff: Floats


class NGram:
    """A fitted model; make one with ``NGram.fit``.

    Documents are given without begin or end tokens: each is predicted after one ``<bos>``,
    which is how the network sees it, too; near the start, contexts are shorter.
    """

    def __init__(self, orders: list[_Order], vocab_size: int, bos_id: int) -> None:
        self._orders = orders
        self._bits = _bits(vocab_size)
        self.vocab_size = vocab_size
        self.bos_id = bos_id

    @classmethod
    def fit(
        cls, documents: Sequence[Sequence[int]], vocab_size: int, bos_id: int = 2, order: int = 5
    ) -> NGram:
        """Count the n-grams of all lengths up to ``order``.

        Args:
            documents: Token ids, one sequence a document.
            vocab_size: Number of token ids.
            bos_id: Stands before a document's first token.
            order: Length of the longest n-gram.

        Raises:
            UserError: There is no token, or an n-gram does not fit into 63 bits.
        """
        bits = _bits(vocab_size)
        if bits * order > 63:
            raise UserError(
                f"{order}-grams of {vocab_size} token ids do not fit into 63 bits",
                f"Use order {63 // bits} or less.",
            )
        padded = _pack(documents, bits, bos_id, order)
        if not len(padded):
            raise UserError("no tokens to count", "Give documents that are not empty.")
        place = np.concatenate([np.arange(len(ids)) for ids in documents])
        # Nearer to the start, an n-gram of this length would reach beyond the begin token.
        grams, counts = np.unique(padded[place >= order - 2], return_counts=True)
        orders = [_smooth(grams, counts, bits)]
        for length in range(order - 1, 0, -1):
            mask = (1 << bits * length) - 1
            # Distinct longer n-grams, without their oldest token: how many contexts each was in.
            # Those that begin with the begin token were in none; they are counted as they come.
            begun = padded[place == length - 2]
            grams = np.concatenate((grams, begun)) & mask
            grams, counts = np.unique(grams, return_counts=True)
            orders.append(_smooth(grams, counts, bits))
        return cls(orders[::-1], vocab_size, bos_id)

    def logprob(self, ids: Sequence[int]) -> Floats:
        """Natural log-probability of each token of one document, ``(T,)``.

        Args:
            ids: Token ids, without begin or end token.
        """
        longest = len(self._orders)
        grams = _pack([ids], self._bits, self.bos_id, longest)
        p = np.full(len(grams), 1 / self.vocab_size)
        for length, order in enumerate(self._orders, start=1):
            gram = grams & ((1 << self._bits * length) - 1)
            share = _look_up(order.grams, order.share, gram, missing=0.0)
            backoff = _look_up(order.contexts, order.backoff, gram >> self._bits, missing=1.0)
            p = share + backoff * p
        return np.log(p)

    def bits_per_byte(
        self, tokenizer: Tokenizer, documents: Sequence[Document]
    ) -> dict[str, ExamResult]:
        """The same measure as for networks (``evaluation.bits``), on the same documents."""
        from instar.evaluation.bits import by_language

        documents = [document for document in documents if document["text"]]
        encoded = tokenizer.encode_batch([document["text"] for document in documents])
        return by_language(documents, [-float(self.logprob(ids).sum()) for ids in encoded])


def _bits(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def _pack(documents: Sequence[Sequence[int]], bits: int, bos_id: int, order: int) -> Ints:
    """The n-gram that ends at each token of each document, in order."""
    start = np.full(order - 1, bos_id, dtype=np.int64)
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    padded = [np.concatenate((start, np.asarray(ids, dtype=np.int64))) for ids in documents]
    stream = np.concatenate(padded) if padded else np.empty(0, dtype=np.int64)
    grams = np.zeros(max(len(stream) - order + 1, 0), dtype=np.int64)
    for back in range(order):
        grams |= stream[order - 1 - back : len(stream) - back] << (bits * back)
    # Where the n-gram ends in padding, it ends in no token: keep the others.
    real = np.ones(len(stream), dtype=bool)
    begins = np.concatenate(([0], np.cumsum(lengths + order - 1)[:-1])).astype(np.int64)
    for column in range(order - 1):
        real[begins + column] = False
    return grams[real[order - 1 :]]


def _smooth(grams: Ints, counts: Ints, bits: int) -> _Order:
    """Discount the counts and give each context what was taken from it."""
    discount = _discounts(counts)[np.minimum(counts, 3)]
    contexts, first = np.unique(grams >> bits, return_index=True)
    totals = np.add.reduceat(counts, first)
    taken = np.add.reduceat(discount, first)
    per_gram = np.repeat(totals, np.diff(np.append(first, len(grams))))
    return _Order(grams, (counts - discount) / per_gram, contexts, taken / totals)


def _discounts(counts: Ints) -> Floats:
    """``D(0) .. D(3)``, the last for counts of three and more (Chen & Goodman 1998, eq. 26).

    With ``n_c`` the number of n-grams that were counted ``c`` times and ``Y = n1 / (n1 + 2 n2)``,
    ``D(c) = c - (c + 1) Y n_{c+1} / n_c``. On little or repetitive text the estimate can leave
    its range or not exist; then ``D(c)`` is kept between ``D(1)`` and ``c``, and ``D(1)`` is one
    half where nothing was seen just once. So every context always passes some mass down.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.0
    discounts = np.array([0.0, y or 0.5, 0.0, 0.0])
    for c in (2, 3):
        estimate = c - (c + 1) * y * n[c + 1] / n[c] if n[c] and y else discounts[c - 1]
        discounts[c] = np.clip(estimate, discounts[1], c)
    return discounts


def _look_up(keys: Ints, values: Floats, wanted: Ints, missing: float) -> Floats:
    """The value of each wanted key, or ``missing``."""
    if not len(keys):
        return np.full(len(wanted), missing)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], missing)
