"""The gradients that are written by hand, against autograd's of the plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from instar.model.layers import RMSNorm, rotary_tables, rotate


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("shape", [(3, 5, 32), (2, 7, 4, 16)])
def test_normalisation_has_autograds_gradient(
    shape: tuple[int, ...], generator: torch.Generator
) -> None:
    x = (3 * torch.randn(shape, generator=generator)).requires_grad_()
    upstream = torch.randn(shape, generator=generator)
    norm = RMSNorm(shape[-1], 1e-6)
    norm.weight.data.normal_(generator=generator)
    plain = F.rms_norm(x, shape[-1:], norm.weight, 1e-6)
    expected = torch.autograd.grad(plain, (x, norm.weight), upstream)
    torch.testing.assert_close(norm(x), plain, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(norm(x), (x, norm.weight), upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), plain, rtol=1e-6, atol=1e-6)


def test_normalisation_of_nothing_is_nothing() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y = RMSNorm(8, 1e-6)(x)
    y.sum().backward()
    assert not y.any()
    torch.testing.assert_close(x.grad, torch.full((2, 8), 1e3))  # w / sqrt(eps)


def test_gradients_are_right_to_the_last_digit(generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(8, 1e-6).double()
    assert torch.autograd.gradcheck(norm, x)
    cos, sin = rotary_tables(torch.arange(3)[None], 8, 10_000.0, torch.float64)
    assert torch.autograd.gradcheck(lambda y: rotate(y[None], cos, sin), x)


def test_sampling_and_learning_see_the_same_function(generator: torch.Generator) -> None:
    norm = RMSNorm(32, 1e-6)
    norm.weight.data.normal_(generator=generator)
    x = torch.randn(64, 32, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        learning = norm(x)
        with torch.no_grad():
            sampling = norm(x)
    # Where float32 rounds a sum in another order, bfloat16 may fall to the other side: rarely.
    assert (learning != sampling).float().mean() < 0.01


def test_under_autocast_products_get_their_format_and_weights_keep_theirs(
    generator: torch.Generator,
) -> None:
    x = torch.randn(2, 5, 16, generator=generator, requires_grad=True)
    norm = RMSNorm(16, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert norm.weight.grad is not None and norm.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), norm(x).detach(), rtol=1e-2, atol=1e-2)


def test_rotation_has_autograds_gradient_and_keeps_lengths(generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 6, 16, generator=generator, requires_grad=True)
    upstream = torch.randn(x.shape, generator=generator)
    positions = torch.randint(0, 50, (2, 6), generator=generator)
    cos, sin = rotary_tables(positions, 16, 10_000.0, torch.float32)
    first, second = x.chunk(2, dim=-1)
    plain = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    expected = torch.autograd.grad(plain, x, upstream)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned, plain)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(torch.autograd.grad(turned, x, upstream), expected)
