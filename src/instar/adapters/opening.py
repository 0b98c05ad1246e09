"""A model from any directory: a checkpoint, or an adapter that names its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from instar import checkpoint
from instar.adapters.base import DEFAULT, AdapterConfig, add, merge, teach
from instar.adapters.io import (
    base_name,
    base_of,
    holds_scores,
    is_adapter,
    load_adapter,
    reward_form,
)
from instar.adapters.nf4 import quantize
from instar.errors import UserError
from instar.files import read_json
from instar.hub import located
from instar.lineage import hash_file, hash_value
from instar.model import CausalLM, ScoreModel
from instar.model.config import RewardForm
from instar.model.transformer import Headed
from instar.tokenizer.hf import Tokenizer

M = TypeVar("M", bound=Headed)

Bits = Literal["nf4"]
"""How a frozen base may be kept in less memory: ``nf4`` is QLoRA's four-bit format."""


def holds_model(directory: Path) -> bool:
    """Whether a directory holds a model of either kind."""
    return (directory / "config.json").exists() or is_adapter(directory)


def plain_directory(directory: Path, base: Path | None = None) -> Path:
    """The directory itself, or the base of the adapter in it.

    Args:
        directory: A checkpoint, an adapter, or a name on the hub.
        base: Where an adapter's base lies, if not where the adapter says.

    Raises:
        UserError: There is no such directory, or its base is not there.
    """
    directory = located(directory)
    if not is_adapter(directory):
        return directory
    return located(base) if base else base_of(directory)


def plain_name(name: Path) -> Path:
    """What a model is asked for by, or what an adapter calls its base: perhaps a name on the hub.

    Raises:
        UserError: As ``located`` does.
    """
    directory = located(name)
    return base_name(directory) if is_adapter(directory) else name


TAKEN = (
    "*.safetensors",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "base.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
"""What others take over from a directory: weights, shape, how an adapter learns, tokenizer and what
ends a text, how conversations look."""


def content_of(directory: Path, base: Path | None = None) -> str | None:
    """Hash of what others take over from a directory, and from its base if it is an adapter.

    Args:
        directory: A checkpoint, a tokenizer, an adapter.
        base: Where an adapter's base lies, if not where the adapter says.

    Returns:
        The hash; none where there is nothing to take over.

    Raises:
        UserError: An adapter's base is not there.
    """
    found = sorted(path for pattern in TAKEN for path in directory.glob(pattern))
    hashes = [hash_file(path) for path in found]
    if is_adapter(directory):
        hashes.append(content_of(plain_directory(directory, base)) or "")
    return hash_value(hashes) if found else None


def load_causal_lm(directory: Path, bits: Bits | None = None, base: Path | None = None) -> CausalLM:
    """The language model in ``directory``; an adapter is active, over its base.

    Args:
        directory: A checkpoint, an adapter, or a name on the hub.
        bits: Keep the weights of the blocks in four bits.
        base: Where an adapter's base lies, if not where the adapter says.

    Raises:
        UserError: As ``instar.checkpoint.load_causal_lm``, ``load_adapter`` and ``located`` do.
    """
    place = plain_directory(directory, base)
    return _opened(checkpoint.load_causal_lm(place), directory, place, bits)


def load_score_model(
    directory: Path, bits: Bits | None = None, base: Path | None = None
) -> ScoreModel:
    """The reward model or critic in ``directory``, as ``load_causal_lm`` gives language models."""
    place = plain_directory(directory, base)
    if not is_adapter(directory) or holds_scores(place):
        model = checkpoint.load_score_model(place)
    else:
        model = checkpoint.score_model_from(place, reward_form(directory))
    return _opened(model, directory, place, bits)


def score_model_from(directory: Path, form: RewardForm, bits: Bits | None = None) -> ScoreModel:
    """A new score model on the body of a language model, with its adapter if it has one.

    Raises:
        UserError: As ``instar.checkpoint.score_model_from`` does.
    """
    place = plain_directory(directory)
    return _opened(checkpoint.score_model_from(place, form), directory, place, bits)


def _opened(model: M, directory: Path, base: Path, bits: Bits | None) -> M:
    """Put in what a directory adds to its base."""
    if bits:
        quantize(model)
    directory = located(directory)
    if is_adapter(directory):
        load_adapter(model, directory, base=base)
    return model


def load_tokenizer(directory: Path, base: Path | None = None) -> Tokenizer:
    """The tokenizer in ``directory``, or where an adapter has none beside it, that of its base.

    Raises:
        UserError: As ``Tokenizer.load`` and ``located`` do.
    """
    return Tokenizer.load(tokenizer_directory(directory, base))


def tokenizer_directory(directory: Path, base: Path | None = None) -> Path:
    """Where the tokenizer of ``directory`` lies; raises as ``located`` does."""
    directory = located(directory)
    beside = any((directory / name).exists() for name in ("tokenizer.json", "vocab.json"))
    return directory if beside else plain_directory(directory, base)


def generation_settings(directory: Path, base: Path | None = None) -> dict[str, Any]:
    """What ``generation_config.json`` says of a model; of an adapter, beside what its base's says.

    Raises:
        UserError: As ``plain_directory`` does, or where a file is broken.
    """
    places = plain_directory(directory, base), located(directory)
    found: dict[str, Any] = {}
    for path in (place / "generation_config.json" for place in places):
        found |= read_json(path) if path.is_file() else {}
    return found


def load_model(directory: Path, base: Path | None = None) -> CausalLM | ScoreModel:
    """The model in ``directory``, of the kind that it holds; raises as the others do."""
    load = load_score_model if holds_scores(located(directory)) else load_causal_lm
    return load(directory, base=base)


def merged(directory: Path, base: Path | None = None) -> CausalLM | ScoreModel:
    """The plain model that an adapter and its base are together.

    Raises:
        UserError: It is not an adapter, does not fit its base, its method cannot be merged, or
            gives the base weights that no checkpoint of its family holds.
    """
    if not is_adapter(directory):
        raise UserError(f"{directory} is no adapter", "Name the directory of one.")
    model = load_model(directory, base)
    merge(model)
    with torch.device("meta"):
        places = type(model)(model.config).state_dict().keys()
    if more := model.state_dict().keys() - places:
        raise UserError(
            f"merged, {directory} would have {min(more)}, which the family "
            f"{model.config.family} has no place for",
            "Keep the adapter beside its base.",
        )
    return model


def to_learn(model: M, adapter: AdapterConfig | None, bits: Bits | None, seed: int) -> M:
    """A loaded model, made ready to be trained: whole, by a fresh adapter, or by its own.

    Args:
        model: Changed in place.
        adapter: A fresh adapter's method; none for a model that is trained whole, or that has an
            adapter already, which then goes on learning.
        bits: As it was loaded.
        seed: Decides the adapter's first weights.

    Raises:
        UserError: The settings do not go together.
    """
    if adapter and model.adapters:
        raise UserError(
            "`init` is an adapter already, which would go on learning, and `adapter` asks for "
            "another",
            "Leave `adapter` out, or merge the first into its base (instar merge).",
        )
    if adapter:
        add(model, adapter, seed)
    elif model.adapters:
        teach(model, DEFAULT)
    elif bits:
        raise UserError(
            "quantize keeps the weights in four bits, and those cannot learn",
            "Choose an `adapter`, such as lora.",
        )
    return model
