"""Checkpoints are Hugging Face directories: read strictly, and written as others expect them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from instar.errors import UserError
from instar.files import read_json, write_json
from instar.model import CausalLM, ModelConfig, ScoreModel
from instar.model.config import RewardForm
from instar.model.hugging_face import FAMILIES, HEADS, from_hugging_face, to_hugging_face
from instar.model.sharding import reshard, stored
from instar.model.stored import StoredDtype, file_name, load_weights, read_dtype
from instar.tokenizer.hf import Tokenizer

M = TypeVar("M", CausalLM, ScoreModel)

SHARD_BYTES = 5 * 10**9
"""The most that one file holds."""

TIED = "lm_head.weight"
"""What files leave out where it is the input embedding as well."""

__all__ = [
    "FAMILIES",
    "HEADS",
    "control_tokens",
    "from_hugging_face",
    "load_causal_lm",
    "load_score_model",
    "load_weights",
    "read_dtype",
    "read_model_config",
    "save_model",
    "score_model_from",
    "to_hugging_face",
    "weights_of",
]


def control_tokens(tokenizer: Tokenizer | None) -> dict[str, int | list[int] | None]:
    """The ids that generation elsewhere needs to know; our own where no tokenizer is given.

    Several tokens may end a text: ``<eos>`` a document, ``<|im_end|>`` a turn of a chat.
    """
    if tokenizer is None:
        return {"bos_token_id": 2, "eos_token_id": [3, 5], "pad_token_id": 0}
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted(tokenizer.turn_end_ids),
        "pad_token_id": tokenizer.pad_id,
    }


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors to store: whole, contiguous, on the CPU, a tied head left out.

    All ranks of a sharded model must ask; rank 0 is told.
    """
    reshard(model)
    weights = model.state_dict()
    if isinstance(model, CausalLM) and model.config.tie_word_embeddings:
        del weights[TIED]
    return {name: stored(w).contiguous() for name, w in weights.items()}


def save_model(
    model: CausalLM | ScoreModel,
    directory: Path,
    tokenizer: Tokenizer | None = None,
    weights: dict[str, Tensor] | None = None,
    dtype: StoredDtype = "float32",
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that transformers opens.

    Args:
        model: Of any family.
        directory: Gets ``config.json``, ``generation_config.json`` and the safetensors.
        tokenizer: Saved beside them; its control tokens are named in the config.
        weights: What ``weights_of(model)`` gave, where others had to take part in it.
        dtype: Format of the stored weights. What was read from files of that format, and has not
            been trained, is stored as it was, bit for bit.
        generation: What the model that it was made of recommends, such as a temperature; the ids
            of control tokens are the tokenizer's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokens = control_tokens(tokenizer)
    head = next(head for kind, head in HEADS.items() if isinstance(model, kind))
    config = to_hugging_face(model.config, head, dtype) | tokens
    write_json(directory / "config.json", config)
    if isinstance(model, CausalLM):
        write_json(directory / "generation_config.json", {**(generation or {}), **tokens})
    if tokenizer is not None:
        tokenizer.save(directory)
    weights = weights_of(model) if weights is None else weights
    family, form = model.config.family, getattr(torch, dtype)
    shards = _shards({file_name(name, family): w.to(form) for name, w in weights.items()})
    if len(shards) == 1:
        _save_file(shards[0], directory / "model.safetensors")
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save_file(shard, directory / name)
        index |= dict.fromkeys(shard, name)
    total = sum(w.nbytes for shard in shards for w in shard.values())
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": index},
    )


def _save_file(weights: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file; a full disk is the ``OSError`` that it is everywhere else."""
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if system := re.search(r"os error (\d+)", str(error)):
            number = int(system[1])
            raise OSError(number, os.strerror(number), str(path)) from None
        raise


def _shards(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The weights in order, cut where a file would grow beyond ``SHARD_BYTES``."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.nbytes
    return shards


def read_model_config(directory: Path) -> ModelConfig:
    """The shape of the model in ``directory``; raises ``UserError`` where there is none."""
    if not (directory / "config.json").exists():
        raise UserError(
            f"{directory} is not a checkpoint: it has no config.json",
            "Name a directory that a stage has written, or one of a Hugging Face model.",
        )
    return from_hugging_face(read_json(directory / "config.json"), str(directory / "config.json"))


def load_causal_lm(directory: Path) -> CausalLM:
    """The language model in ``directory``, in float32, on the CPU.

    Raises:
        UserError: Not a checkpoint, or one whose tensors do not fit its ``config.json``.
    """
    config = read_model_config(directory)
    with torch.device("meta"):
        model = CausalLM(config)
    weights = load_weights(directory)
    if config.tie_word_embeddings:
        _tie(model, weights, directory)
    _fill(model, weights, directory)
    model.tie()
    return model


def _tie(model: CausalLM, weights: dict[str, Tensor], directory: Path) -> None:
    """Give the head the embedding that it is one with."""
    table = next(n for n, w in model.named_parameters() if w is model.model.embeddings.weight)
    if table not in weights:
        return
    head = weights.setdefault(TIED, weights[table])
    if not torch.equal(head, weights[table]):
        raise UserError(
            f"{directory}: {TIED} is not {table}, and by config.json the two are one matrix",
            "Set tie_word_embeddings to false there.",
        )


def load_score_model(directory: Path) -> ScoreModel:
    """The reward model or critic in ``directory``; raises as ``load_causal_lm`` does."""
    config = read_model_config(directory)
    with torch.device("meta"):
        model = ScoreModel(config)
    return _fill(model, load_weights(directory), directory)


def score_model_from(directory: Path, form: RewardForm = "last") -> ScoreModel:
    """A new score model on the body of a language model; its head starts at zero.

    Args:
        directory: The language model.
        form: How it makes a reward of its scores.

    Raises:
        UserError: As ``load_causal_lm`` does, or where the form needs tied embeddings.
    """
    config = read_model_config(directory)
    if form == "prior" and not config.tie_word_embeddings:
        raise UserError(
            f"{directory}: its input and output embeddings are two matrices, and a score model "
            "keeps only the first",
            "Choose the form `last` or `mean`.",
        )
    with torch.device("meta"):
        model = ScoreModel(config.model_copy(update={"reward_form": form}))
    fresh = {"score.weight": torch.zeros(model.score.weight.shape)}
    if form == "prior":
        fresh["prior_weight"] = torch.ones(1)
    weights = load_weights(directory)
    weights.pop(TIED, None)
    return _fill(model, fresh | weights, directory)


def _fill(model: M, weights: dict[str, Tensor], directory: Path) -> M:
    """Load strictly: every tensor has its place and every place its tensor.

    The tensors become the model's own; nothing is copied.
    """
    places = model.state_dict()
    for problem, names in (
        ("Missing", places.keys() - weights.keys()),
        ("Unexpected", weights.keys() - places.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{directory} does not hold a {type(model).__name__} of the shape that its "
                f"config.json describes: {problem} {min(names)}{more}",
                "Name a checkpoint of the right kind, with the config.json that belongs to it.",
            )
    for name, place in places.items():
        if weights[name].shape != place.shape:
            raise UserError(
                f"{directory}: {name} is {tuple(weights[name].shape)} in the file, and by "
                f"config.json {tuple(place.shape)}",
                "Put the config.json there that belongs to these weights.",
            )
    model.load_state_dict(weights, strict=True, assign=True)
    return model
