"""What a tokenizer's directory holds: files of several ages, read into one form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from instar.errors import UserError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What belongs to a tokenizer; the first is the tokenizer itself."""

NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""Names of control tokens, as transformers has them."""

GPT2_END = "<|endoftext|>"
"""The one control token of GPT-2, which its old files do not name."""

GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")

CONVERT = (
    'Let transformers write one: `python -c "from transformers import AutoTokenizer as A;'
    " A.from_pretrained('DIR').save_pretrained('DIR')\"`."
)


def read_files(directory: Path) -> dict[str, bytes]:
    """The files of a tokenizer by their names; ``tokenizer.json`` is made if it can be.

    Raises:
        UserError: There is none, and nothing that it could be made of.
    """
    files = {n: (directory / n).read_bytes() for n in FILES if (directory / n).is_file()}
    if FILES[0] in files:
        return files
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return {FILES[0]: _from_merges(directory, files)} | files
    if (directory / "tokenizer.model").is_file():
        raise UserError(f"{directory} holds tokenizer.model and no tokenizer.json", CONVERT)
    raise UserError(
        f"{directory / FILES[0]} does not exist",
        "Give the directory of a tokenizer or a checkpoint; `instar tokenizer train` makes one.",
    )


def _from_merges(directory: Path, files: dict[str, bytes]) -> bytes:
    """GPT-2's two files as one (Radford et al. 2019: byte-level BPE with a fixed pattern)."""
    config = read_object(files, "tokenizer_config.json")
    kind = config.get("tokenizer_class")
    if kind not in GPT2_CLASSES:
        raise UserError(
            f"{directory} has vocab.json and merges.txt of a {kind}, and no tokenizer.json", CONVERT
        )
    core = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    rust = RustTokenizer(core)
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    named = control_names(files).values()
    rust.add_special_tokens([_added(token) for token in dict.fromkeys([GPT2_END, *named])])
    return rust.to_str(pretty=True).encode()


def _added(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


def read_object(files: dict[str, bytes], name: str) -> dict[str, Any]:
    """A JSON file that holds an object; an empty one where the file is absent."""
    value = json.loads(files.get(name, b"{}"))
    if not isinstance(value, dict):
        raise ValueError(f"{name} does not hold an object")
    return value


def control_names(files: dict[str, bytes]) -> dict[str, str]:
    """Which control tokens the files name, such as ``eos_token``.

    ``special_tokens_map.json`` counts for directories that transformers before 4.34 wrote.
    """
    config = read_object(files, "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= read_object(files, "special_tokens_map.json")
    contents = {name: _content(config.get(name)) for name in NAMES}
    return {name: content for name, content in contents.items() if content}


def _content(token: object) -> str | None:
    """A token is written as its text, or as an object that holds it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def chat_template(files: dict[str, bytes]) -> str | None:
    """The chat template that came with a tokenizer: from its own file, or the config.

    Raises:
        ValueError: There are several, and none is called ``default``.
    """
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    template = read_object(files, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ValueError(f"no chat template is called default, only {', '.join(named)}")
        return named["default"]
    return template if isinstance(template, str) else None


def generation_ends(directory: Path) -> list[int]:
    """The ids that end generation, as ``generation_config.json`` beside the tokenizer says."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return []
    ids = read_object({path.name: path.read_bytes()}, path.name).get("eos_token_id")
    return [id for id in (ids if isinstance(ids, list) else [ids]) if isinstance(id, int)]
