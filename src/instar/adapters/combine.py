"""One LoRA adapter from several: weighted, by their signs, or thinned out.

Shapes: I inputs, O outputs of a layer, r the rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from instar.adapters.base import add, check_free, check_loaded, slots
from instar.adapters.lora import LoRA, LoRAConfig
from instar.adapters.slots import Adapted
from instar.adapters.vectors import dare, linear, ties
from instar.errors import UserError
from instar.model.transformer import Headed

Combination = Literal["linear", "ties", "dare"]
"""`linear`: the weighted sum; `ties` and `dare`: see ``instar.adapters.vectors``."""

Factors = tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]
"""A and B of a change ``B A``."""


@torch.no_grad()
def combine(
    model: Headed,
    parts: Mapping[str, float],
    into: str,
    how: Combination = "linear",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> None:
    """Put a new adapter into a model, made from LoRA adapters that are in it.

    Each layer's changes are combined as whole matrices and brought back to two factors. Where the
    rank suffices nothing is lost: for ``linear`` the sum of the ranks always does. The new adapter
    is active afterwards, and what learns.

    Args:
        model: Changed in place.
        parts: The adapters' names, and how much each counts. They need not add up to 1.
        into: The new adapter's name.
        how: The way of combining.
        rank: Of the new adapter; the sum of the parts' ranks when left out.
        density: For `ties` and `dare`, the share of each change's entries that is kept.
        seed: Decides what `dare` drops.

    Raises:
        UserError: A part is not loaded or no plain LoRA, the name is taken, or a number is out of
            range.
    """
    if not parts:
        raise UserError("there are no adapters to combine", "Name two or more.")
    if how not in get_args(Combination):
        raise UserError(f"how is {how!r}", f"Choose one of {', '.join(get_args(Combination))}.")
    check_free(model, into)
    if rank is not None and rank < 1:
        raise UserError(f"rank is {rank}", "Choose 1 or more.")
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Factors] = {}
    for path, deltas in _by_layer(model, parts).items():
        weights = [parts[name] for name in deltas]
        a, b = joined(list(deltas.values()), weights)
        most = rank or len(a)
        if how != "linear" or most < len(a):
            changes = [delta.scale * _product(delta) for delta in deltas.values()]
            if how == "ties":
                change = ties(changes, weights, density)
            elif how == "dare":
                change = dare(changes, weights, density, generator)
            else:
                change = linear(changes, weights)
            a, b = factored(change, most)
        made[path] = a, b
    add(model, _config(made), name=into)
    for path, (a, b) in made.items():
        slot = model.get_submodule(path)
        assert isinstance(slot, Adapted)
        delta = slot.deltas[into]
        assert isinstance(delta, LoRA)
        delta.lora_A.weight.copy_(a)
        delta.lora_B.weight.copy_(b)


def joined(deltas: list[LoRA], weights: list[float]) -> Factors:
    """The weighted sum of products as one product: ``[w1 B1, w2 B2] [A1; A2]``."""
    factors = [delta.factors() for delta in deltas]
    scales = [weight * delta.scale for weight, delta in zip(weights, deltas, strict=True)]
    b = torch.cat([scale * b for scale, (_, b) in zip(scales, factors, strict=True)], dim=1)
    return torch.cat([a for a, _ in factors]), b


def factored(change: Float[Tensor, "o i"], rank: int) -> Factors:
    """The product of a rank that comes nearest (Eckart & Young 1936), A and B of like size."""
    u, s, v = torch.linalg.svd(change.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _product(delta: LoRA) -> Float[Tensor, "o i"]:
    a, b = delta.factors()
    return b @ a


def _by_layer(model: Headed, parts: Mapping[str, float]) -> dict[str, dict[str, LoRA]]:
    """The parts' deltas at each layer that has some, in the order of the parts."""
    for name in parts:
        check_loaded(model, name)
    found: dict[str, dict[str, LoRA]] = {}
    for path, slot in slots(model).items():
        present = {name: slot.deltas[name] for name in parts if name in slot.deltas}
        for name, delta in present.items():
            if type(delta) is not LoRA:
                raise UserError(
                    f"the adapter {name!r} is more than LoRA at {path}, so it cannot be combined",
                    "Combine plain LoRA adapters, or merge the models that they make.",
                )
            found.setdefault(path, {})[name] = delta
    return found


def _config(made: Mapping[str, Factors]) -> LoRAConfig:
    """Settings of such an adapter: its products count as they are, so alpha is the rank."""
    ranks = {path: len(a) for path, (a, _) in made.items()}
    most = max(ranks.values())
    others = {re.escape(path): rank for path, rank in ranks.items() if rank != most}
    return LoRAConfig(
        rank=most,
        alpha=most,
        ranks=others,
        alphas={path: float(rank) for path, rank in others.items()},
        targets=list(made),
    )
