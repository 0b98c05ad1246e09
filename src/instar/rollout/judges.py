"""Who judges a rollout: a program that knows the answer, or a model that learnt preferences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from instar.data.batch import Batch
from instar.distributed import share_rows
from instar.model import CausalLM, ScoreModel
from instar.objectives.functional import gae, whiten
from instar.objectives.language import batch_logprobs
from instar.objectives.reward import reply_scores
from instar.rollout.advantages import (
    Normalisation,
    group_advantage,
    kl_shaped_rewards,
    token_weights,
)
from instar.rollout.source import Rollout
from instar.rollout.verifiers import mark

M = TypeVar("M")


def _shared(function: Callable[[M, Batch], Tensor], model: M, batch: Batch) -> Tensor:
    """What a model says of every row ``(N, ...)``; each rank asks about its share."""
    return share_rows(lambda rows: function(model, batch.rows(rows)), len(batch.input_ids))


def _values(critic: ScoreModel, batch: Batch) -> Tensor:
    return critic(batch.input_ids)


def _of_replies(rollout: Rollout) -> dict[str, float]:
    """What every judge reports of the replies themselves."""
    finished = rollout.finished.float()
    return {
        "length": rollout.batch.mask.sum().item() / len(finished),
        "finished": finished.mean().item(),
    }


@dataclass(frozen=True)
class Verified:
    """Verifiable rewards: 1 for a right answer, 0 for a wrong one, compared within its group.

    Lambert et al. 2024 (arXiv:2411.15124, section 6) for the reward, Shao et al. 2024
    (arXiv:2402.03300) for the advantage. No reward model and no critic.

    Attributes:
        policy: The policy that is being trained; asked for its log-probabilities only where a
            reply is learnt from more than once.
        reference: The frozen policy to stay close to; none where that costs nothing.
        on_policy: Whether no reply is learnt from more than once.
        skip_decided: Leave out groups whose replies are all equally good, unless all groups are.
        scale: Whether advantages are divided by their group's standard deviation.
        normalisation: How the tokens of a reply are weighted.
        max_new_tokens: Longest reply.
    """

    policy: CausalLM
    reference: CausalLM | None
    on_policy: bool
    skip_decided: bool
    scale: Literal["group", "none"]
    normalisation: Normalisation
    max_new_tokens: int

    def __call__(self, rollout: Rollout) -> tuple[Batch, dict[str, float]]:
        """Advantages of the replies to learn from, each the same for all of its tokens."""
        pairs = zip(rollout.tasks, rollout.completions, strict=True)
        verdicts = [mark(task, reply.text, reply.finish == "stop") for task, reply in pairs]
        rewards = torch.tensor(verdicts, device=rollout.batch.mask.device)
        advantage = group_advantage(rewards, rollout.samples, self.scale)
        undecided = advantage.view(-1, rollout.samples).any(dim=1)
        measured = {
            "reward": rewards.mean().item(),
            "undecided_groups": undecided.float().mean().item(),
        }
        batch = rollout.batch
        if self.skip_decided and undecided.any():
            taught = undecided.repeat_interleave(rollout.samples)
            batch, advantage = batch.rows(taught), advantage[taught]
        judged = replace(
            batch,
            advantage=advantage[:, None] * batch.mask,
            weight=token_weights(batch.mask, self.normalisation, self.max_new_tokens),
            old_logprobs=None if self.on_policy else _shared(batch_logprobs, self.policy, batch),
            reference_logprobs=self.reference and _shared(batch_logprobs, self.reference, batch),
        )
        return judged, measured | _of_replies(rollout)


@dataclass(frozen=True)
class Preferred:
    """A reward model's score, less the price of leaving the reference, spread by a critic.

    Ouyang et al. 2022 (arXiv:2203.02155, section 3.5), with generalised advantage estimation
    (Schulman et al. 2016, arXiv:1506.02438) and whitened advantages.

    Attributes:
        policy: The policy that is being trained.
        critic: The critic that is being trained.
        reward_model: Frozen; says what a reply is worth.
        reference: Frozen; where the policy started.
        beta: Price of a nat of divergence from the reference.
        gamma: Discount.
        lam: Lambda of the advantage estimate.
        unfinished_penalty: Taken off the score of replies that were cut off.
    """

    policy: CausalLM
    critic: ScoreModel
    reward_model: ScoreModel
    reference: CausalLM
    beta: float
    gamma: float
    lam: float
    unfinished_penalty: float

    def __call__(self, rollout: Rollout) -> tuple[Batch, dict[str, float]]:
        """Advantages and returns of every token."""
        batch, mask = rollout.batch, rollout.batch.mask
        cut_off = ~rollout.finished.to(mask.device)
        scores = _shared(reply_scores, self.reward_model, batch)
        scores = scores - self.unfinished_penalty * cut_off
        logprobs = _shared(batch_logprobs, self.policy, batch)
        reference_logprobs = _shared(batch_logprobs, self.reference, batch)
        values = _shared(_values, self.critic, batch) * mask
        rewards = kl_shaped_rewards(scores, logprobs, reference_logprobs, mask, self.beta)
        advantage, returns = gae(rewards, values, mask, self.gamma, self.lam)
        judged = replace(
            batch,
            advantage=whiten(advantage, mask),
            returns=returns,
            old_values=values,
            old_logprobs=logprobs,
            reference_logprobs=reference_logprobs,
        )
        kl = _per_reply(logprobs - reference_logprobs, mask)
        measured = {"reward": scores.mean().item(), "kl": kl.mean().item()}
        return judged, measured | _of_replies(rollout)


def _per_reply(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the tokens of each reply ``(N,)``."""
    return (values * mask).sum(dim=1)
