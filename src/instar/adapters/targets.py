"""Which layers are meant: linear layers of the blocks, by names and patterns."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator
from torch import nn

from instar.adapters.packed import Packed
from instar.adapters.peft_fields import names_of
from instar.adapters.slots import Adapted, Whole
from instar.errors import UserError
from instar.model.gpt2 import Conv1D
from instar.model.transformer import Headed

ALL_LINEAR = "all-linear"
"""Every linear layer of the blocks, but for experts and who chooses among them; heads and
embeddings are none of them."""

OF_EXPERTS = re.compile(r"\.mlp\.(gate|experts\..*)$")
"""Routers and experts: PEFT, for whom all experts are one tensor, has no such layers."""


def _one_word(targets: list[str] | str) -> list[str] | str:
    """On a command line one word is a list, too; names have letters, digits, `_` and dots."""
    if isinstance(targets, list) and len(targets) == 1:
        [word] = targets
        return word if word == ALL_LINEAR or re.search(r"[^\w.]", word) else targets
    return targets


Targets = Annotated[list[str] | str, AfterValidator(_one_word)]
"""Layers by the end of their names (a list), by a regular expression, or ``all-linear``."""


LINEAR = (nn.Linear, Conv1D, Packed, Adapted)
"""What counts as a linear layer."""


def frozen(model: Headed, path: str) -> nn.Module:
    """The layer of the base at a path, whatever sits around it."""
    layer = model.get_submodule(path)
    return layer.base if isinstance(layer, (Adapted, Whole)) else layer


def linear_layers(model: Headed) -> dict[str, nn.Module]:
    """Every linear layer of the blocks by its path, such as `model.layers.0.mlp.up_proj`.

    Where a slot stands around it, it is the slot that is given.
    """
    found: dict[str, nn.Module] = {}
    blocks = set(model.model.blocks)
    for path, module in model.named_modules():
        if module in blocks:
            found |= {f"{path}.{inner}": layer for inner, layer in _linear_in(module).items()}
    return found


def _linear_in(block: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    last = "nothing yet"
    for path, module in block.named_modules():  # what is inside a module follows it at once
        if not path.startswith(f"{last}.") and isinstance(module, LINEAR):
            found[path] = module
            last = path
    return found


def targeted(model: Headed, targets: Targets) -> list[str]:
    """The paths of the layers that are meant.

    Args:
        model: Whose layers.
        targets: ``all-linear``, ends of names (`q_proj`, `layers.0.mlp.up_proj`), or one regular
            expression that fits whole paths, as they are here or in transformers.

    Raises:
        UserError: Some of it matches no layer.
    """
    paths = list(linear_layers(model))
    kinds = sorted({path.rsplit(".", 1)[1] for path in paths})
    remedy = f"The linear layers of this model are: {', '.join(kinds)}."
    if targets == ALL_LINEAR:
        return [path for path in paths if not OF_EXPERTS.search(path)]
    if isinstance(targets, str):
        try:
            fits = re.compile(targets).fullmatch
            found = [path for path in paths if any(map(fits, names_of(model, path)))]
        except re.error as error:
            raise UserError(f"targets: {targets!r} is no pattern ({error})", remedy) from None
        if not found:
            raise UserError(f"targets: {targets!r} matches no layer", remedy)
        return found
    for target in targets:
        if not any(_ends(path, target) for path in paths):
            raise UserError(f"targets: {target!r} matches no layer", remedy)
    if not targets:
        raise UserError("targets is empty", remedy)
    return [path for path in paths if any(_ends(path, target) for target in targets)]


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
