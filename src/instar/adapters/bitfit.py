"""BitFit: only biases learn."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from instar.adapters.base import AdapterConfig, put_in
from instar.adapters.slots import Delta, matrix, sizes
from instar.adapters.targets import ALL_LINEAR, Targets, frozen, targeted
from instar.model.transformer import Headed


class BitFitConfig(AdapterConfig):
    """Bias-term fine-tuning (Ben Zaken et al. 2021, arXiv:2106.10199).

    Our families have few biases or none, so each layer is given one that begins at zero; where
    there is one already, the sum is what learns. Norms learn as well when `modules_to_save` names
    them. PEFT has no such method.
    """

    method: Literal["bitfit"] = "bitfit"  # type: ignore[assignment]
    """Which method."""
    targets: Targets = ALL_LINEAR
    """The layers that are given a bias."""

    def install(self, model: Headed, name: str, generator: torch.Generator) -> None:
        """Biases of zero."""
        for path in targeted(model, self.targets):
            put_in(model, path, name, BitFit(sizes(frozen(model, path))[1]))


class BitFit(Delta):
    """``y = W x + b + delta``.

    Args:
        outputs: Of the layer.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Float[Tensor, "... i"], base: nn.Module) -> Float[Tensor, "... o"]:
        """The layer's output, moved."""
        y = base(x)
        return y + self.bias.to(y.dtype)

    def merged(self, base: nn.Module) -> tuple[Float[Tensor, "o i"], Float[Tensor, " o"]]:
        """The weight as it is, and the sum of the biases."""
        weight = matrix(base)
        own = self.bias.to(weight.dtype)
        return weight, own if base.bias is None else base.bias + own  # type: ignore[operator]
