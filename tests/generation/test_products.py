"""One matrix in its several forms."""

from __future__ import annotations

import torch

from instar.generation import products
from instar.generation.products import Eight


def test_eight_bits_that_are_cast_give_torchs_own_product() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = Eight(torch.randn(48, 64, generator=generator), None)
    x = torch.randn(5, 64, generator=generator).bfloat16()
    cast = products._cast_product(x, matrix.weight, matrix.scale)
    assert cast.dtype == matrix(x).dtype
    # Each is rounded to eight bits once or twice.
    assert torch.allclose(cast.float(), matrix(x).float(), rtol=2**-6, atol=1e-3)
