"""Lines from all over a corpus, and tokens as the eye may see them."""

import json

import pytest

from instar.report.fertility import LONGEST, cut, measure, sample_lines
from instar.tokenizer.bpe import train_bpe
from instar.tokenizer.hf import Tokenizer, save_tokenizer

ENGLISH = "the mill by the river grinds the corn of the village"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Knows English words, and Chinese only as bytes."""
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, train_bpe([ENGLISH] * 20, 320), 512)
    return Tokenizer.load(directory)


def write(directory, name, texts, **more):
    with (directory / name).open("w", encoding="utf-8") as file:
        for place, text in enumerate(texts):
            record = {"text": text, "source": "s", "place": f"{name} {place}", **more}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def test_pieces_are_whole_characters_and_count_their_tokens(tokenizer):
    for text in (ENGLISH, "磨坊 by the river 🌊!", ""):
        ids = tokenizer.encode(text)
        pieces = cut(ids, tokenizer)
        assert "".join(piece for piece, _ in pieces) == text
        assert sum(count for _, count in pieces) == len(ids)
    assert cut(tokenizer.encode("磨"), tokenizer) == [("磨", 3)]
    assert cut(tokenizer.encode("磨")[:2], tokenizer) == [("�", 2)]


def test_extremes_and_sums(tmp_path, tokenizer):
    write(tmp_path, "train-00000.jsonl", [f"{ENGLISH}\nshort\n{ENGLISH} {n}" for n in range(9)],
          language="en")  # fmt: skip
    write(tmp_path, "valid-00000.jsonl", ["小河边的磨坊磨着全村的谷子"], language="zh")
    found = measure(tmp_path, tokenizer)
    assert found.lines == 11  # equal lines once, short ones not at all
    assert found.most[0].pieces[0][0] == "the"
    assert found.least[0].place == "valid-00000.jsonl 0" and found.least[0].ratio == 1.0
    shown = [line.pieces for line in found.most + found.least]
    assert len(shown) == 10 and all(shown.count(pieces) == 1 for pieces in shown)
    assert found.languages["zh"] == (39, 39)
    assert sum(size for size, _ in found.sources.values()) == sum(
        size for size, _ in found.languages.values()
    )


def test_a_sample_comes_from_everywhere_and_stays_small(tmp_path):
    write(tmp_path, "train-00000.jsonl", [f"{ENGLISH} {n}" for n in range(5000)])
    write(tmp_path, "train-00001.jsonl", ["\n".join(f"{ENGLISH} of {n}" for n in range(5000))])
    write(tmp_path, "train-00002.jsonl", ["x" * 5000, ""])
    lines = list(sample_lines(tmp_path, 200))
    files = [origin.place.split()[0] for _, origin in lines]
    assert 150 < len(lines) < 250
    assert files.count("train-00000.jsonl") > 50 and files.count("train-00001.jsonl") > 50
    places = [int(origin.place.split()[1]) for _, origin in lines if "00000" in origin.place]
    assert places[0] == 0 and places[-1] > 4900
    assert max(len(line) for line, _ in lines) == LONGEST


def test_nothing_to_look_at(tmp_path, tokenizer):
    assert measure(tmp_path / "nowhere", tokenizer) is None
    write(tmp_path, "train-00000.jsonl", ["short"])
    assert measure(tmp_path, tokenizer) is None
