"""The tokenizer of a GGUF file becomes a ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instar.errors import UserError
from instar.exchange.pretokenizers import cut_named, to_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""What a token is, in llama.cpp's numbers."""

SPACE = "▁"
"""How SentencePiece writes a space."""


@dataclass(frozen=True)
class Files:
    """A tokenizer as a Hugging Face directory holds it.

    Attributes:
        tokenizer: Of ``tokenizer.json``.
        config: Of ``tokenizer_config.json``.
        template: Of ``chat_template.jinja``; none for a model that does not chat.
        control: The ids that ``config.json`` and ``generation_config.json`` name.
    """

    tokenizer: dict[str, Any]
    config: dict[str, Any]
    template: str | None
    control: dict[str, int | list[int]]


def tokenizer_of(metadata: Mapping[str, Any], max_length: int) -> Files:
    """The tokenizer that a GGUF file's keys describe.

    Args:
        metadata: All keys of the file.
        max_length: The longest input of the model, in tokens.

    Raises:
        UserError: A key is missing, or the tokenizer is of a kind that is not read here.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in KINDS:
        raise UserError(
            f"the file's tokenizer.ggml.model is {kind!r}",
            f"instar reads {' and '.join(KINDS)}; download the model's own directory instead.",
        )
    tokens = _list(metadata, "tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise UserError("the file's token types are not as many as its tokens", "Download it again")
    # A matrix may have more rows than there are tokens; files name these rows, as unused tokens.
    used = len(tokens)
    while used and types[used - 1] == UNUSED:
        used -= 1
    tokenizer = KINDS[kind](metadata, tokens[:used], types[:used])
    added = [
        _added(id, tokens[id], types[id] != USER_DEFINED)
        for id in range(used)
        if types[id] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    ids = _control_ids(metadata, len(tokens))
    if "bos" in ids and _adds_bos(metadata):
        bos = tokens[ids["bos"]]
        tokenizer["post_processor"] = _begins_with(bos, ids["bos"])
    names = {f"{name}_token": tokens[id] for name, id in ids.items() if name in NAMED}
    config = {
        # Else transformers would build the class of the model type, with its own pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **{"normalizer": None, "post_processor": None},
        **tokenizer,
    }
    ends = {entry["id"] for entry in added if entry["special"] and entry["content"] in ENDS}
    ends |= {ids[name] for name in ("eos", "eot") if name in ids}
    return Files(whole, config, metadata.get("tokenizer.chat_template"), _named_ids(ids, ends))


NAMED = ("bos", "eos", "unk", "pad")
ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<eos>", "</s>")
"""Control tokens that llama.cpp ends at, whatever the file says."""

GGUF_IDS = {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}
"""Our names to GGUF's: ``tokenizer.ggml.unknown_token_id``."""


def _control_ids(metadata: Mapping[str, Any], size: int) -> dict[str, int]:
    found = {ours: metadata.get(f"tokenizer.ggml.{key}_token_id") for ours, key in GGUF_IDS.items()}
    return {name: int(id) for name, id in found.items() if id is not None and id < size}


def _named_ids(ids: Mapping[str, int], ends: set[int]) -> dict[str, int | list[int]]:
    """For ``config.json``; a turn may end otherwise than a text."""
    named: dict[str, int | list[int]] = {
        f"{name}_token_id": ids[name] for name in ("bos", "pad") if name in ids
    }
    ordered = sorted(ends)
    return named | ({"eos_token_id": ordered[0] if len(ends) == 1 else ordered} if ends else {})


def _list(metadata: Mapping[str, Any], name: str) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not values:
        raise UserError(
            f"the file has no tokenizer.ggml.{name}", "Choose one that carries its tokenizer."
        )
    return values


def _added(id: int, content: str, special: bool) -> dict[str, Any]:
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, **switches, "special": special}


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether every text begins with a token; where the file is silent, as llama.cpp has it."""
    said = metadata.get("tokenizer.ggml.add_bos_token")
    if said is not None:
        return said
    of_pieces = metadata["tokenizer.ggml.model"] == "llama"
    return of_pieces or cut_named(metadata.get("tokenizer.ggml.pre", "")).adds_bos


def _begins_with(token: str, id: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, texts[0], texts[1]],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


def _model(vocab: dict[str, int], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    """A BPE model of ``tokenizer.json``."""
    plain: dict[str, Any] = dict.fromkeys(
        ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    plain |= dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    return {"type": "BPE", **plain, **settings, "vocab": vocab, "merges": merges}


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    """GPT-2's kind: merges of bytes, each byte written as a visible character."""
    cut = cut_named(metadata.get("tokenizer.ggml.pre", ""))
    merges = [merge.split(" ", 1) for merge in _list(metadata, "merges")]
    vocab = {token: id for id, token in enumerate(tokens)}
    strange = [m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= vocab.keys()]
    if strange:
        raise UserError(
            f"the file's merge {' '.join(strange[0])!r} is none of two tokens to a third",
            "Download it again.",
        )
    bytes_back = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {
        "pre_tokenizer": to_json(cut),
        "decoder": {"type": "ByteLevel", **bytes_back},
        "model": _model(vocab, merges, ignore_merges=cut.whole_words),
    }


def _pieces(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    """SentencePiece's BPE: a piece may come of any two pieces; the best score goes first."""
    scores = _list(metadata, "scores")
    plain = {token: id for id, token in enumerate(tokens) if types[id] in (NORMAL, USER_DEFINED)}
    merges: list[list[str]] = []
    for piece in sorted(plain, key=lambda piece: -scores[plain[piece]]):
        halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [half for half in halves if half[0] in plain and half[1] in plain]
        merges += [[left, right] for left, right in known]
    unknown = next((tokens[id] for id, kind in enumerate(types) if kind == UNKNOWN), None)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    first = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    vocab = {token: id for id, token in enumerate(tokens)}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*first, spaces]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": _model(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


KINDS: dict[str, Callable[[Mapping[str, Any], Sequence[str], Sequence[int]], dict[str, Any]]] = {
    "gpt2": _byte_level,
    "llama": _pieces,
}
"""``tokenizer.ggml.model`` to what makes a ``tokenizer.json`` of it."""
