"""DoRA: LoRA turns each row of a matrix, a vector of its own gives the rows their lengths.

Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from instar.adapters.lora import LoRA, LowRankConfig, added
from instar.adapters.slots import matrix, sizes


class DoRAConfig(LowRankConfig):
    """DoRA; dropout leaves out inputs of A only, so that the base's product is made once."""

    method: Literal["dora"] = "dora"  # type: ignore[assignment]
    """DoRA."""

    def made(self, base: nn.Module, rank: int, scale: float) -> DoRA:
        """A, B and the rows' lengths."""
        return DoRA(base, rank, scale, self.dropout)

    def to_peft(self) -> dict[str, Any]:
        """PEFT's `LoraConfig` with its mark for DoRA."""
        return super().to_peft() | {"use_dora": True}


class DoRA(LoRA):
    """``y = m (W + scale * B A) x / ||W + scale * B A||``, row by row (eq. 5).

    The paper's columns are rows here, where a weight is (O, I): each output has a length. The norm
    counts as a constant of the gradient (section 4.3).

    Args:
        base: The frozen layer.
        rank: r.
        scale: What the product is multiplied by.
        dropout: Share of A's inputs that are left out while training.
    """

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(*sizes(base), rank, scale, dropout)
        lengths = matrix(base).detach().float().norm(dim=1)
        self.lora_magnitude_vector = nn.Parameter(lengths.clone())
        self.lengths: Tensor
        self.register_buffer("lengths", lengths, persistent=False)

    @torch.no_grad()
    def norms(self, base: nn.Module) -> Float[Tensor, " o"]:
        """The length of each row of ``W + scale * B A``, without making that matrix.

        ``||w + s b A||^2 = ||w||^2 + 2 s b (A w) + s^2 b (A A') b'`` for rows w of W and b of B.
        """
        a, b, w = self.lora_A.weight, self.lora_B.weight, matrix(base)
        with torch.autocast(w.device.type, enabled=False):
            across = (w @ a.to(w.dtype).mT).to(b.dtype)
            inner = b @ (a @ a.mT)
            change = (b * (2 * self.scale * across + self.scale**2 * inner)).sum(dim=1)
            return (self.lengths.square() + change).sqrt()

    def forward(self, x: Float[Tensor, "... i"], base: nn.Module) -> Float[Tensor, "... o"]:
        """The direction's output, each channel brought to its length."""
        bias = getattr(base, "bias", None)
        y = base(x) if bias is None else base(x) - bias
        y = added(y, F.dropout(x, self.dropout, self.training), *self.factors(), self.scale)
        factor = self.lora_magnitude_vector / self.norms(base)
        y = y * factor.to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def merged(self, base: nn.Module) -> tuple[Float[Tensor, "o i"], Float[Tensor, " o"] | None]:
        """``m (W + scale * B A) / ||W + scale * B A||``."""
        weight, bias = super().merged(base)
        factor = self.lora_magnitude_vector / self.norms(base)
        return (weight * factor[:, None]).to(weight.dtype), bias

    def stored(self) -> dict[str, Tensor]:
        """A, B and the lengths."""
        return super().stored() | {"lora_magnitude_vector": self.lora_magnitude_vector.detach()}
