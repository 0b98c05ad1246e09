"""Advantages, weights and shaped rewards, derived by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instar.errors import UserError
from instar.rollout.advantages import group_advantage, kl_shaped_rewards, token_weights

MASK = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()


def test_group_advantage_by_hand():
    # (1, 0, 0, 1): mean 1/2, sample deviation sqrt(4 * 1/4 / 3) = 0.57735.
    # (2, 2, 2, 2): nobody is better.
    rewards = torch.tensor([1.0, 0, 0, 1, 2, 2, 2, 2])
    a = 0.5 / (0.57735027 + 1e-4)
    expected = torch.tensor([a, -a, -a, a, 0, 0, 0, 0])
    torch.testing.assert_close(group_advantage(rewards, 4), expected)
    plain = torch.tensor([0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0])
    torch.testing.assert_close(group_advantage(rewards, 4, scale="none"), plain)


@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6))
def test_a_group_sums_to_zero_and_ignores_a_shift(values: list[float]):
    rewards = torch.tensor(values, dtype=torch.float64)
    for scale in ("group", "none"):
        advantage = group_advantage(rewards, 3, scale)
        sums = advantage.view(2, 3).sum(dim=1)
        torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-9, rtol=0)
        torch.testing.assert_close(group_advantage(rewards + 7, 3, scale), advantage)


@pytest.mark.parametrize(("rewards", "size"), [(6, 4), (4, 1), (4, 0)])
def test_groups_must_be_whole(rewards: int, size: int):
    with pytest.raises(UserError, match=f"group_size {size}"):
        group_advantage(torch.zeros(rewards), size)


def test_token_weights_by_hand():
    third = 1 / 3
    grpo = torch.tensor([[0, 0.5, 0.5, 0], [0, third, third, third], [0, 0, 0, 0]])
    torch.testing.assert_close(token_weights(MASK, "grpo", 8), grpo)
    torch.testing.assert_close(token_weights(MASK, "dr_grpo", 8), MASK / 8)
    assert token_weights(MASK, "dapo", 8) is None


def test_kl_shaped_rewards_by_hand():
    # beta = 1/2; log-ratios 0.4 everywhere: -0.2 a token, and the score at the end.
    logprobs = torch.full((3, 4), -1.0)
    reference = torch.full((3, 4), -1.4)
    rewards = kl_shaped_rewards(torch.tensor([3.0, -1.0, 9.0]), logprobs, reference, MASK, 0.5)
    expected = torch.tensor([[0, -0.2, 2.8, 0], [0, -0.2, -0.2, -1.2], [0, 0, 0, 0]])
    torch.testing.assert_close(rewards, expected)
