"""Learning something new without losing what was known: ties to the start.

What a model knew lies in its weights, and shows in what it says. A tie may hold either: weights
near those that it began with (L2-SP, EWC), or what it says near what it said (a divergence).

Shapes: B rows, T positions, D width, V vocabulary, k the likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from instar.adapters.base import penalties
from instar.data.batch import Batch
from instar.errors import UserError
from instar.model.transformer import CausalLM
from instar.objectives.base import Loss, Objective
from instar.objectives.functional import token_logprobs, top_divergence, top_logprobs


class Tie(nn.Module):
    """``strength / 2 * sum_i F_i (w_i - w0_i)^2`` over everything that learns.

    With ``F = 1`` this is L2-SP, weight decay towards the start instead of towards zero (Li et al.
    2018, arXiv:1802.01483, eq. 3). With the diagonal of the Fisher information it is elastic weight
    consolidation (EWC; Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3): weights that what was
    learnt before depends on are held, the others are free.

    The start, and the Fisher information, are buffers that no checkpoint holds: who goes on with
    a run makes them again, of the same checkpoint and the same data.

    Args:
        model: Its trainable weights, as they are now, are the start.
        strength: L2-SP's alpha, or EWC's lambda.
        fisher: F by the name of the weight; none is one everywhere.
    """

    def __init__(
        self, model: nn.Module, strength: float, fisher: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.strength = strength
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        started = dict(model.named_parameters())
        for place, name in enumerate(self.names):
            start = started[name].detach().clone()
            self.register_buffer(f"start_{place}", start, persistent=False)
            if fisher is not None:
                self.register_buffer(f"fisher_{place}", fisher[name].clone(), persistent=False)

    def forward(self, model: nn.Module) -> Float[Tensor, ""]:
        """What the weights' distance from the start costs."""
        weights, kept = dict(model.named_parameters()), dict(self.named_buffers())
        costs = []
        for place, name in enumerate(self.names):
            squared = (weights[name] - kept[f"start_{place}"]).square()
            importance = kept.get(f"fisher_{place}")
            costs.append((squared if importance is None else importance * squared).sum())
        return self.strength / 2 * torch.stack(costs).sum()


class AdapterPenalty(nn.Module):
    """What the adapters of a model cost by themselves (``AdapterConfig.penalty``).

    AdaLoRA's, for example, cost as much as their factors are short of orthogonal.
    """

    def forward(self, model: nn.Module) -> Float[Tensor, ""]:
        """The sum over the adapters that ask for one."""
        costs = penalties(model)
        return torch.stack(costs).sum() if costs else torch.zeros(())


class Kept(Objective):
    """An objective, and a penalty on its weights on top, such as the distance from the start.

    Losses are sums, and ``fit`` divides them once, by the count over all micro-batches and ranks.
    A penalty on the weights belongs to the step and not to its units: here each batch pays it as
    often as it has units. The counts of all batches add up to what ``fit`` divides by, so that
    after the division the penalty has weight one, however the step was cut.

    Args:
        inner: What is learnt.
        ties: What holds its weights, by name.
    """

    def __init__(self, inner: Objective, ties: Mapping[str, Tie | AdapterPenalty]) -> None:
        super().__init__()
        self.inner, self.unit = inner, inner.unit
        self.ties = nn.ModuleDict(ties)

    def count(self, batch: Batch) -> Tensor:
        """The inner objective's units."""
        return self.inner.count(batch)

    def forward(self, batch: Batch) -> Loss:
        """The inner loss and the ties' cost, which is logged under each tie's name."""
        loss, count = self.inner(batch), self.count(batch)
        total, metrics = loss.total, dict(loss.metrics)
        for name, tie in self.ties.items():
            cost = count * tie(self.inner)
            total = total + cost
            metrics[name] = (cost.detach(), count)
        return Loss(total, metrics)


class Distilled(Objective):
    """Next-token prediction, held near what a frozen model would say.

    ``-log pi(y_t) + beta KL(pi_0 || pi)`` a token. With the model's own start for ``pi_0`` this is
    learning without forgetting (Li & Hoiem 2016, arXiv:1606.09282, eq. 2-4) at temperature one;
    with a better model it is distillation (Hinton et al. 2015, arXiv:1503.02531). The source
    annotates each batch with the frozen model's likeliest tokens (``annotated``).

    Args:
        policy: The model that learns.
        beta: Weight of the divergence.
    """

    def __init__(self, policy: CausalLM, beta: float) -> None:
        super().__init__()
        self.policy, self.beta = policy, beta

    def forward(self, batch: Batch) -> Loss:
        """The summed loss; ``loss`` is of the targets alone, ``kl_to_start`` the divergence."""
        ids, known = batch.teacher_ids, batch.teacher_logprobs
        if ids is None or known is None:
            raise UserError(
                "a divergence from the start needs teacher_logprobs, and the batch has none",
                "Let the source annotate its batches with a frozen copy of the model.",
            )

        def both(hidden: Tensor) -> tuple[Tensor, Tensor]:
            head = self.policy.lm_head.weight
            logprobs = token_logprobs(hidden, head, batch.targets)
            return logprobs, top_divergence(hidden, head, batch.targets, ids, known)

        made = self.policy.read(both, batch.input_ids, batch.positions, batch.segment_ids)
        loss, kl = -made[0].sum(), made[1].sum()
        count = self.count(batch)
        metrics = {"loss": (loss.detach(), count), "kl_to_start": (kl.detach(), count)}
        return Loss(loss + self.beta * kl, metrics)


def annotated(
    teacher: CausalLM, batch: Batch, k: int
) -> tuple[Int[Tensor, "b t k"], Float[Tensor, "b t k"]]:
    """The ``k`` likeliest tokens of a frozen model at every target, and their log-probabilities.

    Args:
        teacher: The frozen model; call this under ``torch.no_grad()``.
        batch: Its targets say where.
        k: How many; at most the vocabulary.

    Returns:
        Ids and log-probabilities, for ``Batch.teacher_ids`` and
        ``Batch.teacher_logprobs``.
    """

    def top(hidden: Tensor) -> tuple[Tensor, Tensor]:
        return top_logprobs(hidden, teacher.lm_head.weight, batch.targets, k)

    return teacher.read(top, batch.input_ids, batch.positions, batch.segment_ids)


def fisher(objective: Objective, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information, by the name of the weight.

    ``F_i = 1/N sum_e (d/dw_i log p(e))^2`` over examples e, where N is the number of all their
    units. "Empirical" because the replies are those of the data and not drawn from the model
    (Kunstner et al. 2019, arXiv:1905.12558, say what that changes). As N counts tokens, EWC's
    ``1/2 F (w - w0)^2`` estimates how much an earlier token would cost more, and lambda = 1 weighs
    it like a new one.

    Each example goes through the model by itself: squares of sums are no sums of squares.

    Args:
        objective: What was learnt before; its gradients are left as they were found: none. It is
            in evaluation mode afterwards.
        batches: Rows of earlier data; each row is one example.

    Returns:
        One tensor for each trainable weight, on its device.
    """
    objective.eval()  # dropout would add its own chance to every gradient
    learning = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    found = {name: torch.zeros_like(p) for name, p in learning.items()}
    units = 0.0
    for batch in batches:
        for place in range(len(batch.input_ids)):
            example = batch.rows(slice(place, place + 1)).trimmed()
            gradients = torch.autograd.grad(objective(example).total, list(learning.values()))
            for name, gradient in zip(learning, gradients, strict=True):
                found[name] += gradient.square()
            units += float(objective.count(example))
    return {name: value / max(units, 1.0) for name, value in found.items()}
