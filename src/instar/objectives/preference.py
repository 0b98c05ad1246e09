"""Learning from pairs without a reward model: the policy's own likelihoods are the rewards.

A method is a small class with two functions: the implicit ``reward`` of a reply, and the ``loss``
of a pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from instar.data.batch import Batch
from instar.errors import UserError
from instar.model.transformer import CausalLM
from instar.objectives.base import Loss, Objective
from instar.objectives.language import batch_logprobs


@dataclass(frozen=True)
class Replies:
    """What a pair loss may know of a reply.

    Attributes:
        logprob: ``log pi(y | x)``, summed over the reply ``(P,)``; carries the gradient.
        length: Tokens of the reply ``(P,)``.
        reference: ``log pi_ref(y | x)`` ``(P,)``; zero for losses that need no reference.
    """

    logprob: Float[Tensor, " p"]
    length: Float[Tensor, " p"]
    reference: Float[Tensor, " p"]


@runtime_checkable
class PairLoss(Protocol):
    """A preference method."""

    needs_reference: ClassVar[bool]
    """Whether the source must write ``reference_logprobs`` into the batch."""

    def reward(self, replies: Replies) -> Float[Tensor, " p"]:
        """What the policy implicitly believes a reply is worth."""
        ...

    def loss(self, chosen: Replies, rejected: Replies) -> Float[Tensor, " p"]:
        """The loss of each pair."""
        ...


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    ``-log sigmoid(r_w - r_l)`` with ``r = beta log(pi / pi_ref)``. Label smoothing supposes that
    a share of the labels is wrong (cDPO: Mitchell 2023, ericmitchell.ai/cdpo.pdf).

    The loss sees only the difference: it is also content when both replies become unlikely, and
    what becomes likely instead is nobody's choice. ``nll_weight`` adds the chosen reply's mean
    negative log-likelihood a token (Pang et al. 2024, arXiv:2404.19733, eq. 1).

    Args:
        beta: Strength of the tie to the reference.
        label_smoothing: Share of pairs believed to be swapped, 0 to 0.5.
        nll_weight: Weight of fine-tuning on the chosen reply, the paper's alpha.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    needs_reference: ClassVar[bool] = True

    def reward(self, replies: Replies) -> Float[Tensor, " p"]:
        """``beta log(pi / pi_ref)`` of the whole reply (eq. 5, without its constant)."""
        return self.beta * (replies.logprob - replies.reference)

    def loss(self, chosen: Replies, rejected: Replies) -> Float[Tensor, " p"]:
        """Cross-entropy against a label that may be wrong, and fine-tuning on the chosen reply."""
        margin = self.reward(chosen) - self.reward(rejected)
        wrong = self.label_smoothing
        comparison = -(1 - wrong) * F.logsigmoid(margin) - wrong * F.logsigmoid(-margin)
        return comparison - self.nll_weight * chosen.logprob / chosen.length


@dataclass(frozen=True)
class IPO:
    """Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, eq. 17).

    ``(h - 1 / (2 beta))^2`` where h is the difference of log-ratios: a target, not a slope, so
    certain labels cannot drive the policy away without end. Log-ratios are means over tokens,
    the usual form, so that one beta fits replies of every length.

    Args:
        beta: The paper's tau; the margin aimed at is ``1 / (2 beta)``.
    """

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True

    def reward(self, replies: Replies) -> Float[Tensor, " p"]:
        """``log(pi / pi_ref)``, the mean over tokens."""
        return (replies.logprob - replies.reference) / replies.length

    def loss(self, chosen: Replies, rejected: Replies) -> Float[Tensor, " p"]:
        """Squared distance of the margin from its target."""
        return (self.reward(chosen) - self.reward(rejected) - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class SimPO:
    """Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734, eq. 6).

    ``-log sigmoid(r_w - r_l - gamma)`` with ``r = beta / |y| log pi``: no reference, and a reply
    is worth what a token of it is likely, so length earns nothing.

    Args:
        beta: Scale of the reward.
        gamma: Margin by which the better reply should win.
    """

    beta: float = 2.0
    gamma: float = 1.0
    needs_reference: ClassVar[bool] = False

    def reward(self, replies: Replies) -> Float[Tensor, " p"]:
        """``beta`` times the mean log-probability of a token (eq. 4)."""
        return self.beta * replies.logprob / replies.length

    def loss(self, chosen: Replies, rejected: Replies) -> Float[Tensor, " p"]:
        """Bradley-Terry with a target margin (eq. 5)."""
        return -F.logsigmoid(self.reward(chosen) - self.reward(rejected) - self.gamma)


@dataclass(frozen=True)
class ORPO:
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691, eq. 6).

    ``L_SFT + lambda * -log sigmoid(log odds_w - log odds_l)``: fine-tuning on the better reply
    with a small push away from the worse one, in a single stage and without a reference. The
    likelihood of a reply is the mean over its tokens (section 4.1), in both terms.

    Args:
        lambda_: Weight of the push.
    """

    lambda_: float = 0.1
    needs_reference: ClassVar[bool] = False

    def reward(self, replies: Replies) -> Float[Tensor, " p"]:
        """``log odds = log p / (1 - p)`` (eq. 4) with log p the mean over tokens."""
        # A reply that is certain in float32 would have infinite odds.
        logp = (replies.logprob / replies.length).clamp(max=-1e-6)
        return logp - torch.log(-torch.expm1(logp))

    def loss(self, chosen: Replies, rejected: Replies) -> Float[Tensor, " p"]:
        """Fine-tuning on the chosen reply, plus the odds-ratio term (eq. 7)."""
        push = -F.logsigmoid(self.reward(chosen) - self.reward(rejected))
        return -chosen.logprob / chosen.length + self.lambda_ * push


class Pairwise(Objective):
    """Any preference method on batches of pairs, chosen rows first.

    Args:
        policy: The model that learns.
        loss: The method.
    """

    unit = "pair"

    def __init__(self, policy: CausalLM, loss: PairLoss) -> None:
        super().__init__()
        self.policy = policy
        self.loss = loss

    def count(self, batch: Batch) -> Tensor:
        """The number of pairs: half the rows."""
        return torch.full((), len(batch.input_ids) // 2, device=batch.input_ids.device)

    def forward(self, batch: Batch) -> Loss:
        """The summed loss; ``accuracy`` and ``margin`` are those of the implicit rewards."""
        if self.loss.needs_reference and batch.reference_logprobs is None:
            raise UserError(
                f"{type(self.loss).__name__} compares with a reference, and the batch has no "
                "reference_logprobs",
                "Let the source annotate its batches with a frozen copy of the policy.",
            )
        logprob = batch_logprobs(self.policy, batch).sum(dim=1)
        reference = batch.reference_logprobs
        known = torch.zeros_like(logprob) if reference is None else reference.sum(dim=1)
        columns = [logprob, batch.mask.sum(dim=1).float(), known]
        halves = [column.chunk(2) for column in columns]
        chosen, rejected = (Replies(*half) for half in zip(*halves, strict=True))
        losses = self.loss.loss(chosen, rejected)
        with torch.no_grad():
            margin = self.loss.reward(chosen) - self.loss.reward(rejected)
        pairs = self.count(batch)
        metrics = {
            "loss": losses,
            "accuracy": (margin > 0).float(),
            "margin": margin,
            "chosen_logprob": chosen.logprob,
            "rejected_logprob": rejected.logprob,
        }
        return Loss(losses.sum(), {k: (v.detach().sum(), pairs) for k, v in metrics.items()})
