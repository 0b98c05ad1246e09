"""Causal blocks against whole rows, and against numerical gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from instar.model import attention
from instar.model.attention import BLOCK, FROM_TOKENS, attend_in_blocks
from instar.model.layers import attend


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def causal(t: int) -> Tensor:
    return torch.ones(1, t, t, dtype=torch.bool).tril()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("t", [FROM_TOKENS, FROM_TOKENS + BLOCK // 2 + 3])
def test_blocks_are_whole_rows(heads: tuple[int, int], t: int) -> None:
    h, kv = heads
    # As in a layer: the heads of a token lie side by side in memory.
    q, k, v = drawn(2, t, h, 8), drawn(2, t + 0, kv, 8), drawn(2, t, kv, 8) + 1
    inputs = [x.transpose(1, 2) for x in (q, k, v)]
    whole = attend(*inputs, causal(t).expand(2, t, t))  # with a mask, rows are whole
    blocked = attend(*inputs, None)
    torch.testing.assert_close(blocked, whole, rtol=1e-5, atol=1e-5)
    upstream = drawn(*whole.shape).detach()
    expected = torch.autograd.grad(whole, inputs, upstream)
    found = torch.autograd.grad(blocked, inputs, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_blocks_have_the_right_gradient_to_the_last_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 3)
    q, k, v = (drawn(2, h, 8, 4, dtype=torch.float64) for h in (4, 2, 2))
    assert torch.autograd.gradcheck(attend_in_blocks, (q, k, v + 1))


def test_short_rows_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("instar.model.layers.attend_in_blocks")
    q, k, v = (drawn(1, 2, FROM_TOKENS - 8, 4) for _ in range(3))
    attend(q, k, v, None)  # what the published recipes train on stays as it is, bit for bit


def test_in_bfloat16_blocks_err_no_more_than_whole_rows() -> None:
    t = FROM_TOKENS
    q, k, v = (drawn(1, 2, t, 16) for _ in range(3))
    exact = attend(q, k, v, None)
    low = [x.bfloat16() for x in (q, k, v)]
    blocked, whole = attend(*low, None), attend(*low, causal(t))
    errors = [(x.float() - exact).square().mean().sqrt() for x in (blocked, whole)]
    assert errors[0] < 1.1 * errors[1]
