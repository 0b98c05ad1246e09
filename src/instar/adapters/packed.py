"""Linear layers whose weights are stored smaller than they are."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class Packed(nn.Module):
    """A frozen linear layer whose weight is stored in another form, such as four bits.

    Attributes:
        in_features: Inputs.
        out_features: Outputs.
        bias: Added to the output, if anything is.
        transposed: Whether it stands for a layer whose weight lies the other way round, as GPT-2's.
    """

    in_features: int
    out_features: int
    bias: Tensor | None
    transposed: bool = False

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The weight, unpacked anew each time."""
        raise NotImplementedError
