"""A ``tokenizer.json`` becomes the tokenizer of a GGUF file, where llama.cpp can do the same.

Where it cannot, nothing is written: a model that reads other ids than it was trained on seems to
work, badly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instar.errors import UserError
from instar.exchange.chat_template import chat_template, plain_jinja
from instar.exchange.pretokenizers import from_json
from instar.exchange.tokenizer_in import (
    BYTE,
    CONTROL,
    GGUF_IDS,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from instar.files import read_json
from instar.tokenizer.hf import BYTE_OF_PIECE
from instar.tokenizer.reading import control_names, read_files

REMEDY = "Write safetensors instead; transformers and vLLM read them with this tokenizer."
OWN_PIECES = r" +[^ \n]*|\n+"
"""How `instar tokenizer train` cuts for SentencePiece's model: before spaces, around line ends."""


@dataclass(frozen=True)
class Vocabulary:
    """What the keys ``tokenizer.ggml.*`` say.

    Attributes:
        keys: Key without ``tokenizer.ggml.`` to value: strings, whole numbers and truth values.
        tokens: By id.
        types: llama.cpp's number for what each token is.
        merges: Pairs of tokens, first to be merged first; for byte-level tokenizers.
        scores: By id, the highest to be merged first; for SentencePiece's.
        template: The chat template, in plain Jinja.
    """

    keys: dict[str, str | int | bool]
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    template: str | None


def vocabulary_of(directory: Path, rows: int) -> Vocabulary:
    """The vocabulary of a checkpoint.

    Args:
        directory: Holds ``tokenizer.json`` and ``tokenizer_config.json``.
        rows: Rows of the model's embedding; where there are fewer tokens, the rest is unused.

    Raises:
        UserError: llama.cpp has no tokenizer that gives the same ids.
    """
    whole = read_json(directory / "tokenizer.json")
    config = read_json(directory / "tokenizer_config.json")
    model = whole["model"]
    _refuse(whole)
    added = {entry["content"]: entry for entry in whole.get("added_tokens", [])}
    ids = dict(model["vocab"]) | {content: entry["id"] for content, entry in added.items()}
    if max(ids.values()) >= rows:
        raise UserError(
            f"{directory}: the tokenizer has ids up to {max(ids.values())}, the model {rows} rows",
            "The two do not belong together.",
        )
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokens = [f"[PAD{id}]" for id in range(rows)]
    types = [UNUSED] * rows
    scores: list[float] = []
    pieces = bool(model.get("byte_fallback"))
    spaces = pieces and _writes_spaces(whole)
    for token, id in ids.items():
        entry = added.get(token)
        tokens[id] = token.replace(" ", SPACE) if spaces and entry is None else token
        types[id] = NORMAL
        if entry is not None:
            types[id] = CONTROL if entry["special"] else USER_DEFINED
        if pieces and token in BYTE_OF_PIECE:
            types[id] = BYTE
        if pieces and token == model.get("unk_token"):
            types[id] = UNKNOWN
    keys: dict[str, int | str | bool] = {**_special_ids(directory, ids)}
    keys |= {"add_bos_token": _adds_bos(whole), "add_eos_token": False}
    if pieces:
        keys |= {"model": "llama", "pre": "default", "add_space_prefix": _prefixes(whole)}
        plain = {token for token, id in ids.items() if types[id] in (NORMAL, USER_DEFINED)}
        ranks = _ranks(merges, plain)
        scores = [0.0] * rows
        for token in plain:
            scores[ids[token]] = -float(ranks.get(token, len(ranks)))
        _refuse_merged_controls(ids.keys() - plain, plain)
        merges = []
    else:
        _refuse_endless(directory, keys)
        pre = from_json(whole.get("pre_tokenizer"), bool(model.get("ignore_merges")))
        keys |= {"model": "gpt2", "pre": pre}
    template = chat_template(directory, config)
    joined = [" ".join(pair) for pair in merges]
    return Vocabulary(keys, tokens, types, joined, scores, template and plain_jinja(template))


def _refuse(whole: Mapping[str, Any]) -> None:
    """What llama.cpp's two BPE tokenizers cannot do."""
    model = whole["model"]
    if model.get("type") != "BPE":
        raise UserError(f"the tokenizer's model is {model.get('type')}, not BPE", REMEDY)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(f"the tokenizer's model has a {name}", REMEDY)
    for entry in whole.get("added_tokens", []):
        for name in ("single_word", "lstrip", "rstrip"):
            if entry.get(name):
                raise UserError(f"the token {entry['content']!r} has the switch {name}", REMEDY)
    normalizer = whole.get("normalizer") or {}
    # NFC is what Qwen's tokenizers ask for; llama.cpp takes it as done, and most text is.
    if not model.get("byte_fallback") and normalizer.get("type", "NFC") != "NFC":
        raise UserError(f"the tokenizer changes text first ({normalizer['type']})", REMEDY)


def _writes_spaces(whole: Mapping[str, Any]) -> bool:
    """Whether pieces hold spaces as spaces, as ours do; else as SentencePiece writes them.

    Raises:
        UserError: The tokenizer is neither of the two.
    """
    pre, normalizer = whole.get("pre_tokenizer"), whole.get("normalizer")
    if normalizer is None and pre and pre.get("type") == "Split":
        if pre["pattern"].get("Regex") == OWN_PIECES and pre["behavior"] == "Isolated":
            return True
    elif pre is None and normalizer and _steps(normalizer) in (["Replace"], ["Prepend", "Replace"]):
        return False
    raise UserError("the tokenizer falls back to bytes, but is not SentencePiece's BPE", REMEDY)


def _steps(normalizer: Mapping[str, Any]) -> list[str]:
    return [step["type"] for step in normalizer.get("normalizers", [normalizer])]


def _prefixes(whole: Mapping[str, Any]) -> bool:
    return "Prepend" in _steps(whole.get("normalizer") or {"type": ""})


def _ranks(merges: Sequence[tuple[str, ...]], plain: set[str]) -> dict[str, int]:
    """Which merged piece goes first; llama.cpp then merges any two pieces that make it up.

    Raises:
        UserError: The merges allow less than that, or order the ways to one piece apart.
    """
    ranks: dict[str, int] = {}
    last = None
    for left, right in merges:
        piece = left + right
        if piece != last and piece in ranks:
            raise UserError("the tokenizer's merges are not in the order of their pieces", REMEDY)
        ranks.setdefault(piece, len(ranks))
        last = piece
    pairs = set(merges)
    for piece in plain:
        for at in range(1, len(piece)):
            pair = (piece[:at], piece[at:])
            if pair not in pairs and plain.issuperset(pair):
                raise UserError(f"the tokenizer does not merge {pair} to {piece!r}", REMEDY)
    return ranks


def _refuse_merged_controls(others: Iterable[str], plain: set[str]) -> None:
    """llama.cpp merges any two pieces to any token, control tokens among them."""
    for token in others:
        for at in range(1, len(token)):
            if plain.issuperset((token[:at], token[at:])):
                raise UserError(
                    f"plain text could become the control token {token!r} in llama.cpp", REMEDY
                )


def _special_ids(directory: Path, ids: Mapping[str, int]) -> dict[str, int]:
    """The tokens that begin, end and fill texts; in chats, turns.

    What the tokenizer's files do not name, the model's may: so it is with GPT-2's.
    """
    names = control_names(read_files(directory))
    places = [directory / name for name in ("config.json", "generation_config.json")]
    models = [read_json(place) for place in places if place.is_file()]
    found: dict[str, int] = {}
    for name, key in GGUF_IDS.items():
        said = [ids.get(names.get(f"{name}_token", ""))]
        for model in models:
            several = model.get(f"{name}_token_id")
            said += several if isinstance(several, list) else [several]
        known = [id for id in said if id is not None and id in ids.values()]
        if known:
            found[f"{key}_token_id"] = known[0]
    if "<|im_end|>" in ids:
        found["eot_token_id"] = ids["<|im_end|>"]
    return found


def _refuse_endless(directory: Path, keys: Mapping[str, Any]) -> None:
    """Where a file names no end, llama.cpp ends texts at the token 11."""
    if "eos_token_id" not in keys:
        raise UserError(
            f"{directory}: no file says which token ends a text",
            'Name it in tokenizer_config.json, such as "eos_token": "<|endoftext|>".',
        )


def _adds_bos(whole: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a token before every text by itself."""
    processor = whole.get("post_processor") or {}
    steps = processor.get("processors", [processor])
    templates = [step for step in steps if step.get("type") == "TemplateProcessing"]
    return any(t["single"] and "SpecialToken" in t["single"][0] for t in templates)
