"""One matrix, kept in the form in which a processor multiplies by it fastest."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Format = Literal["float32", "bfloat16", "int8"]
"""Of a matrix."""


class Product(Protocol):
    """``y = x W' + b``; takes any format of ``x`` and gives that of its weights."""

    def __call__(self, x: Tensor) -> Tensor:
        """The product, along the last axis."""
        ...


class Plain:
    """A matrix as it is.

    Args:
        weight: ``(outputs, inputs)``.
        bias: Added, if there is one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """The product, along the last axis."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Packed:
    """A matrix in oneDNN's own order of blocks, which spares it to sort them at every call.

    Its sums are cut in the same places for any number of rows, so that a row's result is the same
    bits in any company; a single float32 row may go another way, and is therefore doubled.

    Args:
        weight: ``(outputs, inputs)``, on a processor.
        bias: Added, if there is one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.dtype, self.bias = weight.dtype, bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def __call__(self, x: Tensor) -> Tensor:
        """The product, along the last axis."""
        return _packed(x.to(self.dtype), self.weight, self.bias)


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float32 and x.numel() == x.shape[-1]:
        twice = torch.cat((x, x)) if x.dim() == 2 else torch.cat((x, x), dim=0)
        return torch.ops.mkldnn._linear_pointwise(twice, weight, bias, "none", [], "")[:1]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Eight:
    """A matrix ``in_eight_bits``: half the bytes of bfloat16; sums are taken in float32.

    Args:
        weight: ``(outputs, inputs)``.
        bias: Added, if there is one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, scale = in_eight_bits(weight)
        self.scale, self.bias = scale.bfloat16(), bias

    def __call__(self, x: Tensor) -> Tensor:
        """The product, along the last axis."""
        flat = x.to(torch.bfloat16).reshape(-1, x.shape[-1])
        multiply = _cast_product if flat.is_cuda else torch.ops.aten._weight_int8pack_mm
        y = multiply(flat, self.weight, self.scale)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _cast_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """What torch's own product is on a processor; its kernel for GPUs is slow.

    Whole numbers of eight bits are exact in bfloat16.
    """
    return F.linear(x, weight.to(x.dtype)) * scale


def in_eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as whole numbers and a scale: ``W = q s`` with ``s = max |W| / 127``.

    Dettmers et al. 2022, arXiv:2208.07339, section 2; ``native`` rounds inputs as well.

    Args:
        weight: ``(outputs, inputs)``, float32.

    Returns:
        ``q``, int8, and ``s (outputs,)``, float32.
    """
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def product_of(format: Format, weight: Tensor, bias: Tensor | None) -> Product:
    """The fastest of these for a format and the device on which the weight lies.

    Args:
        format: Of the matrix that is kept.
        weight: ``(outputs, inputs)``, float32.
        bias: Added, if there is one.
    """
    if format == "int8":
        return Eight(weight, bias)
    dtype = torch.float32 if format == "float32" else torch.bfloat16
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return Packed(weight, bias) if _packs(dtype, weight.device) else Plain(weight, bias)


def _packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies by matrices of its own order there: bfloat16 asks for AVX-512."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
