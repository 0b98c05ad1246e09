"""LoRA: a product of two thin matrices beside each frozen one (Hu et al. 2021, arXiv:2106.09685).

Shapes: I inputs, O outputs of a layer, r the rank, N tokens.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float
from pydantic import field_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from instar.adapters.base import AdapterConfig, put_in
from instar.adapters.peft_fields import (
    blocks_of,
    by_pattern,
    names_of,
    only,
    targets_of,
    whole_parts_of,
)
from instar.adapters.principal import principal
from instar.adapters.slots import Delta, matrix, plain, sizes
from instar.adapters.targets import ALL_LINEAR, Targets, frozen, targeted
from instar.adapters.tokens import put_rows_in
from instar.errors import UserError
from instar.model.sharding import whole
from instar.model.transformer import Headed

Rank = Annotated[int, Gt(0)]
Alpha = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Lt(1)]


class PlacedConfig(AdapterConfig):
    """A method that sits at linear layers of the blocks."""

    targets: Targets = ALL_LINEAR
    """The layers: `all-linear` (what full training needs to be matched: Dettmers et al. 2023,
    arXiv:2305.14314, section 4), ends of names such as `[q_proj, v_proj]`, or a regular
    expression that fits whole paths."""
    layers: list[int] | None = None
    """Only the blocks of these numbers, from 0; all of them where none is named."""

    def places(self, model: Headed) -> list[str]:
        """The paths of the layers; ``UserError`` where something named is not there."""
        paths = targeted(model, self.targets)
        if not self.layers:
            return paths
        blocks = {path: _block(path) for path in paths}
        if missing := set(self.layers) - set(blocks.values()):
            raise UserError(
                f"layers: there is no block {min(missing)} with such a layer",
                f"The blocks are 0 to {max(blocks.values())}.",
            )
        return [path for path, block in blocks.items() if block in self.layers]


def _block(path: str) -> int:
    """The number of the block that a layer belongs to."""
    return next(int(part) for part in path.split(".") if part.isdecimal())


class LowRankConfig(PlacedConfig):
    """What LoRA and DoRA have in common."""

    unknown_to_peft = ("lr_ratio",)

    rank: Rank = 8
    """Columns of B, rows of A."""
    alpha: Alpha = 16.0
    """The product is multiplied by alpha / rank."""
    dropout: Share = 0.0
    """Share of the inputs of A that are left out while training."""
    rank_stabilised: bool = False
    """Whether it is multiplied by alpha / sqrt(rank) instead, so that high ranks learn as fast as
    low ones (Kalajdzievski 2023, rsLoRA, arXiv:2312.03732)."""
    lr_ratio: Annotated[float, Gt(0)] = 1.0
    """How much faster B learns than A (Hayou et al. 2024, LoRA+, arXiv:2402.12354: about 16)."""
    ranks: dict[str, Rank] = {}
    """Other ranks for some layers: a regular expression for the end of their paths, a rank."""
    alphas: dict[str, Alpha] = {}
    """Other alphas for some layers, named in the same way."""

    trainable_token_indices: list[int] = []
    """Ids of tokens whose embeddings learn as well (PEFT's word): those that the base never met,
    such as the marks of a chat."""

    @field_validator("trainable_token_indices")
    @classmethod
    def _each_token_once(cls, ids: list[int]) -> list[int]:
        if twice := [i for i in ids if ids.count(i) > 1]:
            raise ValueError(f"{twice[0]} is listed twice, and a token has one row")
        return ids

    def install(self, model: Headed, name: str, generator: torch.Generator) -> None:
        """A and B at every layer that is meant, and the tokens' rows."""
        put_rows_in(model, name, self.trainable_token_indices)
        for path in self.places(model):
            base = frozen(model, path)
            delta = self.made(base, *self.at(model, path))
            delta.lr_ratio = self.lr_ratio
            self.begin(delta, base, path, generator)
            put_in(model, path, name, delta)

    def made(self, base: nn.Module, rank: int, scale: float) -> LoRA:
        """The method's part beside a layer."""
        return LoRA(*sizes(base), rank, scale, self.dropout)

    def begin(self, delta: LoRA, base: nn.Module, path: str, generator: torch.Generator) -> None:
        """Give it its first weights."""
        delta.begin(generator)

    def at(self, model: Headed, path: str) -> tuple[int, float]:
        """Rank and scale of the product at a layer."""
        names = names_of(model, path)
        rank = by_pattern(names, self.ranks, self.rank)
        alpha = by_pattern(names, self.alphas, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def to_peft(self) -> dict[str, Any]:
        """PEFT's `LoraConfig`."""
        return {
            "peft_type": "LORA",
            "target_modules": self.targets,
            "layers_to_transform": self.layers or None,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilised,
            "use_dora": False,
            "rank_pattern": self.ranks,
            "alpha_pattern": self.alphas,
            "bias": "none",
            "init_lora_weights": True,
            "modules_to_save": self.modules_to_save or None,
            "trainable_token_indices": self.trainable_token_indices or None,
        }

    @classmethod
    def from_peft(cls, values: dict[str, Any]) -> Self:
        """The method that an `adapter_config.json` describes.

        Raises:
            UserError: It asks for something that this method does not have.
        """
        return cls.parse(low_rank_values(values), "adapter_config.json")


def low_rank_values(values: dict[str, Any]) -> dict[str, Any]:
    """PEFT's `LoraConfig` in our words."""
    names = {
        "r": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "use_rslora": "rank_stabilised",
        "rank_pattern": "ranks",
        "alpha_pattern": "alphas",
    }
    read = {*names, "target_modules", "layers_to_transform", "bias", "use_dora"}
    tokens = values.get("trainable_token_indices") or []
    if isinstance(tokens, list):  # PEFT also knows lists by the name of the embedding
        read.add("trainable_token_indices")
    # How the first weights were made is of no matter, unless they were taken out of the base.
    start = values.get("init_lora_weights", True)
    if start in (True, False, "gaussian", "orthogonal", "eva"):
        read |= {"init_lora_weights", "eva_config"}
    if values.get("bias", "none") != "none":
        read.discard("bias")
    if values.get("layers_pattern") in ("layers", ["layers"]):
        read.add("layers_pattern")
    only(values, read)
    ours = {name: values[theirs] for theirs, name in names.items() if values.get(theirs)}
    return {
        "rank": 8,  # what a PEFT record means that names neither
        "alpha": 8,
        **ours,
        "targets": targets_of(values),
        "layers": blocks_of(values),
        "modules_to_save": whole_parts_of(values),
        "trainable_token_indices": tokens,
    }


class LoRAConfig(LowRankConfig):
    """LoRA, with rsLoRA's scale, LoRA+'s learning rates and PiSSA's start as values."""

    method: Literal["lora"] = "lora"  # type: ignore[assignment]
    """LoRA."""
    start: Literal["kaiming", "pissa"] = "kaiming"
    """`kaiming`: A random, B zero. `pissa`: A and B begin as the principal part of the layer, and
    what they learn is counted from there (Meng et al. 2024, PiSSA, arXiv:2404.02948)."""
    pissa_niter: Annotated[int, Ge(0)] = 0
    """Rounds of a randomised decomposition for `pissa`, which is quicker; 0 takes the exact one."""

    def begin(self, delta: LoRA, base: nn.Module, path: str, generator: torch.Generator) -> None:
        """At random, or at the principal part of the layer."""
        if self.start != "pissa":
            return super().begin(delta, base, path, generator)
        rank = len(delta.lora_A.weight)
        if rank > min(sizes(base)):
            raise UserError(
                f"rank is {rank}, and {path} is {min(sizes(base))} wide",
                "Take a lower one.",
            )
        return delta.begin_at(*principal(matrix(base), rank, self.pissa_niter, generator))

    def to_peft(self) -> dict[str, Any]:
        """PEFT's `LoraConfig`, of what ``LoRA.stored`` gives: twice the rank after `pissa`."""
        values = super().to_peft()
        if self.start == "pissa":
            grown = math.sqrt(2) if self.rank_stabilised else 2  # keeps the scale
            values |= {"r": 2 * self.rank, "lora_alpha": grown * self.alpha}
            values["rank_pattern"] = {path: 2 * rank for path, rank in self.ranks.items()}
            values["alpha_pattern"] = {path: grown * a for path, a in self.alphas.items()}
        return values

    @classmethod
    def from_peft(cls, values: dict[str, Any]) -> Self:
        """LoRA; an adapter that PEFT keeps beside a residual base is read as what it is."""
        start = values.get("init_lora_weights", True)
        if start != "pissa":
            return super().from_peft(values)
        ours = low_rank_values({**values, "init_lora_weights": True})
        return cls.parse({**ours, "start": "pissa"}, "adapter_config.json")


class LoRA(Delta):
    """``y = W x + scale * B A x``.

    After PiSSA's start, with the principal part ``B0 A0`` of W as the first A and B, it is
    ``y = W x + scale * (B A - B0 A0) x``: the residual ``W - scale * B0 A0`` is never formed, so
    that the base stays whole for other adapters and for itself, for a little more work.

    Args:
        inputs: I.
        outputs: O.
        rank: r.
        scale: What the product is multiplied by.
        dropout: Share of A's inputs that are left out while training.
    """

    first_A: Tensor | None  # noqa: N815 - PEFT's capital
    first_B: Tensor | None  # noqa: N815

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = plain(torch.zeros(rank, inputs), None)
        self.lora_B = plain(torch.zeros(outputs, rank), None)
        self.scale, self.dropout, self.lr_ratio = scale, dropout, 1.0
        self.register_buffer("first_A", None)
        self.register_buffer("first_B", None)

    @torch.no_grad()
    def begin(self, generator: torch.Generator) -> None:
        """A at random as PEFT draws it, B zero: nothing changes yet."""
        first = torch.empty(self.lora_A.weight.shape)  # where the generator is; A may be elsewhere
        nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
        self.lora_A.weight.copy_(first)
        self.lora_B.weight.zero_()

    @torch.no_grad()
    def begin_at(self, left: Float[Tensor, "o r"], right: Float[Tensor, "r i"]) -> None:
        """B and A at a product that counts as the layer's own: nothing changes yet."""
        self.lora_B.weight.copy_(left / math.sqrt(self.scale))
        self.lora_A.weight.copy_(right / math.sqrt(self.scale))
        self.first_A = self.lora_A.weight.clone()
        self.first_B = self.lora_B.weight.clone()

    def factors(self) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
        """A and B of the whole change; after PiSSA's start ``[A; A0]`` and ``[B, -B0]``."""
        return self._counted_from_start(self.lora_A.weight, self.lora_B.weight)

    def _counted_from_start(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if self.first_A is None or self.first_B is None:
            return a, b
        return torch.cat((a, self.first_A)), torch.cat((b, -self.first_B), dim=1)

    def forward(self, x: Float[Tensor, "... i"], base: nn.Module) -> Float[Tensor, "... o"]:
        """The base's output, to which the product is added in place."""
        return added(
            base(x), F.dropout(x, self.dropout, self.training), *self.factors(), self.scale
        )

    def merged(self, base: nn.Module) -> tuple[Float[Tensor, "o i"], Float[Tensor, " o"] | None]:
        """``W + scale * B A``."""
        a, b = self.factors()
        return matrix(base) + self.scale * (b @ a), getattr(base, "bias", None)

    def lr_factors(self) -> dict[str, float]:
        """B's learning rate, as LoRA+ has it."""
        return {} if self.lr_ratio == 1 else {"lora_B.weight": self.lr_ratio}

    def stored(self) -> dict[str, Tensor]:
        """A and B relative to the untouched base, so of twice the rank after PiSSA's start.

        ``W + scale * (B A - B0 A0) = W + scale * [B, -B0] [A; A0]``: any LoRA reader reads it.
        """
        weights = self.lora_A.weight.detach(), self.lora_B.weight.detach()
        a, b = self._counted_from_start(*(whole(weight) for weight in weights))
        return {"lora_A.weight": a, "lora_B.weight": b}


def added(
    y: Float[Tensor, "... o"],
    x: Float[Tensor, "... i"],
    a: Float[Tensor, "r i"],
    b: Float[Tensor, "o r"],
    scale: float,
) -> Float[Tensor, "... o"]:
    """``y + scale * B A x``, in ``y``'s own memory and format.

    Args:
        y: Just made, and needed by nobody else.
        x: Kept for the gradient, as it is for the layer's other readers anyway.
        a: A.
        b: B.
        scale: What the product is multiplied by.
    """
    if torch.compiler.is_compiling():  # which finds its own way through what is written plainly
        return y + F.linear(F.linear(x, a), b) * scale
    return _Added.apply(y, x, a, b, scale)  # type: ignore[return-value]


class _Added(torch.autograd.Function):
    """The sum above with its gradient by hand: besides ``x`` only ``A x`` is kept, of width r.

    With g = dL/dy: ``dL/dB = scale * g (A x)'``, ``dL/dA = scale * (B' g) x'``,
    ``dL/dx = scale * A' B' g``.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        a, b = a.to(y.dtype), b.to(y.dtype)
        rows = x.to(y.dtype).flatten(0, -2)
        narrow = rows @ a.mT
        ctx.save_for_backward(x, narrow, a, b)
        ctx.scale = scale
        ctx.mark_dirty(y)
        y.view(-1, y.shape[-1]).addmm_(narrow, b.mT, alpha=scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, narrow, a, b = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        to_narrow = (rows @ b).mul_(ctx.scale)
        to_a = to_b = to_x = None
        if ctx.needs_input_grad[2]:
            to_a = to_narrow.mT @ x.to(grad.dtype).flatten(0, -2)
        if ctx.needs_input_grad[3]:
            to_b = (rows.mT @ narrow).mul_(ctx.scale)
        if ctx.needs_input_grad[1]:
            to_x = (to_narrow @ a).view(x.shape)
        return grad, to_x, to_a, to_b, None
