import random
from pathlib import Path

import pytest

from instar.errors import UserError
from instar.tokenizer import learning
from instar.tokenizer.bpe import train_bpe
from instar.tokenizer.hf import Tokenizer
from instar.tokenizer.learning import learn_merges, learn_tokenizer, train_with_rust
from instar.tokenizer.verbs import main

WORDS = [
    "the",
    "ferry",
    "crosses",
    "at",
    "dawn",
    "渡船",
    "天亮",
    "过河",
    "and",
    "2",
    "7",
    "again",
    ",",
    ".",
    "\n",
]


def quiet(*_):
    """Takes what is told and tells nobody."""


def some_text(seed):
    draw = random.Random(seed)
    return " ".join(draw.choices(WORDS, k=400))


def contents(directory: Path):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_above_the_limit_the_rust_library_writes_the_same_files(tmp_path, monkeypatch):
    texts, notes = [some_text(i) for i in range(9)], []
    sizes = 300, 64, quiet, notes.append
    assert learn_tokenizer(tmp_path / "own", iter(texts), "bpe", *sizes) == 300
    assert notes == []
    monkeypatch.setattr(learning, "OWN_TRAINER_UP_TO", len(texts[0].encode()) * 3)
    monkeypatch.setattr(learning, "train_bpe", None)  # calling it would fail
    assert learn_tokenizer(tmp_path / "rust", iter(texts), "bpe", *sizes) == 300
    assert len(notes) == 1
    assert "Rust" in notes[0]
    assert contents(tmp_path / "own") == contents(tmp_path / "rust")


@pytest.mark.parametrize("letters", ["a", "ab", "ab ", "甲乙 .\n"])
def test_equally_frequent_pairs_are_merged_in_the_same_order(letters):
    draw = random.Random(letters)
    for _ in range(20):
        texts = ["".join(draw.choices(letters, k=draw.randint(1, 200))) for _ in range(3)]
        size = draw.randint(262, 500)
        assert train_with_rust(texts, size) == train_bpe(texts, size)


def test_a_vocabulary_without_room_is_refused_before_reading():
    def unread():
        raise AssertionError("nothing needs to be read")
        yield ""

    with pytest.raises(UserError, match="vocab_size is 261"):
        learn_merges(unread(), 261, quiet, quiet)


@pytest.mark.parametrize("kind", ["sentencepiece-bpe", "sentencepiece-unigram"])
def test_the_verb_learns_every_kind(kind, tmp_path, capsys):
    pytest.importorskip("sentencepiece", reason="sentencepiece is an extra")
    lines = "\n".join(some_text(i) for i in range(30))  # of less text unigram keeps no words
    (tmp_path / "a.txt").write_text(lines, encoding="utf-8")
    out = tmp_path / "t"
    argv = ["train", str(tmp_path / "a.txt"), "--out", str(out), "--vocab-size", "380"]
    assert main([*argv, "--kind", kind]) == 0
    assert "sentencepiece learns" in capsys.readouterr().out
    tokenizer = Tokenizer.load(out)
    ids = tokenizer.encode(" the ferry")
    assert max(map(len, map(tokenizer.token_bytes, ids))) > 1
    assert main(["show", str(out), "--file", str(tmp_path / "a.txt")]) == 0
    assert main(["encode", str(out), "过河 the"]) == 0
    assert "bytes per token" in capsys.readouterr().out
