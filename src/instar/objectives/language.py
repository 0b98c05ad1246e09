"""Next-token prediction: one objective for pretraining and for fine-tuning.

What differs is only the mask: every token of a document, or the assistant's words.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from instar.data.batch import Batch
from instar.model.transformer import CausalLM
from instar.objectives.base import Loss, Objective
from instar.objectives.functional import token_logprobs


def batch_logprobs(policy: CausalLM, batch: Batch) -> Float[Tensor, "b t"]:
    """Log-probability of the batch's targets under ``policy``, zero where ignored.

    Frozen models annotate a batch with it, under ``torch.no_grad()``.
    """

    def logprobs(hidden: Tensor) -> Tensor:
        return token_logprobs(hidden, policy.lm_head.weight, batch.targets)

    return policy.read(logprobs, batch.input_ids, batch.positions, batch.segment_ids)


class NextToken(Objective):
    """Cross-entropy of the targets, ``-sum_t log pi(y_t | y_<t)``.

    Args:
        policy: The model that learns.
    """

    def __init__(self, policy: CausalLM) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Batch) -> Loss:
        """The summed loss, in nats."""
        total = -batch_logprobs(self.policy, batch).sum()
        return Loss(total, {"loss": (total.detach(), self.count(batch))})
