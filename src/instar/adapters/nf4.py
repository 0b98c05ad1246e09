"""NF4: a frozen base in four bits a weight, under adapters that learn (QLoRA).

Dettmers et al. 2023, arXiv:2305.14314, section 3.

Shapes: I inputs, O outputs of a layer, n = O I weights.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from instar.adapters.packed import Packed
from instar.adapters.slots import Adapted, matrix
from instar.adapters.targets import linear_layers
from instar.model.gpt2 import Conv1D
from instar.model.layers import product_dtype
from instar.model.transformer import Headed

BLOCK = 64
"""Weights that share one scale, their largest magnitude."""

SCALES = 256
"""Scales that share a scale of their own, in eight bits each (double quantisation)."""

ROUTER = ".gate"
"""End of the name of a mixture's router. It is small, and what it chooses hangs by a hair."""


def levels() -> list[float]:
    """The 16 numbers of NormalFloat4, from -1 to 1 with an exact zero (section 3 and appendix E).

    Quantiles of the normal distribution, so that each is used equally often by weights that are
    normal: 8 of the positive half and 7 of the negative one, zero between them, divided by the
    largest. The outermost quantile leaves out the mean of 1/32 and 1/30, half a step of 16 levels
    and of 15, since a tail's end would be infinite.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    normal = NormalDist()

    def half(count: int) -> list[float]:
        step = (outermost - 0.5) / count
        return [normal.inv_cdf(outermost - i * step) for i in range(count)]

    positive, negative = half(8), half(7)
    largest = positive[0]
    return sorted([*(q / largest for q in positive), 0.0, *(-q / largest for q in negative)])


LEVELS = torch.tensor(levels(), dtype=torch.float64).float()


LEAST = 1e-30
"""The smallest scale; weights below it are nothing beside others."""


@cache
def pairs(device: torch.device) -> Int64[Tensor, " 256"]:
    """The two levels that each byte stands for, the first in its upper half.

    Both lie in one number of 64 bits, so that they are fetched at once: measured on a CPU, two to
    four times as fast as rows of two.
    """
    return torch.cartesian_prod(LEVELS, LEVELS).view(torch.int64).flatten().to(device)


def encode(weights: Float[Tensor, " n"], scales: Float[Tensor, " blocks"]) -> UInt8[Tensor, " _"]:
    """The nearest levels, two a byte.

    Args:
        weights: A multiple of ``BLOCK`` of them.
        scales: Of each block.
    """
    borders = ((LEVELS[1:] + LEVELS[:-1]) / 2).to(weights.device)
    units = weights.view(-1, BLOCK) / scales[:, None]
    codes = torch.bucketize(units, borders).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1]


class NF4Linear(Packed):
    """A frozen linear layer whose weight is stored in NF4, about 4.13 bits each.

    The scales are stored in eight bits (section 3, "Double Quantization"): as steps of their
    logarithm, where the paper has 8-bit floats. One weight far out makes a coarse step of no more
    than some per cent for the 256 scales beside it.

    Args:
        weight: Of the layer to store.
        bias: Its bias, kept as it is.
    """

    codes: Tensor
    scale_codes: Tensor
    constants: Tensor
    bias: Tensor | None

    def __init__(self, weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        flat = weight.detach().float().flatten()
        flat = F.pad(flat, (0, -len(flat) % BLOCK))
        scales = flat.view(-1, BLOCK).abs().amax(dim=1)
        groups = F.pad(scales, (0, -len(scales) % SCALES)).view(-1, SCALES)
        highest = groups.amax(dim=1, keepdim=True)
        # Zeros decode to zeros with any scale; theirs is to make no step wider.
        logs = torch.where(groups > 0, groups, highest).clamp(min=LEAST).log()
        lowest = logs.amin(dim=1)
        steps = (logs.amax(dim=1) - lowest) / 255
        codes = (logs - lowest[:, None]) / steps.clamp(min=LEAST)[:, None]
        codes = codes.round().to(torch.uint8).flatten()
        self.register_buffer("scale_codes", codes[: len(scales)].clone())
        # As bytes: a model that is moved to another float type keeps them as they are.
        self.register_buffer("constants", torch.cat([lowest, steps]).view(torch.uint8))
        self.register_buffer("codes", encode(flat, self._scales()))
        self.register_buffer("bias", None if bias is None else bias.detach())

    def _scales(self) -> Float[Tensor, " blocks"]:
        """The blocks' scales, as they are stored: weights are encoded by what they decode with."""
        constants = self.constants.view(torch.float32).view(2, -1)
        lowest, steps = constants.repeat_interleave(SCALES, dim=1)[:, : len(self.scale_codes)]
        return (self.scale_codes * steps + lowest).exp()

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The weight in float32, or in the bias's type."""
        return self.unpacked(torch.float32 if self.bias is None else self.bias.dtype)

    @torch.no_grad()
    def unpacked(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        """The weight, decoded anew.

        Args:
            dtype: Its format; levels are scaled in float32 before.
        """
        both = pairs(self.codes.device).index_select(0, self.codes.int()).view(torch.float32)
        flat = both.view(-1, BLOCK).mul_(self._scales()[:, None]).view(-1)
        shape = (self.out_features, self.in_features)
        return flat[: self.out_features * self.in_features].view(shape).to(dtype)

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """The product in the input's format, or in autocast's."""
        return _Product.apply(x, self, product_dtype(x))  # type: ignore[return-value]


class _Product(torch.autograd.Function):
    """``y = x W' + b`` with ``dL/dx = g W``: W is decoded twice instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return F.linear(x.to(dtype), layer.unpacked(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return (grad @ ctx.layer.unpacked(grad.dtype)).to(ctx.dtype), None, None


@torch.no_grad()
def quantize(model: Headed) -> None:
    """Store the blocks' linear layers in NF4, in place; embeddings, norms and heads stay.

    Adapters are put in afterwards; merging one decodes every layer again.

    Raises:
        ValueError: There are adapters in the model already.
    """
    layers = linear_layers(model)
    if any(isinstance(layer, Adapted) for layer in layers.values()):
        raise ValueError("the base is quantised before adapters are put in, not after")
    for path, layer in layers.items():
        if not isinstance(layer, Packed) and not path.endswith(ROUTER):
            parent, _, child = path.rpartition(".")
            bias: Any = layer.bias
            packed = NF4Linear(matrix(layer), bias)
            packed.transposed = isinstance(layer, Conv1D)
            setattr(model.get_submodule(parent), child, packed)


def stored_bytes(layer: nn.Module) -> int:
    """Bytes that a layer takes in memory."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
