import builtins
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.errors import UserError
from instar.tokenizer.bpe import SPECIAL_TOKENS
from instar.tokenizer.chat import render
from instar.tokenizer.hf import StreamDecoder, Tokenizer
from instar.tokenizer.pieces import SMALLEST, save_pieces, train_pieces

sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is an extra")

DATA = Path(__file__).parents[2].parent / "shared" / "data"
TEXTS = [
    "The miller opens the gate, and the water turns the wheel.\n    The wheel turns the stone.\n"
    * 4,
    "磨坊主人打开水闸，水推动轮子，轮子带动磨盘。\n春天水多，磨坊日夜不停。\n" * 4,
    "for i in range(12):\n        total += 3 * i  # a + b\n\n\tdone\r\n" * 3,
]
TRICKY = ["▁", "▁▁ a", "<0x0A>", "<0x41>é<pad>", "".join(SPECIAL_TOKENS), "\n\n \n", "\x00\x1f", ""]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request, tmp_path_factory):
    """The library's own processor, and our tokenizer, of the same model."""
    model = train_pieces(TEXTS, 420, request.param)
    directory = tmp_path_factory.mktemp(request.param)
    size = save_pieces(directory, model, request.param, 64)
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.vocab_size == size <= 420
    return sentencepiece.SentencePieceProcessor(model_proto=model), tokenizer, directory


def test_control_tokens_have_the_fixed_ids(trained):
    theirs, ours, _ = trained
    for id, token in enumerate(SPECIAL_TOKENS):
        assert ours.encode(token, special=True) == [id]
        assert theirs.id_to_piece(id) == token
        assert ours.token_bytes(id) == b""
    assert (ours.pad_id, ours.bos_id, ours.eos_id, ours.im_end_id) == (0, 2, 3, 5)


TEXT = st.one_of(
    st.text(), st.lists(st.sampled_from([*TRICKY, *TEXTS[1], " ", "the"])).map("".join)
)


@given(TEXT)
def test_any_text_survives_and_never_yields_a_control_token(trained, text):
    _, ours, _ = trained
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert all(id >= len(SPECIAL_TOKENS) for id in ids)
    assert b"".join(map(ours.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize("text", [*TRICKY, "🦋 龘", " " * 50, "12345 67"])
def test_what_looks_like_a_token_is_text(trained, text):
    _, ours, _ = trained
    assert ours.decode(ours.encode(text)) == text


def test_digits_and_line_breaks_stand_alone(trained):
    _, ours, _ = trained
    for text in ("407", "\n\n\n"):
        assert [ours.token_bytes(id) for id in ours.encode(text)] == [c.encode() for c in text]


@given(st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
def test_ids_equal_the_librarys(trained, text):
    theirs, ours, _ = trained
    assert ours.encode(text) == theirs.encode(text)


def test_ids_of_the_training_text_equal_the_librarys(trained):
    theirs, ours, _ = trained
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert len(ids) < len(text) * 0.9  # it has learned something


def real_lines(name):
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not in the shared data folder beside the repository")
    rows = json.loads((DATA / name).read_text(encoding="utf-8"))[:400]
    texts = [row["instruction"] + row["input"] + row["output"] for row in rows]
    return [line for text in texts for line in text.splitlines(keepends=True) if "▁" not in line]


REAL = pytest.mark.parametrize("name", ["chat/alpaca_zh_demo.json", "chat/instruction_en.json"])


@REAL
def test_merged_ids_equal_the_librarys_on_real_text(name, tmp_path):
    lines = real_lines(name)
    proto = train_pieces(lines, 2048, "bpe")
    save_pieces(tmp_path, proto, "bpe", 64)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert Tokenizer.load(tmp_path).encode_batch(lines) == theirs.encode(lines)


@REAL
def test_unigram_ids_differ_from_the_librarys_by_ties_only(name, tmp_path):
    # A run of dashes may be cut as --- - or as - ---: equally probable. Which one is found is
    # a matter of rounding, and the library adds up in float32.
    lines = real_lines(name)
    proto = train_pieces(lines, 2048, "unigram")
    save_pieces(tmp_path, proto, "unigram", 64)
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=proto), Tokenizer.load(tmp_path)
    differ = 0
    for line, ids in zip(lines, ours.encode_batch(lines), strict=True):
        expected = theirs.encode(line)
        if ids != expected:
            differ += 1
            sums = [math.fsum(map(theirs.get_score, cut)) for cut in (ids, expected)]
            assert sums[0] == pytest.approx(sums[1], rel=1e-6), line
            assert ours.decode(ids) == line
    assert differ < len(lines) / 100


@given(st.lists(st.integers(0, 400)))
def test_streamed_pieces_join_to_the_decoded_text(trained, ids):
    _, ours, _ = trained
    ids = [id for id in ids if id < ours.vocab_size]
    stream = StreamDecoder(ours)
    assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)


def test_decoding_shows_control_tokens_if_asked(trained):
    _, ours, _ = trained
    ids = [4, *ours.encode("the 龘"), 5]
    assert ours.decode(ids) == "the 龘"
    assert ours.decode(ids, skip_special=False) == "<|im_start|>the 龘<|im_end|>"


def test_transformers_opens_it_and_renders_chats_alike(trained):
    transformers = pytest.importorskip("transformers")
    _, ours, directory = trained
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for text in (*TEXTS, *TRICKY):
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    messages = [
        {"role": "user", "content": "  \n(the wheel?)\n"},
        {"role": "assistant", "content": " (it turns)\n\n* and * turns "},
    ]
    reference = theirs.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    rendered = render(ours, messages)
    assert rendered.ids == reference["input_ids"]
    assert [int(m) for m in rendered.assistant_mask] == reference["assistant_masks"]
    prompt = render(ours, messages[:1], add_generation_prompt=True).ids
    assert rendered.ids[: len(prompt)] == prompt


def test_rare_characters_leave_room_for_pieces(tmp_path):
    many = "".join(chr(0x4E00 + i) for i in range(3000))
    proto = train_pieces(["水车水车水车 the wheel the wheel " * 200 + many], 400, "bpe")
    save_pieces(tmp_path, proto, "bpe", 64)
    tokenizer = Tokenizer.load(tmp_path)
    assert len(tokenizer.encode("水车")) == 1
    assert tokenizer.decode(tokenizer.encode(many)) == many


def test_learning_twice_gives_the_same():
    assert train_pieces(TEXTS, 420, "unigram") == train_pieces(TEXTS, 420, "unigram")


def test_mistakes_are_the_users_to_mend(monkeypatch):
    with pytest.raises(UserError, match="vocab_size is 300"):
        train_pieces(TEXTS, 300, "bpe")
    for nothing in ([], [""]):
        with pytest.raises(UserError, match="no text"):
            train_pieces(nothing, SMALLEST, "bpe")
    real = builtins.__import__

    def without(name, *args, **options):
        if name == "sentencepiece":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install -e '\.\[corpus\]'"):
        train_pieces(TEXTS, 420, "bpe")
