"""The principal part of a matrix: its largest singular values, exactly or by a random sketch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

EXTRA = 8
"""Directions that a random sketch looks at beyond those that are wanted."""


@torch.no_grad()
def principal(
    weight: Float[Tensor, "o i"], rank: int, rounds: int, generator: torch.Generator
) -> tuple[Float[Tensor, "o r"], Float[Tensor, "r i"]]:
    """The best product of two thin matrices: ``U sqrt(S), sqrt(S) V'`` of the largest r values.

    Args:
        weight: The matrix.
        rank: r; no more than the shorter side.
        rounds: 0 for an exact decomposition; otherwise power iterations on a random sketch
            (Halko et al. 2011, arXiv:0909.4061, algorithms 4.4 and 5.1).
        generator: Draws the sketch.
    """
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if rounds == 0:
        u, s, v = torch.linalg.svd(exact, full_matrices=False)
    else:
        columns = min(rank + EXTRA, *exact.shape)
        drawn = torch.randn(exact.shape[1], columns, generator=generator, dtype=exact.dtype)
        q = torch.linalg.qr(exact @ drawn.to(exact.device)).Q
        for _ in range(rounds):
            q = torch.linalg.qr(exact @ torch.linalg.qr(exact.mT @ q).Q).Q
        u, s, v = torch.linalg.svd(q.mT @ exact, full_matrices=False)
        u = q @ u
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
