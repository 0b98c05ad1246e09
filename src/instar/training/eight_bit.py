"""Eight bits where sixteen or thirty-two are usual: optimizer states and products, by torchao."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn

from instar.errors import UserError, installing
from instar.model.transformer import Headed

GRAIN = 16
"""Eight-bit products need matrices whose sides are multiples of this."""


def adamw(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """AdamW whose moments are kept in eight bits, with a scale for every block of 256.

    Dettmers et al. 2021 (arXiv:2110.02861): two bytes a weight instead of eight.
    """
    return _torchao().optim.AdamW8bit(groups, **settings)


def float8_products(model: Headed) -> None:
    """Let a model's blocks multiply in float8, forward and backward, in place.

    Each tensor is scaled to the format's range by its own largest value (Micikevicius et al.
    2022, arXiv:2209.05433). Weights stay as they are; embeddings and heads are left alone.

    Raises:
        UserError: The device does not know the format.
    """
    device = next(model.parameters()).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            "training.precision is float8, which needs a GPU of the Ada or Hopper generation or "
            "newer",
            "Use auto.",
        )
    _torchao().float8.convert_to_float8_training(model.model.blocks, module_filter_fn=_fits)


def _fits(module: nn.Module, name: str) -> bool:
    """Whether a layer's matrix has sides that the hardware can take."""
    is_linear = isinstance(module, nn.Linear)
    return is_linear and not (module.in_features % GRAIN or module.out_features % GRAIN)


def _torchao() -> ModuleType:
    try:
        import torchao.float8  # pyright: ignore[reportMissingImports]
        import torchao.optim  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("adamw8bit and float8 need torchao", installing("gpu")) from None
    return torchao
