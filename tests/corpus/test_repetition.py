from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.corpus.repetition import (
    duplicate_shares,
    repeated_runs,
    repeated_share,
    runs,
    single_characters,
    spaced_words,
    top_share,
)

WORDS = st.lists(st.sampled_from(["a", "bb", "ccc", "dd", "e"]), min_size=1, max_size=40)


def slow_top(words: list[str], n: int) -> float:
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    most = max(grams.values())
    if most == 1:
        return 0.0
    longest = max(len("".join(gram)) for gram, count in grams.items() if count == most)
    return min(most * longest / len("".join(words)), 1.0)


def slow_repeated(words: list[str], n: int) -> float:
    seen, covered = set(), set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            covered.update(range(i, i + n))
        seen.add(gram)
    return sum(len(words[i]) for i in covered) / len("".join(words))


@given(WORDS)
def test_shares_equal_those_of_plain_counting(words: list[str]) -> None:
    numbers = spaced_words(words)
    for n, sums in runs(numbers.ids, 6):
        assert top_share(numbers, sums, n) == pytest.approx(slow_top(words, n))
        share = repeated_share(numbers, repeated_runs(sums), n)
        assert share == pytest.approx(slow_repeated(words, n))


@given(st.text(alphabet="春眠不覺曉", min_size=1, max_size=40))
def test_characters_are_counted_like_words(text: str) -> None:
    numbers, letters = single_characters(text), list(text)
    assert numbers.characters == len(text)
    for n, sums in runs(numbers.ids, 4):
        assert top_share(numbers, sums, n) == pytest.approx(slow_top(letters, n))
        share = repeated_share(numbers, repeated_runs(sums), n)
        assert share == pytest.approx(slow_repeated(letters, n))


def test_runs_of_different_words_have_different_sums() -> None:
    ids = np.arange(50_000, dtype=np.uint64)
    for _, sums in runs(ids, 10):
        assert len(np.unique(sums)) == len(sums)


def test_by_hand() -> None:
    assert duplicate_shares(["ab", "c", "ab", "ab"]) == (0.5, 4 / 7)
    assert duplicate_shares(["ab", "c"]) == (0.0, 0.0)
    words = spaced_words(["the", "cat", "saw", "the", "cat"])
    (_, _), (_, pairs) = runs(words.ids, 2)
    assert top_share(words, pairs, 2) == 12 / 15
    assert repeated_share(words, repeated_runs(pairs), 2) == 6 / 15
