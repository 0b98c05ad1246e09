import json
from pathlib import Path

import pytest

from instar.errors import UserError
from instar.tokenizer.hf import Tokenizer, save_tokenizer
from instar.tokenizer.verbs import main, piece, texts_from


def test_train_encode_show(tmp_path, capsys):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat and the hat\n" * 9, encoding="utf-8")
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": "猫和帽子"}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    out = tmp_path / "tokenizer"
    argv = ["train", str(corpus), str(more), "--vocab-size", "270", "--out", str(out)]
    assert main(argv) == 0
    assert "270 tokens" in capsys.readouterr().out
    assert Tokenizer.load(out).vocab_size == 270

    assert main(["encode", str(out), "the [bold] 猫"]) == 0
    shown = capsys.readouterr().out
    assert "the" in shown
    assert "<E7>" in shown
    assert "16 bytes" not in shown  # "the [bold] " and three bytes of 猫: 14
    assert "14 bytes" in shown

    assert main(["show", str(out), "--file", str(corpus)]) == 0
    shown = capsys.readouterr().out
    assert "270 tokens" in shown
    assert "bytes per token" in shown


def test_control_tokens_are_plain_text_unless_asked_for(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the cat and the hat\n" * 9)
    out = tmp_path / "tokenizer"
    main(["train", str(tmp_path / "a.txt"), "--vocab-size", "270", "--out", str(out)])

    def ids(*options: str) -> list[int]:
        capsys.readouterr()
        main(["encode", str(out), "<|im_start|>the", *options])
        return [int(i) for i in capsys.readouterr().out.split("ids: ")[1].splitlines()[0].split()]

    tokenizer = Tokenizer.load(out)
    plain, special = ids(), ids("--special")
    assert tokenizer.decode(plain) == "<|im_start|>the" and len(plain) > 5
    assert special == [*tokenizer.encode("<|im_start|>", special=True), *tokenizer.encode("the")]
    assert len(special) < len(plain)


def test_a_corpus_too_small_for_the_vocabulary_says_so(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("ab")
    main(["train", str(tmp_path / "a.txt"), "--vocab-size", "999", "--out", str(tmp_path / "t")])
    assert "no more pairs" in capsys.readouterr().out


def test_training_needs_files(tmp_path):
    with pytest.raises(UserError, match="no files"):
        main(["train", "--out", str(tmp_path)])


def test_an_older_tokenizer_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    corpus, out = tmp_path / "a.txt", tmp_path / "t"
    corpus.write_text("the cat and the hat\n" * 9)
    argv = ["train", str(corpus), "--out", str(out), "--vocab-size"]
    main([*argv, "265"])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write, done = Path.write_text, []

    def full(path, *args, **options):
        if done:
            raise OSError(28, "No space left on device", str(path))
        done.append(path)
        return write(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        main([*argv, "270"])
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "t"]
    main([*argv, "270"])
    assert Tokenizer.load(out).vocab_size == 270


def test_nothing_but_a_tokenizer_is_replaced(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    with pytest.raises(UserError, match=r"holds 'a\.txt', which is no part of a tokenizer"):
        main(["train", str(tmp_path / "a.txt"), "--out", str(tmp_path)])
    assert (tmp_path / "a.txt").read_text() == "ab"


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    assert "instar tokenizer train corpus.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("gone.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("page.pdf", b"%PDF", "neither"),
        ("latin.txt", b"ok\ncaf\xe9 au lait", "latin.txt is not UTF-8 at byte 6"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "latin.jsonl, line 2 is not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"\n', "broken.jsonl, line 2"),
        ("other.jsonl", b'{"content": "a"}\n', "other.jsonl, line 1"),
        ("number.jsonl", b'{"text": 3}\n', "number.jsonl, line 1"),
        ("half.jsonl", b'{"text": "\\ud83d"}\n', "half.jsonl, line 1"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        list(texts_from(tmp_path / name))


def test_offsets_count_over_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("instar.tokenizer.verbs.BLOCK", 4)
    path = tmp_path / "a.txt"
    path.write_bytes("春\n".encode() * 5 + b"x\xff")
    with pytest.raises(UserError, match="at byte 21"):
        list(texts_from(path))
    path.write_bytes("春\r\n\n".encode() * 5)
    assert "".join(texts_from(path)) == "春\r\n\n" * 5


def test_pieces_for_the_eye():
    assert piece(b" a\n") == "␣a⏎"
    assert piece("春".encode()[:2]) == "<E6 98>"
    assert piece(b"") == "<control>"


def test_a_tokenizer_may_be_on_the_hub_or_that_of_an_adapters_base(tmp_path, monkeypatch, capsys):
    base, adapter, text = tmp_path / "base", tmp_path / "adapter", tmp_path / "a.txt"
    save_tokenizer(base, [], 64)
    adapter.mkdir()
    named = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    text.write_text("the cat")
    hub = {"owner/base": base, "owner/adapter": adapter}
    monkeypatch.setattr("instar.hub._fetched", hub.__getitem__)
    for name in ("owner/base", "owner/adapter", str(adapter)):
        assert main(["encode", name, "<|im_start|>", "--special"]) == 0
        assert "ids: 4" in capsys.readouterr().out
        assert main(["show", name]) == 0
        assert "262 tokens" in capsys.readouterr().out
        assert main(["compare", name, "--file", str(text), "--train-steps", "0"]) == 0
