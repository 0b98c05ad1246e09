"""What an objective is: a module that turns a batch into sums."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from instar.data.batch import Batch

Metrics = dict[str, tuple[Tensor, Tensor]]
"""Name to ``(sum, count)``; both are added over micro-batches and ranks, then divided."""


@dataclass
class Loss:
    """The outcome of one micro-batch.

    Attributes:
        total: Scalar, the *sum* of the losses of the batch's units; carries the gradient.
        metrics: Detached ``(sum, count)`` pairs.
    """

    total: Tensor
    metrics: Metrics = field(default_factory=dict)


class Objective(nn.Module):
    """Owns the trainable models, and nothing else: no optimizer, device, rank, file or logger.

    Losses are sums. The training loop divides once, by the count over all micro-batches and
    ranks, so that a step's gradient does not depend on how its batch was cut.
    """

    unit = "token"
    """What ``count`` counts: ``token`` or ``pair``."""

    def count(self, batch: Batch) -> Tensor:
        """How many units the batch holds (a scalar tensor, no gradient)."""
        return batch.mask.sum()

    def forward(self, batch: Batch) -> Loss:
        """The summed loss of ``batch``, with its metrics."""
        raise NotImplementedError
