"""Checkpoints are Hugging Face directories: read strictly, and written as others expect them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from instar.errors import UserError
from instar.files import read_json, write_json
from instar.model import CausalLM, ModelConfig, ScoreModel
from instar.model.config import RewardForm
from instar.model.sharding import reshard, whole
from instar.tokenizer.hf import Tokenizer

M = TypeVar("M", CausalLM, ScoreModel)

HEADS = {CausalLM: "ForCausalLM", ScoreModel: "ForSequenceClassification"}
FAMILIES = {"qwen3": "Qwen3", "llama": "Llama"}
SHARD_BYTES = 5 * 10**9
TIED = "lm_head.weight"


def control_tokens(tokenizer: Tokenizer | None) -> dict[str, int | list[int]]:
    """The ids that generation elsewhere needs to know; our own where no tokenizer is given.

    Two tokens end a text: ``<eos>`` a document, ``<|im_end|>`` a turn of a chat.
    """
    if tokenizer is None:
        return {"bos_token_id": 2, "eos_token_id": [3, 5], "pad_token_id": 0}
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted({tokenizer.eos_id, tokenizer.im_end_id}),
        "pad_token_id": tokenizer.pad_id,
    }


def to_hugging_face(config: ModelConfig, head: str) -> dict[str, Any]:
    """What ``config.json`` holds for a model of this shape, control tokens apart.

    Both spellings of the rotary base are written: ``rope_theta`` for readers before
    transformers 5, ``rope_parameters`` for those after it.
    """
    values = config.model_dump(exclude={"family", "reward_form"})
    values |= {
        "architectures": [FAMILIES[config.family] + head],
        "model_type": config.family,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "dtype": "float32",
    }
    if config.family == "llama":
        values["mlp_bias"] = False
    if head == HEADS[ScoreModel]:
        values |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
        values["reward_form"] = config.reward_form  # ours; transformers reads the last score
    return values


def from_hugging_face(values: dict[str, Any], origin: str) -> ModelConfig:
    """The shape that a ``config.json`` describes.

    Raises:
        UserError: The architecture, or a setting of it, is one that this model does not have.
    """
    if not isinstance(values, dict):
        raise UserError(f"{origin} does not hold an object", "Write it again.")
    values = {name: value for name, value in values.items() if value is not None}
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{origin}: model_type is {family!r}", f"instar reads {', '.join(FAMILIES)}."
        )
    unsupported = {
        "hidden_act": values.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(values.get("attention_bias", False)),
        "mlp_bias": bool(values.get("mlp_bias", False)),
        "use_sliding_window": bool(values.get("use_sliding_window", False)),
        "rope_parameters": _scales(values.get("rope_parameters")),
        "rope_scaling": _scales(values.get("rope_scaling")),
    }
    for name, present in unsupported.items():
        if present:
            raise UserError(
                f"{origin}: {name} is {values.get(name)!r}", "This model has no such part."
            )
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if name not in values:
            raise UserError(f"{origin}: `{name}` is missing", "Write the file again.")
    known = {name: values[name] for name in ModelConfig.model_fields if name in values}
    known["family"] = family
    rope = values.get("rope_parameters") or {}
    known["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10_000.0))
    known.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    known.setdefault("num_key_value_heads", values["num_attention_heads"])
    # Absent means false for transformers' Qwen3 and Llama, whatever our own default is.
    known.setdefault("tie_word_embeddings", False)
    return ModelConfig.parse(known, origin)


def _scales(rope: object) -> bool:
    """Whether rotary settings, of any age, ask for more than plain rotation."""
    if not rope:
        return False
    if not isinstance(rope, dict):
        return True
    # Before transformers 4.43, `rope_type` was called `type`.
    return any(rope.get(key, "default") != "default" for key in ("rope_type", "type"))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors to store: whole, contiguous, on the CPU, a tied head left out.

    All ranks of a sharded model must ask.
    """
    reshard(model)
    weights = model.state_dict()
    if isinstance(model, CausalLM) and model.config.tie_word_embeddings:
        del weights[TIED]
    return {name: whole(w.detach()).cpu().contiguous() for name, w in weights.items()}


def save_model(
    model: CausalLM | ScoreModel,
    directory: Path,
    tokenizer: Tokenizer | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint that transformers opens.

    Args:
        model: Its weights are stored in float32.
        directory: Gets ``config.json``, ``generation_config.json`` and the safetensors.
        tokenizer: Saved beside them; its control tokens are named in the config.
        weights: What ``weights_of(model)`` gave, where others had to take part in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokens = control_tokens(tokenizer)
    head = next(head for kind, head in HEADS.items() if isinstance(model, kind))
    config = to_hugging_face(model.config, head) | tokens
    write_json(directory / "config.json", config)
    if isinstance(model, CausalLM):
        write_json(directory / "generation_config.json", tokens)
    if tokenizer is not None:
        tokenizer.save(directory)
    shards = _shards(weights_of(model) if weights is None else weights)
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
            "Name a directory that a stage has written.",
        )
    return from_hugging_face(read_json(directory / "config.json"), str(directory / "config.json"))


def load_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in float32; ``UserError`` where files are missing or damaged."""
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        try:
            weights |= load_file(directory / name)
        except FileNotFoundError:
            raise UserError(
                f"{directory} is not a checkpoint: it has no {name}",
                "Name a directory that a stage has written.",
            ) from None
        except SafetensorError as error:
            raise UserError(
                f"{directory / name} is damaged ({error})", "Run the stage that made it again."
            ) from None
    return {name: w.float() for name, w in weights.items()}


def load_causal_lm(directory: Path) -> CausalLM:
    """The language model in ``directory``, in float32, on the CPU.

    Raises:
        UserError: Not a checkpoint, or one whose tensors do not fit its ``config.json``.
    """
    model = CausalLM(read_model_config(directory))
    weights = load_weights(directory)
    if model.config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights.setdefault(TIED, weights["model.embed_tokens.weight"])
    return _fill(model, weights, directory)


def load_score_model(directory: Path) -> ScoreModel:
    """The reward model or critic in ``directory``; raises as ``load_causal_lm`` does."""
    model = ScoreModel(read_model_config(directory))
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
    model = ScoreModel(config.model_copy(update={"reward_form": form}))
    fresh = {"score.weight": torch.zeros_like(model.score.weight)}
    if form == "prior":
        fresh["prior_weight"] = torch.ones(1)
    weights = load_weights(directory)
    weights.pop(TIED, None)
    return _fill(model, fresh | weights, directory)


def _fill(model: M, weights: dict[str, Tensor], directory: Path) -> M:
    """Load strictly: every tensor has its place and every place its tensor."""
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(
            f"{directory} does not hold a {type(model).__name__}: {first}",
            "Name a checkpoint of the right kind.",
        ) from None
    return model
