"""Adapters are PEFT directories: written as PEFT opens them, and read strictly."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from instar.adapters.base import (
    DEFAULT,
    AdapterConfig,
    activate,
    check_free,
    learnt_parts,
    put_all_in,
    remove,
    slots,
)
from instar.adapters.methods import described, understood
from instar.adapters.peft_fields import by_pattern, names_of, outer_path
from instar.adapters.slots import Adapted, Part, Slot, Whole, take
from instar.adapters.targets import ALL_LINEAR, linear_layers
from instar.adapters.tokens import TokenSlot
from instar.errors import UserError
from instar.files import read_json, write_json
from instar.hub import located
from instar.lineage import hash_file, hash_value
from instar.model import ScoreModel
from instar.model.config import RewardForm
from instar.model.sharding import stored
from instar.model.transformer import Headed

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
"""Ours: which weights the adapter was learnt on, how a reward is made of its scores, and settings
that PEFT has no word for, with which it goes on learning."""

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's parts."""

HEAD = f"{PREFIX}score."
"""The same of a reward model's head."""

SCORES = "SEQ_CLS"
"""PEFT's name of what a score model does."""

PEFT_VERSION = "0.17.0"
"""The version whose words we write; PEFT asks for none, but tells readers of it."""


def save_adapter(
    model: Headed,
    name: str,
    directory: Path,
    base: Path,
    tensors: dict[str, Tensor] | None = None,
    called: Path | None = None,
) -> None:
    """Write an adapter as PEFT does; what PEFT has no word for is readable here alone.

    Args:
        model: Holds it.
        name: The adapter.
        directory: Gets ``adapter_config.json``, ``adapter_model.safetensors`` and ``base.json``.
        base: Where the base lies.
        tensors: What ``tensors_of(model, name)`` gave, where others had to take part in it.
        called: What the base was asked for by; a name on the hub, perhaps.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(model, name) if tensors is None else tensors
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    values = _record(model, name)
    # A path is whole, so that it is found from anywhere; names on the hub stay what they are.
    called = called or base
    called = called.resolve() if called.exists() else called
    write_json(directory / CONFIG, values | {"base_model_name_or_path": called.as_posix()})
    facts: dict[str, Any] = {"weights": weights_hash(base)}
    config: AdapterConfig = model.adapters[name]
    if "peft_type" in values:
        facts["settings"] = {field: getattr(config, field) for field in config.unknown_to_peft}
    if isinstance(model, ScoreModel):
        facts["reward_form"] = model.config.reward_form
    write_json(directory / BASE, facts)


def tensors_of(model: Headed, name: str) -> dict[str, Tensor]:
    """An adapter's tensors as files name them: whole, contiguous, on the CPU.

    All ranks of a sharded model must ask; rank 0 is told.
    """
    return {
        key: stored(tensor).contiguous()
        for prefix, part in _parts(model, name).items()
        for key, tensor in _named(prefix, _stored(part)).items()
    }


def _parts(model: Headed, name: str) -> dict[str, torch.nn.Module]:
    """The modules of an adapter, by what stands before their tensors' names in files."""
    around = slots(model)
    parts = learnt_parts(model, name)
    return {_prefix(model, path, around[path]): part for path, part in parts.items()}


def _prefix(model: Headed, path: str, slot: Slot) -> str:
    """What stands beside no part of the model, such as a prompt, has no path in PEFT either."""
    beside = isinstance(slot, (Adapted, TokenSlot, Whole))
    return f"{PREFIX}{outer_path(model, path)}." if beside else ""


def _stored(part: torch.nn.Module) -> dict[str, Tensor]:
    if isinstance(part, Part):
        return part.stored()
    return {name: weight.detach() for name, weight in part.named_parameters()}


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _record(model: Headed, name: str) -> dict[str, Any]:
    """``adapter_config.json``, but for the base."""
    config: AdapterConfig = model.adapters[name]
    values = described(config)
    scores = isinstance(model, ScoreModel)
    values["task_type"] = SCORES if scores else "CAUSAL_LM"
    if "peft_type" not in values:
        return values
    values |= {"inference_mode": True, "peft_version": PEFT_VERSION}
    whole = [outer_path(model, end) for end in config.modules_to_save]
    values["modules_to_save"] = [*whole, *(["score"] if scores else [])] or None
    if "target_modules" in values:
        values |= _layers(model, name, values)
        # Whether the layers' weights lie transposed, as GPT-2's do.
        values["fan_in_fan_out"] = model.config.family == "gpt2"
    return values | config.settings_in(model, name)


def _layers(model: Headed, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The fields that name layers, so that they mean the same ones to PEFT.

    Ends of names do. Whole paths, `all-linear` and patterns are spelled out: what they mean depends
    on who reads them.
    """
    around, targets = slots(model), values["target_modules"]
    paths = [path for path in learnt_parts(model, name) if isinstance(around[path], Adapted)]
    fields: dict[str, Any] = {
        field: _pattern(model, paths, values[field])
        for field in ("rank_pattern", "alpha_pattern")
        if values.get(field)
    }
    if targets == ALL_LINEAR and len(paths) == len(linear_layers(model)):
        fields["target_modules"] = sorted({path.rpartition(".")[2] for path in paths})
    elif isinstance(targets, str) or any(target.startswith("model.") for target in targets):
        fields["target_modules"] = [outer_path(model, path) for path in paths]
        if "layers_to_transform" in values:
            fields["layers_to_transform"] = None
    return fields


def _pattern(model: Headed, paths: list[str], patterns: dict[str, Any]) -> dict[str, Any]:
    """Values by patterns, which are spelled out where they would not fit the same layers there."""
    here = {path: by_pattern(names_of(model, path), patterns, None) for path in paths}
    there = {path: by_pattern([outer_path(model, path)], patterns, None) for path in paths}
    if here == there:
        return patterns
    return {
        re.escape(outer_path(model, p)): value for p, value in here.items() if value is not None
    }


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter."""
    return (directory / CONFIG).exists()


def load_adapter(
    model: Headed, directory: Path, name: str = DEFAULT, base: Path | None = None
) -> AdapterConfig:
    """Put an adapter into a model, and let it speak.

    Args:
        model: The base; as it was, should the adapter not fit.
        directory: Ours, or PEFT's own.
        name: What to call it.
        base: Where the model was read from: checked against what the adapter was learnt on.

    Raises:
        UserError: Not an adapter, one of a kind that is not known, or one for another base.
    """
    values = read_record(directory)
    if values.get("task_type") == SCORES and not isinstance(model, ScoreModel):
        raise UserError(
            f"{directory} is the adapter of a reward model, and this is a language model",
            "Name an adapter of a language model.",
        )
    if base is not None:
        check_base(directory, base)
    check_free(model, name)
    tensors = _read_tensors(directory)
    config = read_method(directory)
    try:
        put_all_in(model, config, name, torch.Generator().manual_seed(0))
        if values.get("task_type") != SCORES:  # a reward model may begin as a language model
            tensors |= {k: w for k, w in tensors_of(model, name).items() if k.startswith(HEAD)}
        _fill(model, name, tensors)
    except UserError as error:
        remove(model, name)
        problem = f"{directory} does not fit this base: {error.problem}"
        remedy = f"{error.remedy} Or name the base that it was learnt on (--base)."
        raise UserError(problem, remedy) from None
    except ValueError as error:
        remove(model, name)
        raise UserError(
            f"{directory} does not fit this base: {error}",
            "Name the base that it was learnt on (--base).",
        ) from None
    activate(model, name)
    return config


def _fill(model: Headed, name: str, tensors: dict[str, Tensor]) -> None:
    """Every tensor has its place, and every place its tensor; ``ValueError`` otherwise."""
    left = dict(tensors)
    for prefix, part in _parts(model, name).items():
        within = [key for key in left if key.startswith(prefix)] if prefix else _bare(left)
        own = {key.removeprefix(prefix): left.pop(key) for key in within}
        try:
            if isinstance(part, Part):
                part.fill(own)
            else:
                with torch.no_grad():
                    take(dict(part.named_parameters()), own)
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from None
    if left:
        raise ValueError(f"{min(left)} has no place here")


def _bare(tensors: Iterable[str]) -> list[str]:
    """The names of tensors that belong to no part of the model."""
    return [key for key in tensors if not key.startswith(PREFIX)]


def read_record(directory: Path) -> dict[str, Any]:
    """``adapter_config.json``; ``UserError`` where there is none."""
    if not is_adapter(directory):
        raise UserError(f"{directory} is no adapter: it has no {CONFIG}", "Name another directory.")
    values = read_json(directory / CONFIG)
    if not isinstance(values, dict):
        raise UserError(f"{directory / CONFIG} does not hold an object", "Write it again.")
    return values


def read_method(directory: Path) -> AdapterConfig:
    """The method of an adapter and its settings, also those that PEFT has no word for.

    Raises:
        UserError: There is no adapter, or it asks for something that is not here.
    """
    config = understood(read_record(directory))
    settings = _facts(directory).get("settings")
    if not settings:
        return config
    return type(config).parse(config.model_dump() | settings, str(directory / BASE))


def _facts(directory: Path) -> dict[str, Any]:
    """What ``save_adapter`` wrote beside; PEFT writes none."""
    return read_json(directory / BASE) if (directory / BASE).exists() else {}


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    try:
        return load_file(directory / WEIGHTS)
    except FileNotFoundError:
        raise UserError(
            f"{directory} has no {WEIGHTS}", "Save it with PEFT's safe_serialization."
        ) from None
    except SafetensorError as error:
        raise UserError(f"{directory / WEIGHTS} is damaged ({error})", "Write it again.") from None


def weights_hash(base: Path) -> str | None:
    """A hash of a base's weights; none where they do not lie in a directory here."""
    files = sorted(base.glob("*.safetensors"))
    return hash_value([hash_file(file) for file in files]) if files else None


def check_base(directory: Path, base: Path) -> None:
    """See that an adapter was learnt on these very weights, where that is written down.

    Raises:
        UserError: It was learnt on others.
    """
    recorded, found = _facts(directory).get("weights"), weights_hash(base)
    if None not in (recorded, found) and recorded != found:
        raise UserError(
            f"{directory} was learnt on other weights than those in {base}",
            "Name the base that it was learnt on (--base).",
        )


def base_name(directory: Path) -> Path:
    """An adapter's base: a directory as it is written or beside the adapter, or a name on the hub.

    Raises:
        UserError: The adapter names none.
    """
    written = read_record(directory).get("base_model_name_or_path")
    if not written:
        raise UserError(f"{directory} names no base", "Say where the base lies (--base).")
    # A life that was moved still has its base beside the adapter, under the same name.
    for place in (Path(written), directory / written, directory.parent / Path(written).name):
        if (place / "config.json").exists():
            return place
    return Path(written)


def base_of(directory: Path) -> Path:
    """Where an adapter's base lies; fetched from the hub if it is not here.

    Raises:
        UserError: It is nowhere, or a revision of it is meant that is not the hub's first choice.
    """
    name, revision = base_name(directory), read_record(directory).get("revision")
    if revision not in (None, "main") and not name.exists():
        raise UserError(
            f"{directory}: its base is {name} in the revision {revision}, and only main is fetched",
            f"`hf download {name} --revision {revision}`, and say where that lies (--base).",
        )
    try:
        return located(name)
    except UserError as error:
        raise UserError(
            f"{directory}: its base {name} is not there ({error.problem})",
            "Say where the base lies, as a directory (--base).",
        ) from None


def reward_form(directory: Path) -> RewardForm:
    """How the reward model that an adapter belongs to makes a reward of its scores."""
    return _facts(directory).get("reward_form", "last")


def holds_scores(directory: Path) -> bool:
    """Whether a directory holds a reward model or a critic, or an adapter of one."""
    if is_adapter(directory):
        return read_record(directory).get("task_type") == SCORES
    path = directory / "config.json"
    heads = read_json(path).get("architectures") if path.exists() else None
    return bool(heads) and heads[0].endswith("ForSequenceClassification")
