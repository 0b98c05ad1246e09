"""SentencePiece's tokenizers, in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from instar.errors import UserError
from instar.exchange.tokenizer_in import tokenizer_of
from instar.exchange.tokenizer_out import vocabulary_of
from instar.tokenizer.hf import Tokenizer
from instar.tokenizer.pieces import save_pieces, train_pieces

sentencepiece = pytest.importorskip("sentencepiece")
TEXTS = [
    "A ferry crossed the wide river; the ferryman's dog didn't bark. They're home again.\n" * 9,
    "渡船过河，河水宽宽。船夫的狗不叫，天黑以前他们回到了家。\n" * 9,
]


@pytest.fixture(scope="module")
def trained() -> bytes:
    return train_pieces(TEXTS, 500, "bpe")


def metadata(vocabulary: Any) -> dict[str, Any]:
    """The keys of a GGUF file that holds this vocabulary."""
    keys = vocabulary.keys | {"tokens": vocabulary.tokens, "token_type": vocabulary.types}
    return {f"tokenizer.ggml.{k}": v for k, v in (keys | {"scores": vocabulary.scores}).items()}


def write(directory: Path, files: Any) -> Tokenizer:
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(files.tokenizer), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(files.config), encoding="utf-8")
    return Tokenizer.load(directory)


def test_our_pieces_go_out_and_in(trained: bytes, strings: list[str], tmp_path: Path) -> None:
    size = save_pieces(tmp_path / "ours", trained, "bpe", 64)
    vocabulary = vocabulary_of(tmp_path / "ours", size)
    assert vocabulary.keys["model"] == "llama" and not vocabulary.keys["add_space_prefix"]
    back = write(tmp_path / "back", tokenizer_of(metadata(vocabulary), 64))
    ours = Tokenizer.load(tmp_path / "ours")
    for text in strings:
        assert back.encode(text) == ours.encode(text)


def test_llamas_pieces_come_in(strings: list[str], tmp_path: Path) -> None:
    """A vocabulary as Llama's, with a space put first, gives SentencePiece's own ids."""
    import io

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(TEXTS).splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    learnt = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(learnt.piece_size())
    kinds = [
        2 if learnt.is_unknown(i) else 3 if learnt.is_control(i) else 6 if learnt.is_byte(i) else 1
        for i in ids
    ]
    keys = {
        "model": "llama",
        "tokens": [learnt.id_to_piece(i) for i in ids],
        "scores": [learnt.get_score(i) for i in ids],
        "token_type": kinds,
        "bos_token_id": learnt.bos_id(),
    }
    files = tokenizer_of({f"tokenizer.ggml.{key}": value for key, value in keys.items()}, 64)
    tokenizer = write(tmp_path / "llama", files)
    for text in strings:
        if "▁" not in text:
            assert tokenizer.encode(text) == learnt.encode(text), text
    assert files.tokenizer["post_processor"]["single"][0]["SpecialToken"]["id"] == "<s>"
    again = vocabulary_of(tmp_path / "llama", learnt.piece_size())
    assert again.keys["add_bos_token"] and again.keys["add_space_prefix"]
    assert again.tokens == keys["tokens"] and again.types == kinds


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    size = save_pieces(tmp_path, train_pieces(TEXTS, 400, "unigram"), "unigram", 64)
    with pytest.raises(UserError, match="is Unigram, not BPE"):
        vocabulary_of(tmp_path, size)


def changed(directory: Path, change: Any) -> None:
    path = directory / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    change(whole)
    path.write_text(json.dumps(whole), encoding="utf-8")


def test_merges_that_llama_cpp_has_not(trained: bytes, tmp_path: Path) -> None:
    size = save_pieces(tmp_path, trained, "bpe", 64)

    def drop(whole: dict[str, Any]) -> None:
        merges = whole["model"]["merges"]
        pieces = ["".join(pair) for pair in merges]
        merges.pop(next(i for i, piece in enumerate(pieces) if pieces.count(piece) > 1))

    changed(tmp_path, drop)
    with pytest.raises(UserError, match="does not merge"):
        vocabulary_of(tmp_path, size)


def test_switches_that_llama_cpp_has_not(trained: bytes, tmp_path: Path) -> None:
    size = save_pieces(tmp_path, trained, "bpe", 64)
    changed(tmp_path, lambda whole: whole["added_tokens"][5].update(lstrip=True))
    with pytest.raises(UserError, match=r"'<\|im_end\|>' has the switch lstrip"):
        vocabulary_of(tmp_path, size)


def test_fewer_rows_than_tokens(trained: bytes, tmp_path: Path) -> None:
    size = save_pieces(tmp_path, trained, "bpe", 64)
    with pytest.raises(UserError, match="do not belong together"):
        vocabulary_of(tmp_path, size - 1)
