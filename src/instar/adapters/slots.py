"""The places where adapters sit, and what one method puts there.

A *delta* is what one method makes of one linear layer. A *slot* takes the layer's place: it holds
the frozen layer and the deltas of any number of adapters, of which one is active, or none.

Shapes: I inputs, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from instar.adapters.packed import Packed
from instar.errors import UserError
from instar.model.gpt2 import Conv1D


class Part(nn.Module):
    """What one adapter has in one place. Subclasses hold the weights that learn."""

    def stored(self) -> dict[str, Tensor]:
        """What is written of it, by PEFT's names: all that learns; buffers are for resuming."""
        return {name: weight.detach() for name, weight in self.named_parameters()}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``stored`` gave elsewhere.

        Args:
            tensors: By the same names.

        Raises:
            ValueError: A tensor is missing, too much, or of another shape.
        """
        take(dict(self.named_parameters()), tensors)


class Delta(Part):
    """What one method makes of one linear layer."""

    def forward(self, x: Float[Tensor, "... i"], base: nn.Module) -> Float[Tensor, "... o"]:
        """The layer's new output.

        Args:
            x: The layer's input.
            base: The frozen layer; call it, or read it through ``matrix``.
        """
        raise NotImplementedError

    def merged(self, base: nn.Module) -> tuple[Float[Tensor, "o i"], Float[Tensor, " o"] | None]:
        """Weight and bias of one plain layer that does the same.

        Raises:
            UserError: The method is more than a change of weights.
        """
        raise UserError(
            f"{type(self).__name__} cannot be merged: it is more than a change of weights",
            "Keep the adapter beside its base.",
        )

    def lr_factors(self) -> dict[str, float]:
        """Own parameters (by local name) whose learning rate is a multiple of the usual one."""
        return {}


def take(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into one's own of the same names; ``ValueError`` where they do not fit."""
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{name} is missing")
        if name not in own:
            raise ValueError(f"{name} has no place here")
        if own[name].shape != tensors[name].shape:
            there, here = tuple(tensors[name].shape), tuple(own[name].shape)
            raise ValueError(f"{name} has the shape {there}, and its place {here}")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


class Slot(nn.Module):
    """A place where adapters sit: some deltas by the adapter's name, one of them active."""

    def __init__(self) -> None:
        super().__init__()
        self.deltas = nn.ModuleDict()
        self.active: str | None = None
        self.by_row: tuple[str | None, ...] | None = None
        """Instead of ``active``: one adapter for each row of the batch (``adapters.rows``)."""

    def part(self, name: str | None) -> nn.Module | None:
        """An adapter's part; none where it has none here."""
        return next((delta for own, delta in self.deltas.items() if own == name), None)

    def chosen(self) -> nn.Module | None:
        """The active adapter's part."""
        return self.part(self.active)

    def made(self, x: Tensor, make: Callable[[Tensor, nn.Module | None], Tensor]) -> Tensor:
        """What the active adapter makes of a batch, or each row's own of each row.

        Args:
            x: One row a sequence.
            make: Told rows, and the part that an adapter has here.

        Raises:
            ValueError: It is not known whose the rows are.
        """
        names = self.by_row
        if names is None:
            return make(x, self.chosen())
        if len(x) != len(names):
            raise ValueError(
                f"{len(names)} rows have adapters of their own, but there are {len(x)}"
            )
        order: list[int] = []
        parts: list[Tensor] = []
        for name in dict.fromkeys(names):
            own = [row for row, whose in enumerate(names) if whose == name]
            parts.append(make(x[own], self.part(name)))
            order += own
        return torch.cat(parts)[torch.tensor(order).argsort().to(x.device)]

    def merged(self, name: str) -> nn.Module | None:
        """The plain module that does what this place does with an adapter, or without it.

        None stands for nothing: where the adapter has no part, what is only put beside the model.

        Raises:
            UserError: There is none.
        """
        if name not in self.deltas:
            return None
        raise UserError(
            f"the adapter {name!r} is no change of weights, so it cannot be merged",
            "Keep the adapter beside its base.",
        )


class Adapted(Slot):
    """A linear layer with a slot around it.

    Args:
        base: The layer; frozen by whoever trains the adapter.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        """The frozen layer's weight, for those who only ask for its type or device."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """What the layer gives, or what the active adapter makes of it."""
        if self.by_row is not None and x.dim() != 3:
            raise ValueError(
                f"tokens {[*x.shape]} of which it is not known whose they are, as experts get them:"
                " such layers cannot serve several adapters at once"
            )
        return self.made(x, lambda x, delta: self.base(x) if delta is None else delta(x, self.base))

    def merged(self, name: str) -> nn.Module:
        """One plain linear layer."""
        if name not in self.deltas:
            return self.base
        delta = self.deltas[name]
        assert isinstance(delta, Delta)
        return rebuilt(self.base, *delta.merged(self.base))


class Whole(Slot):
    """A part that each adapter trains whole: its deltas are copies, and the base stays as it was.

    Args:
        base: A head, a norm, an embedding.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        """The weight that speaks now: who needs a head may need no more than that."""
        if self.by_row is not None:
            raise ValueError("rows have adapters of their own, so there is no one weight")
        copy = self.chosen()
        return (self.base if copy is None else copy).weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """What the active adapter's copy gives, or the base where it has none."""
        return self.made(x, lambda x, copy: (self.base if copy is None else copy)(x))

    def merged(self, name: str) -> nn.Module:
        """The adapter's copy."""
        if name not in self.deltas:
            return self.base
        return self.deltas[name]


def matrix(layer: nn.Module) -> Float[Tensor, "o i"]:
    """The weight of a linear layer of any kind, one row an output."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.mT if isinstance(layer, Conv1D) else weight


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer of any kind."""
    return layer.in_features, layer.out_features  # type: ignore[return-value]


def rebuilt(
    like: nn.Module, weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None
) -> nn.Module:
    """A layer of the same kind with other weights; packed ones are unpacked."""
    if not (isinstance(like, Conv1D) or (isinstance(like, Packed) and like.transposed)):
        return plain(weight, bias)
    layer = Conv1D(*sizes(like))
    layer.weight = nn.Parameter(weight.mT.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def plain(weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None) -> nn.Linear:
    """A linear layer with these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer
