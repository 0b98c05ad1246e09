"""A reward model learns to put the better of two replies first."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from instar.data.batch import Batch
from instar.model.transformer import ScoreModel
from instar.objectives.base import Loss, Objective


def last_token(batch: Batch) -> Int[Tensor, " b"]:
    """Where each row's last reply token stands in ``input_ids``.

    ``targets[:, t]`` is the token that stands at ``t + 1``, so the reply's last token is one to
    the right of the last position with a target. Rows therefore hold *all* their tokens, and
    their last column never has a target:

    ======== ==== ==== ==== ==== =====
    column    0    1    2    3    4
    input    ask   ask  a    b   (pad)
    target    -    a    b    -    -
    ======== ==== ==== ==== ==== =====

    Here the answer is column 3.
    """
    columns = torch.arange(1, batch.targets.shape[1] + 1, device=batch.targets.device)
    return (columns * batch.mask).amax(dim=1)


def reply_scores(model: ScoreModel, batch: Batch) -> Float[Tensor, " b"]:
    """The reward of each row: the model's score at the reply's last token."""
    scores = model(batch.input_ids, batch.positions, batch.segment_ids)
    return scores.gather(1, last_token(batch)[:, None]).squeeze(1)


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
        return torch.tensor(len(batch.input_ids) // 2, device=batch.input_ids.device)

    def forward(self, batch: Batch) -> Loss:
        """The summed loss; ``accuracy`` is the share of pairs in the right order."""
        chosen, rejected = reply_scores(self.model, batch).chunk(2)
        margin = chosen - rejected
        losses = -F.logsigmoid(margin) + self.center * (chosen + rejected).square()
        pairs = self.count(batch)
        metrics = {"loss": losses, "accuracy": (margin > 0).float(), "margin": margin}
        return Loss(losses.sum(), {k: (v.detach().sum(), pairs) for k, v in metrics.items()})
