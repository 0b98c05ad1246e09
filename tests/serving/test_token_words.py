"""Tokens and their places in the text, as ``/v1/completions`` tells them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instar.serving.token_words import TextTokens
from instar.tokenizer.hf import Tokenizer

BYTES = st.sampled_from([*"春a🙂".encode(), 0xFF, 0xC3])


@pytest.fixture(scope="module")
def tokenizer(runs: Path) -> Tokenizer:
    return Tokenizer.load(runs / "sft")


@given(st.lists(BYTES, max_size=12), st.integers(1, 5))
@settings(deadline=None)
def test_every_token_stands_where_it_is_said_to(
    tokenizer: Tokenizer, content: list[int], size: int
) -> None:
    of_byte = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size)}
    ids = [tokenizer.eos_id, *(of_byte[bytes([byte])] for byte in content)]
    words = TextTokens(tokenizer, frozenset(), at=0)
    tokens, offsets = list[str](), list[int]()
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        told = words.push(part, [0.0] * len(part), [])
        tokens += told["tokens"]
        offsets += told["text_offset"]
    text = tokenizer.decode(ids)
    assert len(tokens) == len(ids) and offsets == sorted(offsets)
    for token, offset, byte in zip(tokens[1:], offsets[1:], content, strict=True):
        if byte < 0x80:
            assert token == text[offset] == chr(byte)
        else:
            assert token == f"bytes:\\x{byte:02x}"
            assert offset < len(text) and not text[offset].isascii()
    # A control token is no part of the text.
    assert offsets[0] == 0
    assert all(b - a <= 4 for a, b in itertools.pairwise(offsets))
