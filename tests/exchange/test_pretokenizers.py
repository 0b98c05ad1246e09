"""Where words end: both ways, and in the forms that published tokenizers have."""

from __future__ import annotations

import json

import pytest
from tokenizers import Regex, pre_tokenizers

from instar.errors import UserError
from instar.exchange.pretokenizers import CUTS, QWEN2, cut_named, from_json, to_json
from instar.exchange.tokenizer_in import tokenizer_of
from instar.tokenizer.hf import word_bytes


def as_json(pre: pre_tokenizers.PreTokenizer) -> dict:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    return json.loads(tokenizer.to_str())["pre_tokenizer"]


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_goes_both_ways(name: str) -> None:
    cut = CUTS[name]
    assert from_json(to_json(cut), cut.whole_words) == name


def test_known_forms() -> None:
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert from_json(as_json(word_bytes()), False) == "qwen2"
    assert from_json(as_json(own), False) == "gpt-2"
    assert from_json(as_json(pre_tokenizers.Sequence([digits, own])), False) == "smollm"


@pytest.mark.parametrize(
    "pre",
    [
        pre_tokenizers.Whitespace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Split(Regex(QWEN2), behavior="removed"),
        pre_tokenizers.Split(Regex(r"\w+"), behavior="isolated"),
        pre_tokenizers.Digits(individual_digits=False),
    ],
)
def test_an_unknown_cut_is_refused(pre: pre_tokenizers.PreTokenizer) -> None:
    with pytest.raises(UserError, match="no pre-tokenizer that cuts"):
        from_json(as_json(pre), False)


def test_whole_words_make_a_difference() -> None:
    with pytest.raises(UserError):
        from_json(to_json(CUTS["qwen2"]), whole_words=True)


def test_other_names() -> None:
    assert cut_named("starcoder") == CUTS["smollm"]
    assert cut_named("") == CUTS["default"]
    with pytest.raises(UserError, match=r"'bloom'.*instar knows.*qwen2"):
        cut_named("bloom")


@pytest.mark.parametrize("name", ["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"])
def test_llama3_begins_every_text(name: str) -> None:
    """llama.cpp takes it for granted of these names; a file may say otherwise."""
    keys = {"model": "gpt2", "pre": name, "tokens": ["<b>", "a", "b", "ab"], "merges": ["a b"]}
    keys |= {"token_type": [3, 1, 1, 1], "bos_token_id": 0}

    def begins(**said: object) -> bool:
        metadata = {f"tokenizer.ggml.{key}": value for key, value in (keys | said).items()}
        return bool(tokenizer_of(metadata, 64).tokenizer["post_processor"])

    assert begins() and begins(add_bos_token=True) and not begins(add_bos_token=False)
    assert not begins(pre="qwen2") and not begins(pre="smaug-bpe")
