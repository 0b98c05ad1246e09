import itertools
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.data import encoding
from instar.data.encoding import encode_documents, pack_documents, stretches
from instar.tokenizer.bpe import train_bpe
from instar.tokenizer.hf import Tokenizer, save_tokenizer

LINES = "Der Bach fließt, 水流过桥。\n  The brook runs on,\n\nand on, and on 12 times.\t\n"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer with merges, so that a cut in the wrong place changes the ids."""
    directory = tmp_path_factory.mktemp("words")
    save_tokenizer(directory, train_bpe([LINES * 3], 330), 64)
    return Tokenizer.load(directory)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 40)
    monkeypatch.setattr(encoding, "BATCH_PARTS", 3)
    monkeypatch.setattr(encoding, "LONGEST_STRETCH", 30)


def one_by_one(texts, tokenizer):
    return [[tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_id] for t in texts]


@pytest.mark.usefixtures("small")
def test_any_size_of_document_gives_the_ids_of_one_by_one(words):
    texts = ["", LINES, "a", "", "", "", "brook", LINES * 5, "on" * 8, *["12"] * 7, LINES]
    expected = one_by_one(texts, words)
    found = list(encode_documents(iter(texts), words))
    assert len(found) > 3
    assert [n for e in found for n in e.lengths] == [len(row) for row in expected]
    assert np.concatenate([e.ids for e in found]).tolist() == list(itertools.chain(*expected))
    assert all(len(e.ids) == e.lengths.sum() for e in found)
    assert pack_documents(texts, words).tolist() == list(itertools.chain(*expected))


@given(
    st.lists(st.sampled_from(["brook", " on", "水流", "。", "\n", "  ", "\n\n", "12", "\t", "'s"]))
)
def test_stretches_join_to_the_text_and_cut_no_token(words, parts):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "LONGEST_STRETCH", 30)
        cut = list(stretches(text))
    assert "".join(cut) == text
    assert all(len(part) <= 30 for part in cut)
    pairs = itertools.pairwise(cut)
    # Where there is neither a line nor a word to cut at, a token may be cut.
    if all(before.endswith("\n") or after.startswith(" ") for before, after in pairs):
        ids = [id for part in cut for id in words.encode(part)]
        assert ids == words.encode(text)


def test_a_text_without_a_place_to_cut_is_cut_anywhere(monkeypatch):
    monkeypatch.setattr(encoding, "LONGEST_STRETCH", 4)
    assert list(stretches("abcdefghij")) == ["abcd", "efgh", "ij"]
    assert list(stretches("")) == [""]


@pytest.mark.usefixtures("small")
def test_an_endless_iterable_is_read_no_further_than_needed(words):
    read = itertools.count()

    def endless():
        while True:
            yield f"brook {next(read)}"

    before = threading.active_count()
    encoded = encode_documents(endless(), words)
    first = next(encoded)
    assert first.lengths.shape == (3,)
    assert next(read) <= 9  # three batches of three
    encoded.close()
    assert threading.active_count() == before


def test_large_vocabularies_get_wider_numbers(words, monkeypatch):
    assert pack_documents(["a"], words).dtype == np.uint16
    monkeypatch.setattr(Tokenizer, "vocab_size", 2**16 + 1)
    assert pack_documents(["a"], words).dtype == np.uint32
