import json
import random

import pytest

from instar.errors import UserError
from instar.evaluation.tokenizers import Sample as Doc
from instar.evaluation.tokenizers import documents_from, language_of, learnt, measured
from instar.tokenizer.bpe import train_bpe
from instar.tokenizer.hf import Tokenizer, save_tokenizer
from instar.tokenizer.verbs import main

draw = random.Random(0)
ENGLISH = [
    " ".join(draw.choices(["a", "heron", "waits", "in", "the", "reeds"], k=30)) for _ in range(60)
]
CHINESE = ["".join(draw.choices(["苍鹭", "站在", "芦苇", "里"], k=30)) for _ in range(60)]
DOCUMENTS = [Doc(t, language_of(t)) for pair in zip(ENGLISH, CHINESE, strict=True) for t in pair]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """One tokenizer without any merge, one that learned from the text."""
    root = tmp_path_factory.mktemp("tokenizers")
    save_tokenizer(root / "bytes", [], 64)
    save_tokenizer(root / "merged", train_bpe(ENGLISH + CHINESE, 300), 64)
    return root / "bytes", root / "merged"


def test_language_goes_by_the_script():
    assert [language_of(t) for t in ("heron", "苍鹭", "苍鹭 is a heron", "цапля", "12 + 3")] == [
        "en", "zh", "en", "other", "other"
    ]  # fmt: skip


def test_lines_of_a_language_become_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo 2\n苍鹭\n芦苇\nthree\n", encoding="utf-8")
    assert list(documents_from(path)) == [
        Doc("one\n\ntwo 2\n", "en"), Doc("苍鹭\n芦苇\n", "zh"), Doc("three\n", "en")
    ]  # fmt: skip


def test_a_records_own_language_is_believed(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "Reiher", "language": "de"}, {"text": "heron"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [d.language for d in documents_from(path)] == ["de", "en"]


def test_bytes_are_a_byte_a_token_and_merges_more(directories):
    plain, merged = (measured(Tokenizer.load(d), DOCUMENTS, 0, lambda: None) for d in directories)
    assert plain.bytes_per_token == {"en": 1.0, "zh": 1.0}
    assert plain.used == len(set("".join(ENGLISH + CHINESE).encode())) / 262
    assert plain.bits_per_byte == {}
    assert merged.tokens == 300
    assert min(merged.bytes_per_token.values()) > 2
    assert merged.errors == plain.errors == 0
    assert any(word in merged.longest[0] for word in ("heron", "苍鹭", "站在", "芦苇"))
    assert min(merged.batch_mb_s, merged.single_mb_s) > 0


def test_texts_that_do_not_come_back_are_counted(directories, monkeypatch):
    tokenizer = Tokenizer.load(directories[0])
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decode(ids).replace("reeds", "weeds"))
    errors = sum("reeds" in text for text in ENGLISH)
    assert measured(tokenizer, DOCUMENTS, 0, lambda: None).errors == errors > 0


def test_the_small_model_learns_and_reads_the_same_bytes(directories, monkeypatch):
    from instar.evaluation import tokenizers

    monkeypatch.setattr(tokenizers, "ROW_BYTES", 120)
    contexts, source = [], tokenizers.PackedSource

    def watched(stream, context, *args, **options):
        contexts.append(context)
        return source(stream, context, *args, **options)

    monkeypatch.setattr(tokenizers, "PackedSource", watched)
    found = [Tokenizer.load(directory) for directory in directories]
    steps = []
    short = learnt(found[1], DOCUMENTS, 1, lambda: None)
    long = learnt(found[1], DOCUMENTS, 60, lambda: steps.append(1))
    assert len(steps) == 60
    assert long["en"] < short["en"] / 2
    assert long["zh"] < short["zh"] / 2
    learnt(found[0], DOCUMENTS, 1, lambda: None)
    size = sum(len(d.text.encode()) for d in DOCUMENTS)
    per_token = size / sum(len(found[1].encode(d.text)) for d in DOCUMENTS)
    assert contexts[2] == pytest.approx(120, rel=0.05)
    assert contexts[1] * per_token == pytest.approx(120, rel=0.1)


def test_the_verb_prints_a_column_a_tokenizer(directories, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    path = tmp_path / "a.txt"
    path.write_text("\n".join(ENGLISH + CHINESE), encoding="utf-8")
    names = [str(d) for d in directories]
    assert main(["compare", *names, "--file", str(path), "--train-steps", "2"]) == 0
    shown = capsys.readouterr().out
    for word in (*names, "bytes a token, zh", "bits a byte, en", "MB/s, one by one", "262", "300"):
        assert word in shown
    assert main(["compare", *names, "--file", str(path), "--train-steps", "0"]) == 0
    assert "bits a byte" not in capsys.readouterr().out


def test_something_must_be_compared(directories, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="no tokenizer"):
        main(["compare", "--file", str(tmp_path / "a.jsonl")])
    with pytest.raises(UserError, match="no text in"):
        main(["compare", str(directories[0]), "--file", str(tmp_path / "a.jsonl")])
