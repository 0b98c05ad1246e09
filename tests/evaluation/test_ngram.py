import math
import random
from collections import Counter

import numpy as np
import pytest

from instar.errors import UserError
from instar.evaluation.ngram import NGram


def test_hand_derived_bigrams():
    # Documents 1 2 | 1 2 | 1 1 | 2, begin token 0, three ids.
    # Bigrams: (0,1) x3, (1,2) x2, (1,1) x1, (0,2) x1, so n1 = 2, n2 = n3 = 1, n4 = 0, Y = 1/2:
    #   D1 = 1/2, D2 = 2 - 3 Y n3/n2 = 1/2, D3 = 3 - 4 Y n4/n3 = 3.
    # Unigrams by distinct left neighbours: 1 has {0, 1}, 2 has {0, 1}; n1 = 0, so D = 1/2:
    #   p(1) = p(2) = 1.5/4 + (0.5 + 0.5)/4 * 1/3 = 11/24.
    #   p(1|0) = (3-3)/4 + (3 + 0.5)/4 * 11/24,  p(2|0) = 0.5/4 + 3.5/4 * 11/24
    #   p(2|1) = 1.5/3 + (0.5 + 0.5)/3 * 11/24
    #   p(1|2) = p(1), as 2 was never followed by anything.
    ngram = NGram.fit([[1, 2], [1, 2], [1, 1], [2]], vocab_size=3, bos_id=0, order=2)
    unigram = 11 / 24
    p = np.exp(ngram.logprob([1, 2, 1]))
    assert p == pytest.approx([3.5 / 4 * unigram, 1.5 / 3 + unigram / 3, unigram])
    assert np.exp(ngram.logprob([2])) == pytest.approx([0.5 / 4 + 3.5 / 4 * unigram])


def test_hand_derived_trigrams_at_the_start():
    # Documents 1 2 | 1 2 | 2, begin token 0, three ids.
    # Trigrams: (0,1,2) x2, so n1 = 0: D = 1/2. Nothing stands before (0,1) or (0,2).
    # Bigrams: (0,1) x2 and (0,2) x1 as they come; (1,2) after one token, 0. So (0,1) 2, (0,2) 1,
    #   (1,2) 1: n1 = 2, n2 = 1, n3 = 0, Y = 1/2; D1 = 1/2, D2 = 2 - 3 Y 0 = 2.
    # Unigrams by distinct left neighbours: 1 has {0}, 2 has {0, 1}; n1 = n2 = 1, Y = 1/3,
    #   D1 = 1 - 2 Y 1 = 1/3, D2 = 2 - 0 = 2: p(1) = (2/3)/3 + (1/3 + 2)/3 * 1/3 = 13/27,
    #   p(2) = 0/3 + 7/27 = 7/27.
    #   p(1|0) = (2-2)/3 + (2 + 1/2)/3 p(1),  p(2|0) = (1/2)/3 + (2.5/3) p(2)
    #   p(2|1) = (1/2)/1 + (1/2) p(2),        p(2|0,1) = (3/2)/2 + (1/2)/2 p(2|1)
    ngram = NGram.fit([[1, 2], [1, 2], [2]], vocab_size=3, bos_id=0, order=3)
    p1, p2 = 13 / 27, 7 / 27
    expected = [2.5 / 3 * p1, 0.75 + 0.25 * (0.5 + 0.5 * p2)]
    assert np.exp(ngram.logprob([1, 2])) == pytest.approx(expected)
    assert np.exp(ngram.logprob([2])) == pytest.approx([0.5 / 3 + 2.5 / 3 * p2])


def brute_force(documents, vocab_size, bos_id, order):
    """Kneser-Ney by dictionaries and recursion, straight from the equations."""
    plain = {k: Counter() for k in range(1, order + 1)}
    for ids in documents:
        begun = [bos_id, *ids]
        for k in plain:
            grams = (tuple(begun[i : i + k]) for i in range(len(begun) - k + 1))
            plain[k].update(gram for gram in grams if gram != (bos_id,))
    counts = {order: plain[order]}
    for k in range(order - 1, 0, -1):
        counts[k] = Counter(gram[1:] for gram in plain[k + 1])
        counts[k] |= Counter({g: c for g, c in plain[k].items() if g[0] == bos_id})

    def discount(k, c):
        n = Counter(counts[k].values())
        y = n[1] / (n[1] + 2 * n[2]) if n[1] else None
        first = y if y is not None else 0.5
        c = min(c, 3)
        if c == 1:
            return first
        if y is None:
            return 0.5
        if n[c] == 0:
            return discount(k, c - 1)
        return min(max(c - (c + 1) * y * n[c + 1] / n[c], first), c)

    def p(word, context):
        k = len(context) + 1
        lower = p(word, context[1:]) if context else 1 / vocab_size
        followers = {g[-1]: c for g, c in counts[k].items() if g[:-1] == context}
        if not followers:
            return lower
        total = sum(followers.values())
        gamma = sum(discount(k, c) for c in followers.values()) / total
        c = followers.get(word, 0)
        return (c - discount(k, c) if c else 0) / total + gamma * lower

    return p


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_dictionaries_and_sums_to_one(rng: random.Random, order: int):
    vocab = 6
    documents = [
        [min(5, 1 + int(rng.expovariate(0.8))) for _ in range(rng.randint(0, 25))]
        for _ in range(20)
    ]
    ngram = NGram.fit(documents, vocab, bos_id=0, order=order)
    p = brute_force(documents, vocab, 0, order)
    for _ in range(30):
        history = [rng.randrange(1, vocab) for _ in range(rng.randint(0, 6))]
        begun = (0, *history)
        context = begun[max(0, len(begun) - order + 1) :]
        ours = [math.exp(ngram.logprob([*history, word])[-1]) for word in range(vocab)]
        assert sum(ours) == pytest.approx(1, abs=1e-12)
        assert ours == pytest.approx([p(word, context) for word in range(vocab)], abs=1e-12)


def test_regular_text_is_cheap_and_documents_do_not_leak():
    ngram = NGram.fit([[3, 4, 5]] * 50 + [[6, 7, 8]] * 50, vocab_size=9)
    logprobs = ngram.logprob([3, 4, 5])
    assert math.exp(logprobs[0]) == pytest.approx(0.5, abs=0.05)
    assert np.exp(logprobs[1:]).min() > 0.9
    # 5 was last in its document, 6 first in the next: never seen together.
    assert math.exp(ngram.logprob([3, 4, 5, 6])[-1]) < 0.5


def test_what_cannot_be_counted():
    with pytest.raises(UserError, match="Use order 3 or less"):
        NGram.fit([[1, 2]], vocab_size=1 << 16)
    with pytest.raises(UserError, match="no tokens"):
        NGram.fit([[]], vocab_size=8)
    assert NGram.fit([[1]], vocab_size=4096).logprob([]).shape == (0,)


def test_bits_per_byte_adds_over_documents(tokenizer):
    documents = [{"text": "the", "language": "en"}, {"text": "他", "language": "zh"}]
    ids = tokenizer.encode_batch([d["text"] for d in documents])
    ngram = NGram.fit(ids, tokenizer.vocab_size)
    result = ngram.bits_per_byte(tokenizer, documents)
    assert result["zh"].score == pytest.approx(-ngram.logprob(ids[1]).sum() / math.log(2) / 3)
    assert result["en"].n == 1
