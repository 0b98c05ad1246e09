"""Which trainer learns a tokenizer: our own, the Rust library for long texts, or SentencePiece."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, trainers

from instar.tokenizer.bpe import FIRST_MERGE, SPECIAL_TOKENS, Merges, check_size, train_bpe
from instar.tokenizer.hf import BYTE_OF_CHAR, save_tokenizer, word_bytes
from instar.tokenizer.pieces import Model, save_pieces, train_pieces

Kind = Literal["bpe", "sentencepiece-bpe", "sentencepiece-unigram"]
"""How a vocabulary is learned: byte pairs by ourselves, or one of SentencePiece's models."""

_MODELS: dict[Kind, Model] = {"sentencepiece-bpe": "bpe", "sentencepiece-unigram": "unigram"}

OWN_TRAINER_UP_TO = 64_000_000
"""Bytes of text up to which our own trainer learns the merges; that takes it about a minute."""

OnStep = Callable[[int, int], None]
Note = Callable[[str], None]


def learn_tokenizer(
    directory: Path,
    texts: Iterable[str],
    kind: Kind,
    vocab_size: int,
    max_length: int,
    progress: OnStep,
    note: Note,
) -> int:
    """Learn a vocabulary from text and write the tokenizer's directory.

    Args:
        directory: Created if absent.
        texts: The corpus.
        kind: How to learn.
        vocab_size: Tokens wanted in all; a small corpus may give fewer.
        max_length: The longest input of the model to come, in tokens; only noted down.
        progress: Called with the vocabulary's size now and at the end, where that is known.
        note: Called with a line that says who learns.

    Returns:
        How many tokens there are.

    Raises:
        UserError: The vocabulary is too small, or SentencePiece is asked for and missing.
    """
    if kind == "bpe":
        merges = learn_merges(texts, vocab_size, progress, note)
        save_tokenizer(directory, merges, max_length)
        return FIRST_MERGE + len(merges)
    note(f"sentencepiece learns a {_MODELS[kind]} model")
    trained = train_pieces(list(texts), vocab_size, _MODELS[kind])
    return save_pieces(directory, trained, _MODELS[kind], max_length)


def learn_merges(texts: Iterable[str], vocab_size: int, progress: OnStep, note: Note) -> Merges:
    """Byte-pair merges of a text of any length; both trainers find the same ones.

    Args:
        texts: The corpus; no more than ``OWN_TRAINER_UP_TO`` bytes of it are held in memory.
        vocab_size: As for ``train_bpe``.
        progress: Called by our own trainer.
        note: Called with a line if the Rust library takes over.
    """
    check_size(vocab_size)
    texts, held, size = iter(texts), list[str](), 0
    for text in texts:
        held.append(text)
        size += len(text.encode())
        if size > OWN_TRAINER_UP_TO:
            limit = f"{OWN_TRAINER_UP_TO / 1e6:,.0f} MB"
            note(f"more than {limit} of text: the Rust library learns (the same merges, sooner)")
            return train_with_rust(chain(held, texts), vocab_size)
    return train_bpe(held, vocab_size, progress)


def train_with_rust(texts: Iterable[str], vocab_size: int) -> Merges:
    """What ``train_bpe`` returns, by the library ``tokenizers`` on all cores.

    Args:
        texts: The corpus; only its distinct words are kept.
        vocab_size: As for ``train_bpe``.
    """
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = word_bytes()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(texts, trainer)

    def read(token: str) -> bytes:
        return bytes(BYTE_OF_CHAR[char] for char in token)

    return [(read(a), read(b)) for a, b in json.loads(rust.to_str())["model"]["merges"]]
