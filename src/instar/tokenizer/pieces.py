"""SentencePiece beside ours: its BPE and its unigram model, in the same kind of directory.

The library ``sentencepiece`` (Kudo and Richardson 2018, arXiv:1808.06226) works on characters, not
on bytes: what is no piece of the vocabulary falls back to one token a byte. Its ``bpe`` merges
frequent pairs, like ours; its ``unigram`` (Kudo 2018, arXiv:1804.10959) begins with too many
pieces, drops the least useful ones, and cuts a text in the most probable way.

SentencePiece writes a space as ``▁`` and so cannot tell the two apart. Our ``tokenizer.json``
writes a space as a space, hence every text survives. For texts without a ``▁``, ids are those of
SentencePiece; only where two cuts of a unigram model are equally probable, rounding decides.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from instar.errors import UserError, installing
from instar.tokenizer.bpe import SPECIAL_TOKENS
from instar.tokenizer.hf import byte_piece, write_directory

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

Model = Literal["bpe", "unigram"]

SPACE = "▁"
"""How SentencePiece writes a space."""

COVERAGE = 0.9995
"""Share of the text's characters that get a piece of their own (SentencePiece's own default)."""

LONGEST = 4000
"""Characters of a line that are given to the library at once; it takes no more than 65,535."""

NEVER = -1000.0
"""Log-probability of pieces that plain text must not become, such as ``<eos>``: far below the sum
of the pieces of its characters."""

_BYTES = [byte_piece(byte) for byte in range(256)]
SPELLED = "".join(sorted(set("".join([*SPECIAL_TOKENS, *_BYTES]))))
"""Characters that always are pieces, so that ``<eos>`` in a text can be spelled out."""

SMALLEST = len(SPECIAL_TOKENS) + len(_BYTES) + 2 * len(SPELLED)
"""The smallest vocabulary: control tokens, bytes, and room for some pieces."""


def train_pieces(texts: Sequence[str], vocab_size: int, model: Model) -> bytes:
    """Let SentencePiece learn a vocabulary from text.

    Nothing is normalised, digits stay apart, no space is put before a text. Pieces end where a
    line does, so a line break is always the token of its byte.

    Args:
        texts: The corpus; read twice.
        vocab_size: Tokens in all: 6 for control, 256 bytes, and the pieces. A small corpus may
            give fewer.
        model: How pieces are found and texts are cut.

    Returns:
        The content of a ``tokenizer.model``, which the library can read.

    Raises:
        UserError: The library is missing, ``vocab_size`` is too small, or there is no text.
    """
    if vocab_size < SMALLEST:
        raise UserError(
            f"vocab_size is {vocab_size}", f"Make it at least {SMALLEST} for SentencePiece."
        )
    trainer = _library().SentencePieceTrainer
    rare = _rare(texts, (vocab_size - len(SPECIAL_TOKENS) - len(_BYTES)) // 2)
    written = io.BytesIO()
    settings: dict[str, Any] = {}
    for id, name in enumerate(("pad", "unk", "bos", "eos")):
        settings |= {f"{name}_id": id, f"{name}_piece": SPECIAL_TOKENS[id]}
    try:
        trainer.train(
            sentence_iterator=_lines(texts, rare),
            model_writer=written,
            model_type=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,  # what is not to be covered has been cut out
            required_chars=SPELLED,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=4 * LONGEST,
            control_symbols=SPECIAL_TOKENS[4:],
            minloglevel=2,
            **settings,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"SentencePiece could not learn from this text ({error})",
            "Give more text, or another vocab_size.",
        ) from error
    return written.getvalue()


def _library():
    try:
        import sentencepiece
    except ImportError:
        raise UserError("sentencepiece is not installed", installing("corpus")) from None
    return sentencepiece


def _rare(texts: Sequence[str], room: int) -> set[str]:
    """Characters that get no piece: the rarest, and the line's end."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    if not counts:
        raise UserError("there is no text to learn from", "Name files that hold some.")
    enough, covered, kept = COVERAGE * counts.total(), 0, set[str]()
    # By frequency, then by code point, so that the outcome depends on nothing but the text.
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= enough or len(kept) == room:
            break
        covered += count
        kept.add(character)
    return counts.keys() - kept | {"\n"}


def _lines(texts: Sequence[str], rare: set[str]) -> Iterator[str]:
    """The stretches between rare characters, none longer than ``LONGEST``."""
    table = str.maketrans(dict.fromkeys(rare, "\n"))
    for text in texts:
        for line in text.translate(table).split("\n"):
            for at in range(0, len(line), LONGEST):
                yield line[at : at + LONGEST]


def save_pieces(directory: str | Path, trained: bytes, model: Model, max_length: int) -> int:
    """Write what ``train_pieces`` returned as a tokenizer directory.

    Args:
        directory: Created if absent.
        trained: What it returned.
        model: Which of the two it is.
        max_length: The longest input of the model to come, in tokens.

    Returns:
        How many tokens there are.
    """
    learnt = _library().SentencePieceProcessor(model_proto=trained)
    core = _merging(learnt) if model == "bpe" else _weighing(learnt)
    rust = RustTokenizer(core)
    # No piece holds a space behind anything but spaces, so a cut before them changes no id; and
    # none holds a line break.
    rust.pre_tokenizer = pre_tokenizers.Split(Regex(r" +[^ \n]*|\n+"), behavior="isolated")
    rust.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    rust.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    write_directory(directory, rust, max_length)
    return learnt.piece_size()


def _piece(learnt: SentencePieceProcessor, id: int) -> str:
    return learnt.id_to_piece(id).replace(SPACE, " ")


def _merging(learnt: SentencePieceProcessor) -> models.BPE:
    """The BPE model: a piece may come from any two pieces that make it up, earlier ones first."""
    vocab = {_piece(learnt, id): id for id in range(learnt.piece_size())}
    plain = {
        piece: id
        for piece, id in vocab.items()
        if not (learnt.is_control(id) or learnt.is_byte(id) or learnt.is_unknown(id))
    }
    merges = [
        (piece[:at], piece[at:])
        for piece in sorted(plain, key=lambda piece: -learnt.get_score(plain[piece]))
        for at in range(1, len(piece))
        if piece[:at] in plain and piece[at:] in plain
    ]
    return models.BPE(vocab, merges, unk_token=SPECIAL_TOKENS[1], byte_fallback=True)


def _weighing(learnt: SentencePieceProcessor) -> models.Unigram:
    """The unigram model: pieces and their log-probabilities."""
    scores = []
    for id in range(learnt.piece_size()):
        hidden = learnt.is_control(id) or learnt.is_byte(id) or learnt.is_unknown(id)
        scores.append((_piece(learnt, id), NEVER if hidden else learnt.get_score(id)))
    return models.Unigram(scores, unk_id=1, byte_fallback=True)
