"""Which layers learn, how fast, and from when on: the classical ways to fine-tune with care."""

from __future__ import annotations

import re
from typing import Annotated

from annotated_types import Ge, Gt, Le
from torch import nn

from instar.config import Config
from instar.errors import UserError
from instar.model.transformer import Headed


class LayersConfig(Config):
    """Layer-wise learning; by default all layers learn alike, from the first step on."""

    freeze: list[str] = []
    """Parts that never learn, as regular expressions for whole pieces of parameters' names:
    `embed_tokens`, `layers.[0-2]`, `mlp`."""
    lr_decay: Annotated[float, Gt(0), Le(1)] = 1.0
    """What the learning rate is multiplied by from each block to the one below it (discriminative
    fine-tuning; Howard & Ruder 2018, arXiv:1801.06146, section 3.2, divide by 2.6)."""
    unfreeze_every: Annotated[int, Ge(0)] = 0
    """Steps after which one more block learns, from the top down: gradual unfreezing (the same,
    section 3.3). 0 lets all learn at once."""


LOWEST = re.compile(r"embed_tokens|wte|wpe|\.prefix\.")
"""What stands below all blocks: embeddings, and virtual tokens before the text."""


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Stop the parameters that a pattern fits from learning.

    Raises:
        UserError: A pattern fits nothing, or nothing is left to learn.
    """
    for pattern in patterns:
        try:
            fits = re.compile(rf"(^|\.)({pattern})(\.|$)")
        except re.error as error:
            raise UserError(
                f"training.layers.freeze: {pattern!r} is no pattern ({error})", "Mend it."
            ) from None
        found = [p for name, p in model.named_parameters() if fits.search(name)]
        if not found:
            raise UserError(
                f"training.layers.freeze: {pattern!r} fits no parameter",
                "Names are like model.layers.0.mlp.up_proj.weight.",
            )
        for p in found:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("training.layers.freeze leaves nothing to learn", "Freeze less.")


def heights(model: nn.Module) -> dict[nn.Parameter, int]:
    """How far below the head each parameter of the models stands.

    Head and last normalisation are at 0, the last block at 1; embeddings, and virtual tokens,
    stand below all blocks.
    """
    below: dict[nn.Parameter, int] = {}
    for headed in model.modules():
        if isinstance(headed, Headed):
            blocks = headed.config.num_hidden_layers
            for name, p in headed.named_parameters():
                if block := re.search(r"\.(?:layers|h)\.(\d+)\.", name):
                    below[p] = blocks - int(block[1])
                else:
                    below[p] = blocks + 1 if LOWEST.search(name) else 0
    return below


def rate_factors(model: nn.Module, lr_decay: float) -> dict[nn.Parameter, float]:
    """What each parameter's learning rate is multiplied by, where that is not 1."""
    if lr_decay == 1:
        return {}
    return {p: lr_decay**height for p, height in heights(model).items()}


class Thawing:
    """Lets one more block learn every so many steps, from the top down.

    Args:
        model: Whose parameters; those that do not learn now never will.
        every: Steps from block to block; 0 changes nothing.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        self.every = every
        self._heights = {p: h for p, h in heights(model).items() if p.requires_grad}

    def at(self, step: int) -> None:
        """Before a step: who learns in it."""
        if self.every:
            for p, height in self._heights.items():
                # The last block learns from the beginning, with the head.
                p.requires_grad_(height <= 1 + step // self.every)
