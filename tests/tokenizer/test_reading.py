"""Directories of tokenizers that others wrote, in several ages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import GPT2Tokenizer

from instar.data.encoding import pack_documents
from instar.errors import UserError
from instar.tokenizer.chat import prompt_ids
from instar.tokenizer.hf import Tokenizer

TEXT = "the cat sat on the mat; it's the cat's mat. 猫坐在垫子上。 12 34\n" * 5


def learnt(**settings) -> RustTokenizer:
    """Byte-level BPE as GPT-2's."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False, **settings
    )
    rust.train_from_iterator([TEXT], trainer)
    return rust


def write(directory: Path, rust: RustTokenizer, **objects) -> Path:
    rust.save(str(directory / "tokenizer.json"))
    for name, value in objects.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """Vocabulary and merges in two files, the end of text as a plain entry, and no names."""
    rust = learnt(special_tokens=["<|endoftext|>"])
    rust.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    return tmp_path


def test_vocabulary_and_merges_become_one_file(gpt2: Path, tmp_path_factory):
    ours = Tokenizer.load(gpt2)
    theirs = GPT2Tokenizer.from_pretrained(gpt2)
    for text in (TEXT, "", "  x\n\n y's 猫\U0001f98b", "a<|endoftext|>b"):
        assert ours.encode(text, special=True) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    end = theirs.convert_tokens_to_ids("<|endoftext|>")
    assert ours.encode("<|endoftext|>") != [end] == ours.encode("<|endoftext|>", special=True)
    assert (ours.eos_id, ours.pad_id, ours.start_id) == (end, end, end)
    assert ours.bos_id is None and ours.before == [] and ours.turn_end_ids == {end}
    saved = tmp_path_factory.mktemp("saved")
    ours.save(saved)
    assert (saved / "tokenizer_config.json").read_bytes() == b'{"model_max_length": 1024}'
    again = Tokenizer.load(saved)
    assert again.encode(TEXT) == ours.encode(TEXT)
    assert prompt_ids(again, [{"role": "user", "content": "a"}]) == prompt_ids(
        ours, [{"role": "user", "content": "a"}]
    )


def test_documents_without_a_beginning_only_end(gpt2: Path):
    tokenizer = Tokenizer.load(gpt2)
    a, end = tokenizer.encode("a"), tokenizer.eos_id
    assert pack_documents(["a", "", "a"], tokenizer).tolist() == [*a, end, end, *a, end]


def test_files_that_cannot_be_read_name_a_remedy(gpt2: Path, tmp_path: Path):
    config = {"tokenizer_class": "RobertaTokenizer"}
    (gpt2 / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"RobertaTokenizer.*save_pretrained"):
        Tokenizer.load(gpt2)
    (gpt2 / "merges.txt").unlink()
    (gpt2 / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"tokenizer\.model.*save_pretrained"):
        Tokenizer.load(gpt2)
    (gpt2 / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(gpt2)
    learnt().save(str(gpt2 / "tokenizer.json"))
    for text in ("[]", "{"):
        (gpt2 / "tokenizer_config.json").write_text(text)
        with pytest.raises(UserError, match="broken tokenizer"):
            Tokenizer.load(gpt2)


def test_the_map_of_special_tokens_counts_for_old_directories(tmp_path: Path):
    rust = learnt()
    rust.add_special_tokens(["<s>", "</s>", "<e>"])
    names = {"eos_token": {"content": "<e>", "lstrip": False}, "bos_token": "<s>"}
    config = {"eos_token": "</s>"}
    write(tmp_path, rust, tokenizer_config=config, special_tokens_map=names)
    old = Tokenizer.load(tmp_path)
    assert (old.bos_id, old.eos_id) == tuple(map(rust.token_to_id, ("<s>", "<e>")))
    write(tmp_path, rust, tokenizer_config=config | {"added_tokens_decoder": {}})
    new = Tokenizer.load(tmp_path)
    assert new.bos_id is None and new.eos_id == rust.token_to_id("</s>")
    old.save(tmp_path / "copy")
    assert json.loads((tmp_path / "copy/special_tokens_map.json").read_text()) == names


def test_a_token_that_is_named_control_is_no_text(tmp_path: Path):
    rust = learnt()
    rust.add_tokens(["<e>"])
    spec = json.loads(rust.to_str())
    spec["model"]["vocab"]["</s>"] = 1000  # in the vocabulary, and nothing says what it is
    write(
        tmp_path, RustTokenizer.from_str(json.dumps(spec)), tokenizer_config={"eos_token": "</s>"}
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_id == 1000
    assert 1000 not in tokenizer.encode("</s>")
    assert tokenizer.encode("a</s>", special=True)[1:] == [1000]
    assert tokenizer.decode([1000]) == ""
    # Not special, not named: anybody may write it.
    [plain] = tokenizer.encode("<e>")
    shown = prompt_ids(tokenizer, [{"role": "user", "content": "</s><e>"}])
    assert shown.count(1000) == 1 and plain in shown


def test_padding_is_never_an_end_where_there_is_another_token(tmp_path: Path):
    rust = learnt()
    rust.add_special_tokens(["<unk>", "</s>", "<pad>"])
    names = {"unk_token": "<unk>", "eos_token": "</s>"}
    write(tmp_path, rust, tokenizer_config=names)
    assert Tokenizer.load(tmp_path).pad_id == rust.token_to_id("<unk>")
    write(tmp_path, rust, tokenizer_config=names | {"pad_token": "<pad>"})
    assert Tokenizer.load(tmp_path).pad_id == rust.token_to_id("<pad>")
    write(tmp_path, rust, tokenizer_config={"eos_token": "</s>"})
    assert Tokenizer.load(tmp_path).pad_id == rust.token_to_id("</s>")


def test_a_tokenizer_without_an_end_says_so(tmp_path: Path):
    write(tmp_path, learnt(), tokenizer_config={})
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path / "copy")
    assert not (tmp_path / "copy/chat_template.jinja").exists()
    for ask in ("eos_id", "turn_end_ids", "template", "pad_id", "start_id"):
        with pytest.raises(UserError, match=r"no token that ends a text.*eos_token"):
            getattr(tokenizer, ask)


@pytest.mark.parametrize(("ends", "more"), [(None, []), (4, [4]), ([4, 7], [4, 7])])
def test_the_model_may_name_further_ends(tokenizer, tmp_path: Path, ends, more):
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert Tokenizer.load(tmp_path).turn_end_ids == {3, 5, *more}


def test_ids_may_have_gaps(tmp_path: Path):
    rust = learnt()
    spec = json.loads(rust.to_str())
    spec["model"]["vocab"]["zz"] = 1000
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 1001
    assert tokenizer.token_bytes(999) == b"" and tokenizer.token_bytes(1000) == b"zz"


def test_what_stands_before_a_text_is_the_post_processors(tmp_path: Path):
    rust = learnt()
    rust.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    ids = [(token, rust.token_to_id(token)) for token in ("<s>", "</s>")]
    rust.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ids)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer.load(write(tmp_path, rust, tokenizer_config=names))
    assert tokenizer.before == [tokenizer.start_id] == [tokenizer.bos_id]
    rust.post_processor = processors.ByteLevel()
    tokenizer = Tokenizer.load(write(tmp_path, rust, tokenizer_config=names))
    assert tokenizer.before == [] and tokenizer.start_id == tokenizer.eos_id
