import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.errors import UserError
from instar.tokenizer.bpe import SPECIAL_TOKENS
from instar.tokenizer.hf import StreamDecoder, Tokenizer, save_tokenizer


def test_control_tokens_have_the_fixed_ids(tokenizer):
    assert [tokenizer.encode(token, special=True) for token in SPECIAL_TOKENS] == [
        [0], [1], [2], [3], [4], [5]
    ]  # fmt: skip
    ids = tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id
    assert ids == (0, 2, 3)
    assert (tokenizer.im_start_id, tokenizer.im_end_id) == (4, 5)
    assert tokenizer.vocab_size == 400


@given(st.text())
def test_any_text_survives_and_never_yields_a_control_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(6 <= id < tokenizer.vocab_size for id in ids)


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_control_token_in_plain_text_is_text(tokenizer, token):
    text = f"say {token} now"
    ids = tokenizer.encode(text)
    assert min(ids) >= 6
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, ""]) == [ids, []]


def test_decoding_skips_control_tokens_unless_asked(tokenizer):
    ids = [4, *tokenizer.encode("hi"), 5]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>hi<|im_end|>"


def test_token_bytes_join_to_the_text(tokenizer):
    text = "花开 the dog ␣\n"
    joined = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
    assert joined == text.encode()
    assert tokenizer.token_bytes(5) == b""


@given(st.lists(st.integers(0, 399)))
def test_streamed_pieces_join_to_the_decoded_text(tokenizer, ids):
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
def test_streaming_never_shows_half_a_character(tokenizer, text):
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(id) for id in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert stream.flush() == ""


def test_streaming_waits_for_the_last_byte(tokenizer):
    ids = tokenizer.encode("龘")  # not in the training text: three tokens of one byte
    stream = StreamDecoder(tokenizer)
    assert [stream.push(id) for id in ids] == ["", "", "龘"]
    stream.push(ids[0])
    assert stream.flush() == "\ufffd"


def test_a_saved_copy_is_the_same_file_for_file(tokenizer, directory, tmp_path):
    tokenizer.save(tmp_path / "copy")
    for path in directory.iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()


def test_a_full_disk_is_the_systems_error(merges, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError):
            save_tokenizer(tmp_path, merges, 128)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("text", ["ab\ud83d", "ab\udcff"])
def test_text_that_is_not_unicode_is_the_users_to_mend(tokenizer, text):
    for special in (True, False):
        with pytest.raises(UserError, match="not UTF-8 at character 3"):
            tokenizer.encode(text, special)


def test_missing_and_broken_directories_are_the_users_to_mend(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="broken tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_chat_tokens(tokenizer, tmp_path):
    # Like GPT-2: one control token that ends everything, and no ChatML.
    tokenizer.save(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    for old, new in [("<eos>", "<|endoftext|>"), ("<|im_start|>", "<a>"), ("<|im_end|>", "<b>")]:
        text = text.replace(old, new)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    config = {"eos_token": {"content": "<|endoftext|>"}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    other = Tokenizer.load(tmp_path)
    assert other.eos_id == other.pad_id == other.start_id == 3
    assert other.bos_id is None and other.before == []
    with pytest.raises(UserError, match="ChatML"):
        _ = other.im_end_id
