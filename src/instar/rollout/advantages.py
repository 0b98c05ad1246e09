"""From rewards to what a policy gradient needs: advantages, weights and rewards per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from instar.errors import UserError
from instar.objectives.functional import kl_k1


def group_advantage(
    rewards: Float[Tensor, " n"], group_size: int, scale: Literal["group", "none"] = "group"
) -> Float[Tensor, " n"]:
    """How much better each reply is than the others to the same prompt.

    ``A_i = (r_i - mean(r)) / (std(r) + 1e-4)`` (Shao et al. 2024, arXiv:2402.03300, section
    4.1.2), with the sample's standard deviation. Without the division (Dr. GRPO: Liu et al. 2025,
    arXiv:2503.20783) very easy and very hard prompts count no more than others.

    Args:
        rewards: One a reply ``(N,)``; the replies to one prompt stand together.
        group_size: Replies a prompt, G.
        scale: Divide by the group's standard deviation, or by nothing.

    Returns:
        Advantages ``(N,)``; zero for groups whose replies are all equally good.

    Raises:
        UserError: If there are no whole groups of at least two.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise UserError(
            f"group_size {group_size} does not cut {len(rewards)} rewards into groups to compare",
            "Choose 2 or more, and sample that many replies to every prompt.",
        )
    groups = rewards.view(-1, group_size)
    advantage = groups - groups.mean(dim=1, keepdim=True)
    if scale == "group":
        advantage = advantage / (groups.std(dim=1, keepdim=True) + 1e-4)
    return advantage.flatten()


Normalisation = Literal["grpo", "dr_grpo", "dapo"]

_REPLY_WEIGHTS: dict[Normalisation, Callable[[Tensor, int], Tensor | None]] = {
    # Every reply counts the same, so the tokens of a long one count less (arXiv:2402.03300 eq. 3).
    "grpo": lambda lengths, _: 1 / lengths.clamp(min=1),
    # One constant for all: no reward for failing at length (arXiv:2503.20783).
    "dr_grpo": lambda lengths, max_length: torch.full_like(lengths, 1 / max_length),
    # Every token counts the same; the objective divides by their number (arXiv:2503.14476 eq. 8).
    "dapo": lambda _lengths, _max_length: None,
}


def token_weights(
    mask: Bool[Tensor, "b t"], normalisation: Normalisation, max_length: int
) -> Float[Tensor, "b t"] | None:
    """The weight of each token in the loss, which is all that tells these variants apart.

    Args:
        mask: Which positions are the reply's ``(B, T)``.
        normalisation: Whose.
        max_length: The most tokens a reply may have (for Dr. GRPO).

    Returns:
        ``Batch.weight``: zero outside the mask; ``None`` for a plain mean over tokens.
    """
    weights = _REPLY_WEIGHTS[normalisation](mask.sum(dim=1).float(), max_length)
    return None if weights is None else weights[:, None] * mask


def kl_shaped_rewards(
    scores: Float[Tensor, " b"],
    logprobs: Float[Tensor, "b t"],
    reference_logprobs: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    beta: float,
) -> Float[Tensor, "b t"]:
    """Reward of each token: the reply's score at its end, less the price of leaving the reference.

    ``r_t = -beta (log pi - log pi_ref) + [t is last] score`` (Ziegler et al. 2019,
    arXiv:1909.08593, eq. 2; Ouyang et al. 2022, arXiv:2203.02155, eq. 2).

    Args:
        scores: Reward of each reply ``(B,)``.
        logprobs: Of the targets under the policy that sampled them ``(B, T)``.
        reference_logprobs: The same under the reference ``(B, T)``.
        mask: Which positions are the reply's ``(B, T)``.
        beta: Price of a nat.

    Returns:
        Rewards ``(B, T)``, zero outside the mask.
    """
    rewards = -beta * kl_k1(logprobs, reference_logprobs) * mask
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = (columns * mask).amax(dim=1, keepdim=True)
    # A row without a reply has nowhere to put its score.
    return rewards.scatter_add(1, last, scores[:, None] * mask.any(dim=1, keepdim=True))
