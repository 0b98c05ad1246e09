"""Arithmetic with deltas, by numbers worked out by hand and by properties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from instar.adapters.vectors import dare, linear, ties
from instar.errors import UserError


def test_a_weighted_sum():
    deltas = [torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, -4.0]])]
    assert linear(deltas, [0.5, 2.0]).tolist() == [[20.5, -7.0]]


def test_ties_by_hand():
    """Half of each is kept: 4 and -3 of the first, 6 and 2 of the second.

    Entry 0 is kept by both and both are positive: their mean. Entry 1 is kept by one. Entry 3:
    -3 + 0 elects minus.
    """
    first = torch.tensor([4.0, 1.0, 0.5, -3.0])
    second = torch.tensor([6.0, 2.0, -1.0, 0.5])
    assert ties([first, second], [1.0, 1.0], 0.5).tolist() == [5.0, 2.0, 0.0, -3.0]
    assert ties([first, second], [1.0, 0.5], 0.5).tolist() == [3.5, 1.0, 0.0, -3.0]


def test_ties_where_signs_differ():
    """The larger sum wins: entry 0 is 5 - 2, so only the 5 counts; entry 1 is 1 - 3."""
    deltas = [torch.tensor([5.0, 1.0]), torch.tensor([-2.0, -3.0])]
    assert ties(deltas, [1.0, 1.0], 1.0).tolist() == [5.0, -3.0]


def test_ties_of_equals_is_that_one():
    delta = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ties([delta] * 3, [1.0] * 3, 1.0), delta)


def test_trimming_keeps_the_share_and_the_largest():
    delta = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    kept = ties([delta], [1.0], 0.2)
    assert (kept != 0).sum() == 400
    assert torch.equal(kept[kept != 0], delta[kept != 0])
    assert delta[kept != 0].abs().min() >= delta[kept == 0].abs().max()


def test_dare_keeps_the_mean_and_the_share():
    delta = torch.full((200, 200), 2.0)
    made = dare([delta], [1.0], 0.25, torch.Generator().manual_seed(0))
    assert set(made.unique().tolist()) == {0.0, 8.0}
    assert (made != 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert made.mean().item() == pytest.approx(2.0, abs=0.1)


def test_dare_is_its_seeds():
    deltas = [torch.ones(30, 30), -torch.ones(30, 30)]

    def made(seed: int) -> Tensor:
        return dare(deltas, [1.0, 1.0], 0.5, torch.Generator().manual_seed(seed))

    assert torch.equal(made(3), made(3)) and not torch.equal(made(3), made(4))
    whole = dare(deltas, [1.0, 0.5], 1.0, torch.Generator())
    assert torch.equal(whole, linear(deltas, [1.0, 0.5]))


def test_inputs_are_left_alone_and_types_are_kept():
    deltas = [torch.randn(4, 4).bfloat16(), torch.randn(4, 4).bfloat16()]
    copies = [delta.clone() for delta in deltas]
    for made in (
        linear(deltas, [1.0, 2.0]),
        ties(deltas, [1.0, 2.0], 0.5),
        dare(deltas, [1.0, 2.0], 0.5, torch.Generator()),
    ):
        assert made.dtype == torch.bfloat16 and made.shape == (4, 4)
    assert all(torch.equal(delta, copy) for delta, copy in zip(deltas, copies, strict=True))


def test_mistakes_are_explained():
    deltas = [torch.ones(2)]
    with pytest.raises(UserError, match="density is 0"):
        ties(deltas, [1.0], 0.0)
    with pytest.raises(UserError, match=r"density is 1\.5"):
        dare(deltas, [1.0], 1.5, torch.Generator())
    with pytest.raises(UserError, match="2 weights for 1"):
        linear(deltas, [1.0, 2.0])
