import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.errors import UserError
from instar.tokenizer.bpe import BytePairEncoder, train_bpe


def test_merges_derived_by_hand():
    # One word, a a a b d a a a b a c. Most frequent is (a, a), four times counting overlaps;
    # it leaves Z a b d Z a b a c with Z = aa. Then (a, b) and (Z, a) both stand twice, and a's id
    # is smaller than Z's: Z Y d Z Y a c with Y = ab. Then (Z, Y). Then all are single, and of
    # (ZY, d), (d, ZY), (ZY, a), (a, c) the last has the smallest ids.
    merges = train_bpe(["aaabdaaabac"], 266)
    assert merges == [(b"a", b"a"), (b"a", b"b"), (b"aa", b"ab"), (b"a", b"c")]
    # 262 is the first merge; "!" has id 6 and d stands 67 places after it.
    assert BytePairEncoder(merges).encode("aaabdaaabac") == [264, 73, 264, 265]


def test_counts_are_weighted_by_how_often_a_word_occurs():
    # "xy" stands twice, " ab" three times; of its two pairs (a, b) has the smaller ids, since the
    # space is no printable byte and comes after them all.
    assert train_bpe(["xy", "xy ab", " ab", " ab"], 264) == [(b"a", b"b"), (b" ", b"ab")]


def test_merges_stay_inside_words():
    # Every digit is a word; so is each run of letters with the space before it.
    merges = train_bpe(["1234 1234 1234 ab ab, ab"], 400)
    assert merges == [(b"a", b"b"), (b" ", b"ab")]


def test_order_of_texts_does_not_matter():
    texts = ["鸟鸣山更幽", "the cat sat on the mat", "鸟啼 the hat", "abab baba"] * 2
    shuffled = random.Random(0).sample(texts, len(texts))
    assert train_bpe(texts, 330) == train_bpe(shuffled, 330)


def test_a_small_corpus_runs_out_of_pairs():
    assert train_bpe(["ab"], 1000) == [(b"a", b"b")]
    assert train_bpe([], 1000) == []


def test_progress_counts_up_to_the_vocabulary():
    seen = []
    train_bpe(["abcd"], 264, lambda done, total: seen.append((done, total)))
    assert seen == [(263, 264), (264, 264)]


def test_vocabulary_without_room_for_the_bytes():
    with pytest.raises(UserError, match="vocab_size is 100"):
        train_bpe(["ab"], 100)


@given(st.text())
def test_any_text_survives(merges, text):
    encoder = BytePairEncoder(merges)
    assert encoder.decode(encoder.encode(text)) == text


def test_half_a_character_decodes_to_the_replacement_character(merges):
    encoder = BytePairEncoder([])
    assert encoder.decode(encoder.encode("好")[:2]) == "\ufffd"


class Counting(dict):
    """Counts how often somebody looks something up."""

    looks = 0

    def get(self, *args):
        self.looks += 1
        return super().get(*args)

    def __getitem__(self, key):
        self.looks += 1
        return super().__getitem__(key)

    def __contains__(self, key):
        self.looks += 1
        return super().__contains__(key)


def test_a_very_long_word_is_not_quadratic(merges):
    word = "aab" * 2_000
    encoder = BytePairEncoder(train_bpe([word[:600]], 300))
    encoder._merges = Counting(encoder._merges)
    ids = encoder.encode(word)
    assert len(ids) < len(word) / 50
    # Each pair of neighbours is looked up once, each merge makes two pairs, and what comes off
    # the heap is looked up again: 6 for each byte at most.
    assert 0 < encoder._merges.looks <= 6 * len(word)
    assert encoder.decode(ids) == word
