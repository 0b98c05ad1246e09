"""What a block does to each token by itself."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """SwiGLU: a gated feed-forward (Shazeer 2020, arXiv:2002.05202, eq. 6).

    Args:
        width: Of the residual stream.
        inner: Hidden neurons.
        bias: Whether the three products have biases.
    """

    def __init__(self, width: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Widen, gate, narrow."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
