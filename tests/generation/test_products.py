"""One matrix in its several forms."""

from __future__ import annotations

import torch

from instar.generation import products
from instar.generation.products import Eight, in_eight_bits


def test_eight_bits_that_are_cast_give_torchs_own_product() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = Eight(torch.randn(48, 64, generator=generator), None)
    x = torch.randn(5, 64, generator=generator).bfloat16()
    cast = products._cast_product(x, matrix.weight, matrix.scale)
    assert cast.dtype == matrix(x).dtype
    # Each is rounded to eight bits once or twice.
    assert torch.allclose(cast.float(), matrix(x).float(), rtol=2**-6, atol=1e-3)


def test_each_row_is_rounded_to_whole_numbers_of_its_own_scale():
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    weight[2, 7] = -400.0  # an outlier makes its own row coarse, and no other
    whole, scale = in_eight_bits(weight)
    assert whole.dtype == torch.int8 and whole.shape == weight.shape
    assert torch.equal(scale, weight.abs().amax(dim=1) / 127)
    # In every row the largest number is written with the largest code; no code is -128.
    assert whole.int().abs().amax(dim=1).tolist() == [127] * 6
    assert whole[2, 7] == -127
    errors = (whole * scale[:, None] - weight).abs()
    assert (errors <= scale[:, None] / 2 * (1 + 1e-5)).all()
    assert errors[2].max() > 0.5 and errors[[0, 1, 3, 4, 5]].max() < 0.02


def test_a_row_of_zeros_stays_zero():
    weight = torch.zeros(2, 8)
    weight[0, 3] = 1.0
    whole, scale = in_eight_bits(weight)
    assert not whole[1].any() and scale.isfinite().all()
    assert torch.equal(whole * scale[:, None], weight)
