"""Bottleneck adapters: a small network of its own behind attention and feed-forward."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from instar.adapters.base import AdapterConfig, put_in
from instar.adapters.slots import Delta, sizes
from instar.adapters.targets import frozen, linear_layers, targeted
from instar.model.transformer import Headed

Activation = Literal["relu", "gelu", "silu"]

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}

AFTER = {"attention": ("o_proj", "attn.c_proj"), "feedforward": ("down_proj", "mlp.c_proj")}
"""The last layer of each half of a block, by the ends of its names in our families."""


class BottleneckConfig(AdapterConfig):
    """``h + up(activation(down(h)))`` on what a half of a block adds to the residual stream.

    Houlsby et al. 2019 (arXiv:1902.00751, section 2.1) put one behind attention and one behind the
    feed-forward; Pfeiffer et al. 2020 (arXiv:2005.00247, section 2.2.3) only the latter. In a
    mixture of experts each expert is given its own. Not a change of weights: PEFT has no such
    method, and it cannot be merged.
    """

    method: Literal["bottleneck"] = "bottleneck"  # type: ignore[assignment]
    """Which method."""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """`houlsby`: behind attention and feed-forward; `pfeiffer`: behind the feed-forward only."""
    width: Annotated[int, Gt(0)] = 64
    """Neurons between down and up."""
    activation: Activation = "gelu"
    """What stands between down and up."""

    def install(self, model: Headed, name: str, generator: torch.Generator) -> None:
        """Random ways down, and zeros on the way up: nothing changes at first."""
        halves = AFTER.values() if self.placement == "houlsby" else [AFTER["feedforward"]]
        paths = linear_layers(model)
        ends = [end for half in halves for end in half if any(p.endswith(end) for p in paths)]
        for path in targeted(model, ends):
            outputs = sizes(frozen(model, path))[1]
            put_in(model, path, name, Bottleneck(outputs, self.width, self.activation, generator))


class Bottleneck(Delta):
    """One such network.

    Args:
        outputs: Of the layer that it stands behind.
        width: Neurons in the middle.
        activation: What stands there.
        generator: Draws the down-projection.
    """

    def __init__(
        self, outputs: int, width: int, activation: Activation, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.down = nn.Linear(outputs, width)
        self.up = nn.Linear(width, outputs)
        self.activation = ACTIVATIONS[activation]
        with torch.no_grad():
            # As torch begins a linear layer: uniform within one over the root of its inputs.
            bound = outputs**-0.5
            self.down.weight.uniform_(-bound, bound, generator=generator)
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                zero.zero_()

    def forward(self, x: Float[Tensor, "... i"], base: nn.Module) -> Float[Tensor, "... o"]:
        """The layer's output, and what the network makes of it."""
        h = base(x)
        # Autocast sees to its own formats; without it, the adapter's decides.
        autocast = torch.is_autocast_enabled(h.device.type)
        own = h if autocast else h.to(self.down.weight.dtype)
        return h + self.up(self.activation(self.down(own))).to(h.dtype)
