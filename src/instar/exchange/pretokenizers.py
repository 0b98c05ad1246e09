"""Where words end: llama.cpp's names for it, and the parts of a ``tokenizer.json``.

A GGUF file says only ``tokenizer.ggml.pre = qwen2``; the regular expressions that this stands for
are built into llama.cpp (``llama-vocab.cpp``). They are facts of the models: whoever cuts
otherwise gets other ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from instar.errors import UserError
from instar.tokenizer.bpe import PATTERN as QWEN2

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGIT = r"\p{N}"


@dataclass(frozen=True)
class Cut:
    """A way to cut text into words.

    Attributes:
        patterns: Each is applied to what the one before has left, matches and gaps alike.
        whole_words: A word that is a token is that token, whatever the merges say.
        adds_bos: llama.cpp begins every text with a token, unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = field(default=False, compare=False)


DEFAULT = Cut((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
"""What llama.cpp does with a file that names no pre-tokenizer."""

CUTS: dict[str, Cut] = {
    "qwen2": Cut((QWEN2,)),
    "smollm": Cut((DIGIT, GPT2)),
    "gpt-2": Cut((GPT2,)),
    "llama-bpe": Cut((LLAMA3,), whole_words=True, adds_bos=True),
    "smaug-bpe": Cut((LLAMA3,)),
    "qwen35": Cut((QWEN35,)),
    "default": DEFAULT,
}
"""llama.cpp's name to the cut; where two names mean the same, the first is written."""

ALIASES = {
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "codeshell": "smollm",
    "exaone": "smollm",
    "phi-2": "gpt-2",
    "mpt": "gpt-2",
    "olmo": "gpt-2",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "pixtral": "llama-bpe",
    "dbrx": "smaug-bpe",
    "deepseek-r1-qwen": "qwen2",
    "stablelm2": "qwen2",
    "": "default",
}
"""Other names for the same cuts."""


def cut_named(name: str) -> Cut:
    """The cut that a GGUF file means.

    Raises:
        UserError: It is not known here.
    """
    cut = CUTS.get(ALIASES.get(name, name))
    if cut is None:
        raise UserError(
            f"the file's pre-tokenizer is {name!r}",
            f"instar knows {', '.join(sorted({*CUTS, *ALIASES} - {''}))}.",
        )
    return cut


def to_json(cut: Cut) -> dict[str, Any]:
    """The ``pre_tokenizer`` of a ``tokenizer.json``."""
    steps: list[dict[str, Any]] = [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        for pattern in cut.patterns
    ]
    bytes_only = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*steps, {"type": "ByteLevel", **bytes_only}]}


def from_json(pre: Mapping[str, Any] | None, whole_words: bool) -> str:
    """llama.cpp's name for the cut of a ``tokenizer.json``.

    Args:
        pre: Its ``pre_tokenizer``.
        whole_words: Its model's ``ignore_merges``.

    Raises:
        UserError: llama.cpp has none for it; any other would give other ids.
    """
    found = Cut(tuple(_patterns(_steps(pre))), whole_words)
    for name, cut in CUTS.items():
        if cut == found:
            return name
    raise UserError(
        "llama.cpp has no pre-tokenizer that cuts words as this tokenizer.json does",
        f"instar writes {', '.join(CUTS)}; a tokenizer of `instar tokenizer train` is one of them.",
    )


def _steps(pre: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if pre is None:
        return []
    return pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]


def _patterns(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The regular expression of every step; one that is no known pattern where it is none."""
    patterns: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel":
            if step.get("add_prefix_space"):
                return ["a space is put before"]
            if step.get("use_regex", True):
                patterns.append(GPT2)
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(DIGIT)
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(step["pattern"].get("Regex", ""))
        else:
            return [f"a step of type {kind}"]
    return patterns
