"""Arithmetic with differences of weights: several of them make one.

A *delta* is what training changed in one weight: of an adapter ``scale B A``, of a whole model
what it has become minus what it was (a task vector: Ilharco et al. 2022, arXiv:2212.04089).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from instar.errors import UserError


def linear(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum (Ilharco et al. 2022, arXiv:2212.04089, section 2).

    Args:
        deltas: Tensors of one shape.
        weights: One factor a delta; they need not add up to 1.
    """
    _check(deltas, weights, 1.0)
    return sum((w * d for w, d in zip(weights, deltas, strict=True)), torch.zeros_like(deltas[0]))


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim, elect a sign, merge those who agree (Yadav et al. 2023, arXiv:2306.01708, section 3).

    - Trim: each delta keeps the ``density`` of its entries that are largest in magnitude.
    - Elect: every entry's sign is that of the sum of the trimmed deltas.
    - Merge: the mean over the deltas that have this sign, each times its weight.

    The paper trims over all tensors of a model together; here each tensor is trimmed by itself, as
    PEFT and mergekit do.

    Args:
        deltas: Tensors of one shape.
        weights: One factor a delta. They play no part in the election, as in PEFT.
        density: Share of the entries to keep, above 0 and up to 1.
    """
    _check(deltas, weights, density)
    trimmed = torch.stack([_largest(delta, density) for delta in deltas])
    elected = torch.where(trimmed.sum(dim=0) >= 0, 1, -1)
    agree = trimmed.sign() == elected
    total = linear([*torch.where(agree, trimmed, 0)], weights)
    return total / agree.sum(dim=0).clamp(min=1)


def dare(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    density: float,
    generator: torch.Generator,
) -> Tensor:
    """Drop and rescale, then the weighted sum (Yu et al. 2023, arXiv:2311.03099, eq. 2).

    ``m ~ Bernoulli(density)``, ``delta' = m delta / density``: each entry keeps its mean.

    Args:
        deltas: Tensors of one shape.
        weights: One factor a delta.
        density: Probability of keeping an entry (the paper's ``1 - p``), above 0 and up to 1.
        generator: On the CPU, so that every device drops the same entries.
    """
    _check(deltas, weights, density)
    kept = []
    for delta in deltas:
        mask = torch.bernoulli(torch.full(delta.shape, density), generator=generator)
        kept.append(delta * mask.to(delta) / density)
    return linear(kept, weights)


def _largest(delta: Tensor, density: float) -> Tensor:
    """The delta with all but its largest entries set to zero."""
    flat = delta.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(delta)


def _check(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> None:
    if len(deltas) != len(weights) or not deltas:
        raise UserError(
            f"{len(weights)} weights for {len(deltas)} models", "Give each of them one weight."
        )
    if not 0 < density <= 1:
        raise UserError(f"density is {density}", "Choose a share above 0, up to 1.")
