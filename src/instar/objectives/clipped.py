"""Clipped policy gradient: PPO with a critic, and the GRPO family without one.

Members of the family differ in the advantage and the weight that the source writes into the
batch, never in the loss.
"""

from __future__ import annotations

from torch import Tensor

from instar.data.batch import Batch
from instar.errors import UserError
from instar.model.transformer import CausalLM, ScoreModel
from instar.objectives.base import Loss, Metrics, Objective
from instar.objectives.functional import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    kl_k1,
    kl_k3,
    token_logprobs_and_entropy,
)


def _require(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise UserError(
            f"A clipped policy gradient needs {name}, and the batch has none",
            f"Let the rollout source write {name}.",
        )
    return value


class ClippedPolicy(Objective):
    """``sum_t w_t (-min(r A, clip(r) A) + kl_weight k3 - entropy_weight H)``.

    Schulman et al. 2017 (arXiv:1707.06347, eq. 7); Shao et al. 2024 (arXiv:2402.03300, eq. 3)
    with the k3 penalty towards the reference.

    **What the sum is divided by.** Without ``batch.weight``, by the number of tokens (PPO, DAPO).
    With it, the weights have already divided within each reply, so what remains is the number of
    *replies*: ``1 / |o_i|`` gives GRPO's mean of means, ``1 / max_length`` Dr. GRPO's constant
    (``instar.rollout.advantages.token_weights``). Either way a reply's weight depends on that
    reply alone, and steps may be cut anywhere.

    Args:
        policy: The model that learns.
        clip_low: How far below 1 the ratio may usefully fall.
        clip_high: How far above 1 it may usefully rise.
        entropy_weight: Reward for staying undecided, a nat of entropy.
        kl_weight: Price of leaving the reference, a nat of k3.
    """

    def __init__(
        self,
        policy: CausalLM,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        entropy_weight: float = 0.0,
        kl_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.entropy_weight = entropy_weight
        self.kl_weight = kl_weight

    def count(self, batch: Batch) -> Tensor:
        """Tokens, or replies when the batch is weighted."""
        return batch.mask.sum() if batch.weight is None else batch.documents

    def forward(self, batch: Batch) -> Loss:
        """The summed loss of the policy."""
        mask = batch.mask
        logprobs, entropy = self._read(batch)
        logprobs, entropy = logprobs[mask], entropy[mask]
        if self.entropy_weight == 0:
            entropy = entropy.detach()
        advantage = _require(batch.advantage, "advantage")[mask]
        # On-policy, the sampler is the policy itself: the ratio is 1, its gradient is not zero.
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs[mask]
        policy_loss = clipped_policy_loss(logprobs, old, advantage, self.clip_low, self.clip_high)
        losses = policy_loss - self.entropy_weight * entropy
        watched = {"entropy": entropy, **self._drift(logprobs.detach(), old, advantage)}
        if batch.reference_logprobs is not None or self.kl_weight:
            reference = _require(batch.reference_logprobs, "reference_logprobs")[mask]
            kl = kl_k3(logprobs, reference)
            losses = losses + self.kl_weight * kl
            watched["kl_to_reference"] = kl
        tokens = mask.sum()
        metrics: Metrics = {k: (v.detach().sum(), tokens) for k, v in watched.items()}
        metrics["policy_loss"] = (_weighted(policy_loss.detach(), batch), self.count(batch))
        return Loss(_weighted(losses, batch), metrics)

    def _read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probability of the targets, and entropy where they stand, both ``(B, T)``."""

        def both(hidden: Tensor) -> tuple[Tensor, Tensor]:
            head = self.policy.lm_head.weight
            return token_logprobs_and_entropy(hidden, head, batch.targets)

        return self.policy.read(both, batch.input_ids, batch.positions, batch.segment_ids)

    def _drift(self, logprobs: Tensor, old: Tensor, advantage: Tensor) -> dict[str, Tensor]:
        """How far each token's policy has moved since it was sampled."""
        ratio = (logprobs - old).exp()
        high = (ratio > 1 + self.clip_high) & (advantage > 0)
        low = (ratio < 1 - self.clip_low) & (advantage < 0)
        return {
            "ratio": ratio,
            "clip_fraction": (high | low).float(),
            "approx_kl": kl_k3(old, logprobs),
            "approx_kl_k1": kl_k1(old, logprobs),
        }


class ActorCritic(ClippedPolicy):
    """PPO: the clipped policy loss plus ``value_weight`` times the clipped value loss.

    Schulman et al. 2017 (arXiv:1707.06347, eq. 9). The value of state t, before ``targets[:, t]``
    is chosen, is the critic's output at position t.

    Args:
        policy: The actor.
        critic: Predicts returns.
        value_weight: Weight of the critic's loss.
        value_clip: How far a value may usefully move in one rollout, in units of return.
        clip_low: As for ``ClippedPolicy``.
        clip_high: As for ``ClippedPolicy``.
        entropy_weight: As for ``ClippedPolicy``.
    """

    def __init__(
        self,
        policy: CausalLM,
        critic: ScoreModel,
        value_weight: float = 0.5,
        value_clip: float = 0.2,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        entropy_weight: float = 0.0,
    ) -> None:
        super().__init__(policy, clip_low, clip_high, entropy_weight)
        self.critic = critic
        self.value_weight = value_weight
        self.value_clip = value_clip

    def forward(self, batch: Batch) -> Loss:
        """The summed loss of actor and critic."""
        mask = batch.mask
        actor = super().forward(batch)
        critic = self.critic
        values = critic.read(critic.scores, batch.input_ids, batch.positions, batch.segment_ids)
        values = values[mask]
        old = _require(batch.old_values, "old_values")[mask]
        returns = _require(batch.returns, "returns")[mask]
        value_loss = _weighted(clipped_value_loss(values, old, returns, self.value_clip), batch)
        metrics: Metrics = {
            "value_loss": (value_loss.detach(), self.count(batch)),
            "explained_variance": explained_variance(values.detach(), returns),
        }
        total = actor.total + self.value_weight * value_loss
        return Loss(total, actor.metrics | metrics)


def _weighted(losses: Tensor, batch: Batch) -> Tensor:
    """Sum over the batch's tokens ``(N,)``, each with its weight."""
    return losses.sum() if batch.weight is None else (losses * batch.weight[batch.mask]).sum()
