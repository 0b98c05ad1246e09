"""PEFT's words: what its `adapter_config.json` may ask of us, and how it names layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from instar.errors import UserError
from instar.model.stored import BODIES, file_name
from instar.model.transformer import Headed

OF_NO_MATTER = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
"""Fields that change nothing about what an adapter does, or that are read elsewhere."""


def only(values: dict[str, Any], known: Collection[str]) -> None:
    """Refuse a record that asks for what a method does not have.

    Every version of PEFT adds fields that are empty unless one wants them: so a field that is
    neither known nor empty is wanted.

    Args:
        values: What `adapter_config.json` holds.
        known: The fields that the method reads.

    Raises:
        UserError: Another field is set.
    """
    for name, value in values.items():
        if value and name not in OF_NO_MATTER and name not in known:
            raise UserError(
                f"adapter_config.json: `{name}` is {value!r}, which instar does not have",
                "Merge that adapter with PEFT, and read the merged model.",
            )


def targets_of(values: dict[str, Any], name: str = "target_modules") -> list[str] | str:
    """The layers that PEFT's field names, in our words; ``UserError`` where it names none."""
    targets = values.get(name)
    if not targets:
        raise UserError(f"adapter_config.json: `{name}` is {targets!r}", "Name layers in it.")
    if isinstance(targets, str):
        return targets
    return sorted(_paths(values, name))


def _paths(values: dict[str, Any], name: str) -> list[str]:
    """The modules that a field lists, by their paths here; ``UserError`` where it lists others."""
    paths = values.get(name) or []
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise UserError(f"adapter_config.json: `{name}` is {paths!r}", "List modules' names in it.")
    return [inner_path(path) for path in paths]


def blocks_of(values: dict[str, Any]) -> list[int] | None:
    """The blocks that `layers_to_transform` names, if it names some."""
    blocks = values.get("layers_to_transform")
    return [blocks] if isinstance(blocks, int) else blocks


def whole_parts_of(values: dict[str, Any]) -> list[str]:
    """The parts that `modules_to_save` names; a score model's head goes without saying."""
    ends = _paths(values, "modules_to_save")
    heads = ("classifier", "score") if values.get("task_type") == "SEQ_CLS" else ()
    return sorted(end for end in ends if end not in heads)


def inner_path(path: str) -> str:
    """A module's path here, from the one it has in transformers."""
    for outer in BODIES.values():
        if path.startswith(outer):
            return "model." + path.removeprefix(outer)
    return path


def outer_path(model: Headed, path: str) -> str:
    """A module's path in transformers, from the one it has here."""
    return file_name(path, model.config.family)


def names_of(model: Headed, path: str) -> tuple[str, str]:
    """A module's paths here and in transformers: patterns may be meant for either."""
    return path, outer_path(model, path)


def by_pattern(names: Iterable[str], patterns: dict[str, Any], otherwise: Any) -> Any:
    """The value of the first pattern that fits the end of a name, as PEFT looks things up."""
    for pattern, value in patterns.items():
        if any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names):
            return value
    return otherwise
