"""A reward model learns to put the better of two replies first."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from instar.data.batch import Batch
from instar.model.transformer import ScoreModel
from instar.objectives.base import Loss, Objective
from instar.objectives.functional import token_logprobs


def reply_scores(model: ScoreModel, batch: Batch) -> Float[Tensor, " b"]:
    """The reward of each row, in the form that ``model.config.reward_form`` names.

    With scores s, and y the n tokens of the reply, of which there must be at least one:

    ========= =====================================================
    ``last``  ``s_n``
    ``mean``  ``1/n sum_t s_t``
    ``prior`` ``1/n sum_t s_t + w/n sum_t log pi(y_t | y_<t)``
    ========= =====================================================
    """

    def score(hidden: Tensor) -> Tensor:
        return _reply_scores(model, hidden, batch)

    return model.read(score, batch.input_ids, batch.positions, batch.segment_ids)


def _reply_scores(model: ScoreModel, hidden: Tensor, batch: Batch) -> Tensor:
    form = model.config.reward_form
    scores = model.scores(hidden)
    if form == "last":
        return scores.gather(1, (batch.row_lengths() - 1)[:, None]).squeeze(1)
    length = batch.mask.sum(dim=1)
    # A target stands one column to the right of where it is predicted.
    own = F.pad(batch.mask[:, :-1], (1, 0))
    mean = (scores * own).sum(dim=1) / length
    if form == "mean":
        return mean
    logprobs = token_logprobs(hidden, model.model.embeddings.weight, batch.targets)
    return mean + model.prior_weight * logprobs.sum(dim=1) / length


class BradleyTerry(Objective):
    """``-log sigmoid(r_chosen - r_rejected)`` for each pair (Bradley & Terry 1952).

    As in Ouyang et al. 2022 (arXiv:2203.02155, eq. 1). The comparison leaves the scores' zero
    open; ``center * (r_chosen + r_rejected)^2`` puts it in the middle (Eisenstein et al. 2023,
    arXiv:2312.09244).

    Args:
        model: The score model that learns.
        center: Weight of the centring term.
    """

    unit = "pair"

    def __init__(self, model: ScoreModel, center: float = 0.01) -> None:
        super().__init__()
        self.model = model
        self.center = center

    def count(self, batch: Batch) -> Tensor:
        """The number of pairs: half the rows."""
        return torch.full((), len(batch.input_ids) // 2, device=batch.input_ids.device)

    def forward(self, batch: Batch) -> Loss:
        """The summed loss; ``accuracy`` is the share of pairs in the right order."""
        chosen, rejected = reply_scores(self.model, batch).chunk(2)
        margin = chosen - rejected
        losses = -F.logsigmoid(margin) + self.center * (chosen + rejected).square()
        pairs = self.count(batch)
        metrics = {"loss": losses, "accuracy": (margin > 0).float(), "margin": margin}
        return Loss(losses.sum(), {k: (v.detach().sum(), pairs) for k, v in metrics.items()})
