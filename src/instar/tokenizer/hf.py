"""The tokenizer as the ecosystem knows it: a directory with ``tokenizer.json``.

Our own code learns the merges; the Rust library ``tokenizers`` applies them, for speed. This file
stands between the two.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Encoding, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from instar.errors import UserError
from instar.tokenizer.bpe import BYTE_ORDER, PATTERN, SPECIAL_TOKENS, Merges, vocabulary
from instar.tokenizer.chat import CHAT_TEMPLATE, plain_template
from instar.tokenizer.guard import control_tokens_of
from instar.tokenizer.reading import chat_template, control_names, generation_ends, read_files
from instar.tokenizer.turns import Turns

# The byte-level alphabet: JSON holds text, so each byte is written as one visible character.
# Printable bytes stand for themselves; the others (controls, space, ...) are numbered from 256.
CHAR_OF_BYTE = {
    byte: chr(byte) if i < 188 else chr(256 + i - 188) for i, byte in enumerate(BYTE_ORDER)
}
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}


def byte_piece(byte: int) -> str:
    """How a vocabulary of characters writes the token of a single byte."""
    return f"<0x{byte:02X}>"


BYTE_OF_PIECE = {byte_piece(byte): bytes([byte]) for byte in range(256)}

TEXTS_AT_ONCE = 1024
"""Texts that ``encode_batch`` hands to the library at once: enough to keep every core busy."""

DOCUMENT_ENDS = ("<eos>", "<|endoftext|>", "<|end_of_text|>")
"""Control tokens that end a document, also where ``eos_token`` names one that ends a turn."""


def save_tokenizer(directory: str | Path, merges: Merges, max_length: int) -> None:
    """Write a tokenizer directory that transformers, and everything built on it, can open.

    Args:
        directory: Created if absent.
        merges: What ``train_bpe`` returned.
        max_length: The longest input of the model, in tokens.
    """

    def written(token: bytes) -> str:
        return "".join(CHAR_OF_BYTE[byte] for byte in token)

    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    vocab |= {written(token): i for token, i in vocabulary(merges).items()}
    rust = RustTokenizer(models.BPE(vocab, [(written(a), written(b)) for a, b in merges]))
    rust.pre_tokenizer = word_bytes()
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    write_directory(directory, rust, max_length)


def word_bytes() -> pre_tokenizers.PreTokenizer:
    """Cuts text into the words of ``PATTERN``, and writes their bytes in the visible alphabet."""
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_bytes])


def write_directory(directory: str | Path, rust: RustTokenizer, max_length: int) -> None:
    """Write any tokenizer of the library, with our control tokens and chat format.

    Args:
        directory: Created if absent.
        rust: The tokenizer; it holds ``SPECIAL_TOKENS``.
        max_length: The longest input of the model, in tokens.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        # Without this line transformers guesses the class from the model type, and the class it
        # guesses brings a pre-tokenizer of its own: other ids, and no warning.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    # Written from Python, where a full disk is an OSError; the Rust library raises bare Exception.
    (directory / "tokenizer.json").write_text(rust.to_str(pretty=True), encoding="utf-8")
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


class Tokenizer:
    """Text to token ids and back. Made by ``Tokenizer.load``.

    Holds its files in memory, so that every later checkpoint can carry them along.
    """

    def __init__(self, files: dict[str, bytes], ends: Sequence[int] = ()) -> None:
        """Make one of what a directory held.

        Args:
            files: Content of its files by their names.
            ends: Ids that end generation, besides those that the files name.
        """
        text = files["tokenizer.json"].decode()
        self._files = files
        self._ends = frozenset(ends)
        # Two instances, because reading control tokens is a switch on the instance: one knows
        # them, the other takes them for plain text.
        self._special = RustTokenizer.from_str(text)
        self._plain = RustTokenizer.from_str(text)
        self._plain.encode_special_tokens = True
        for rust in (self._special, self._plain):
            rust.no_truncation()
            rust.no_padding()
        self._bytes: dict[int, bytes] = {}
        self._names = control_names(files)
        self._name_controls()
        self._template = chat_template(files)

    def _name_controls(self) -> None:
        """What the files call a control token is one, even if ``tokenizer.json`` has it as text."""
        known = {token.content for token in self._added.values()}
        named = dict.fromkeys(self._names.values())
        missing = [n for n in named if n not in known and self._special.token_to_id(n) is not None]
        if missing:
            for rust in (self._special, self._plain):
                rust.add_special_tokens([AddedToken(n, special=True) for n in missing])
            del self._added

    @cached_property
    def template(self) -> str:
        """The Jinja template of a conversation, the tokenizer's own if it has one.

        Otherwise it is ChatML where its tokens exist, and words for roles where they do not.

        Raises:
            UserError: There is neither a template nor a token that ends a text.
        """
        if self._template is not None:
            return self._template
        controls = {token.content for token in self._controls.values()}
        if {"<|im_start|>", "<|im_end|>"} <= controls:
            return CHAT_TEMPLATE
        before = "".join(self._controls[id].content for id in self.before)
        return plain_template(before, self._controls[self.eos_id].content)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read a tokenizer directory, ours or anybody's that holds a ``tokenizer.json``.

        GPT-2's ``vocab.json`` with ``merges.txt`` will do, too.

        Raises:
            UserError: A file is missing, or cannot be understood.
        """
        directory = Path(directory)
        try:
            return cls(read_files(directory), generation_ends(directory))
        except UserError:
            raise
        except Exception as error:  # the Rust library raises bare Exception
            raise UserError(
                f"{directory} holds a broken tokenizer ({error})", "Save or download it again."
            ) from error

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files, byte for byte as they were read.

        A chat template is added where there was none, so that others render as we do.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files = dict(self._files)
        if self._template is None and self._document_end is not None:
            files["chat_template.jinja"] = self.template.encode()
        for name, content in files.items():
            (directory / name).write_bytes(content)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of ``text``; nothing is added at its ends.

        Args:
            text: Any text.
            special: Read ``<|im_end|>`` and its like as control tokens. Leave it off for text
                that a user wrote.

        Raises:
            UserError: ``text`` is not Unicode; it came from a prompt that is not UTF-8.
        """
        rust = self._special if special else self._plain
        try:
            return rust.encode(text, add_special_tokens=False).ids
        except TypeError:  # what the Rust library says of half a surrogate pair
            bad = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
            if bad is None:
                raise
            raise UserError(
                f"the text is not UTF-8 at character {text.index(bad) + 1}",
                "Write it in UTF-8 (see `locale`), and in JSON both halves of \\ud83d\\ude00.",
            ) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, encoded in parallel as plain text.

        Some at a time: the library notes every token's place in its text, dozens of bytes each.
        """
        starts = range(0, len(texts), TEXTS_AT_ONCE)
        batches = (self.encodings(texts[at : at + TEXTS_AT_ONCE]) for at in starts)
        return [encoding.ids for batch in batches for encoding in batch]

    def encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """What ``encode_batch`` is made from: each has a length, and its ``ids`` when asked."""
        return self._plain.encode_batch_fast(list(texts), add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        if self._is_byte_level:
            return self._special.decode(list(ids), skip_special_tokens=skip_special)
        # The library's decoder for pieces also gives up the whole characters beside broken ones.
        parts = [self._content(id, not skip_special) for id in ids]
        return b"".join(parts).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token stands for; none for a control token."""
        if id not in self._bytes:
            self._bytes[id] = self._content(id, with_special=False)
        return self._bytes[id]

    def _content(self, id: int, with_special: bool) -> bytes:
        """The bytes of a token: one a character, or else a piece of text or ``<0x0A>``."""
        added = self._added.get(id)
        if added is not None:
            return added.content.encode() if with_special or not added.special else b""
        token = self._special.id_to_token(id) or ""
        if self._is_byte_level:
            return bytes(BYTE_OF_CHAR[char] for char in token)
        return BYTE_OF_PIECE.get(token) or token.replace(*self._space).encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in str(self._special.decoder)  # it may stand in a sequence

    @cached_property
    def _space(self) -> tuple[str, str]:
        """How a piece writes a space: as ``▁`` where the decoder puts it back, else as itself."""
        return ("▁", " ") if "▁" in str(self._special.decoder) else (" ", " ")

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self._special.get_added_tokens_decoder()

    @cached_property
    def _controls(self) -> dict[int, AddedToken]:
        return control_tokens_of(self._special)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, control tokens included."""
        return self._size

    @cached_property
    def _size(self) -> int:
        return max(self._special.get_vocab().values(), default=-1) + 1

    def _id(self, *names: str) -> int | None:
        """The id of the first name that the files give a token to, or that is a control token."""
        for name in names:
            id = self._special.token_to_id(self._names.get(name, name))
            if id in self._controls:
                return id
        return None

    @cached_property
    def pad_id(self) -> int:
        """Fills the right end of short rows; the model never learns from it.

        Without a token of its own it is one that ends nothing, if there is any.
        """
        id = self._id("pad_token", "unk_token")
        return self.eos_id if id is None else id

    @cached_property
    def bos_id(self) -> int | None:
        """Begins a document; None where the tokenizer has no such token.

        Some models with a ChatML template name ``<|im_start|>``, which only opens turns.
        """
        id = self._id("bos_token")
        return None if id == self._id("<|im_start|>") else id

    @cached_property
    def eos_id(self) -> int:
        """Ends a document, as ``<eos>`` does; a turn of a chat may end with another token."""
        if self._document_end is None:
            raise UserError(
                "the tokenizer has no token that ends a text",
                "Name one as eos_token in its tokenizer_config.json.",
            )
        return self._document_end

    @cached_property
    def _document_end(self) -> int | None:
        return self._id(*DOCUMENT_ENDS, "eos_token", "</s>")

    @cached_property
    def before(self) -> list[int]:
        """What stands before a text that begins a document; empty for GPT-2 and its like.

        It is what the tokenizer's post-processor puts there, or else our own ``<bos>``.
        """
        encoding = self._special.encode("a", add_special_tokens=True)
        text_at = encoding.special_tokens_mask.index(0)
        if text_at == 0 and self.is_ours:
            return [SPECIAL_TOKENS.index("<bos>")]
        return encoding.ids[:text_at]

    @property
    def start_id(self) -> int:
        """The token before a document's first one: what begins it, or ended the one before it."""
        return self.before[-1] if self.before else self.eos_id

    @cached_property
    def is_ours(self) -> bool:
        """Whether it has the control tokens of ``SPECIAL_TOKENS``, as all that we train."""
        found = [self._special.token_to_id(token) for token in SPECIAL_TOKENS]
        return found == list(range(len(SPECIAL_TOKENS)))

    @cached_property
    def is_our_chatml(self) -> bool:
        """Whether its conversations may be rendered by hand, as ``chat.render`` does."""
        return self.is_ours and self.template == CHAT_TEMPLATE

    @cached_property
    def turns(self) -> Turns:
        """Renders conversations with the template, whatever it is."""
        return Turns(self._special, self.template, self._names)

    @cached_property
    def turn_end_ids(self) -> frozenset[int]:
        """What ends a reply in a chat.

        The token with which the chat template closes a turn, the end of a document, and what
        ``eos_token`` and the model's ``generation_config.json`` name.
        """
        closing = {self.im_end_id} if self.is_our_chatml else self.turns.closing_ids
        named = self._id("eos_token")
        return self._ends | closing | {self.eos_id} | ({named} if named is not None else set())

    @property
    def im_start_id(self) -> int:
        """Opens a turn of a chat in ChatML."""
        return self._chatml("<|im_start|>")

    @property
    def im_end_id(self) -> int:
        """Closes a turn of a chat in ChatML; ``turn_end_ids`` is for every format."""
        return self._chatml("<|im_end|>")

    def _chatml(self, token: str) -> int:
        id = self._special.token_to_id(token)
        if id is None:
            raise UserError(
                f"the tokenizer has no token {token!r}", "Use one whose chat format is ChatML."
            )
        return id


class StreamDecoder:
    """Decodes one id after the other, and never prints half a character.

    A Chinese character is three bytes and may be split over tokens; until its last byte has come,
    ``push`` holds it back. The pieces joined equal ``tokenizer.decode`` of all ids.

    Args:
        tokenizer: Says which bytes an id stands for.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The characters that ``id`` completes; often one word, sometimes nothing."""
        return self._decoder.decode(self._token_bytes(id))

    def flush(self) -> str:
        """What is left when the ids end: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
