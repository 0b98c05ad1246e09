"""AdamW for vectors and tables, Muon for the matrices in between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float
from torch import Tensor, nn

from instar.config import Config
from instar.machine import has_fast_bfloat16
from instar.model.sharding import each_tensor, part_of, stored, whole
from instar.training import eight_bit
from instar.training.average import Average

Fraction = Annotated[float, Ge(0), Lt(1)]


class OptimizerConfig(Config):
    """Which rule moves the weights, and how far."""

    name: Literal["muon", "adamw", "adamw8bit"] = "adamw"
    """`muon` orthogonalises the updates of the blocks' matrices; the rest is AdamW, as everything
    is in `adamw`. `adamw8bit` keeps its moments in eight bits (needs torchao)."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Peak learning rate of AdamW."""
    muon_lr: Annotated[float, Gt(0)] = 0.02
    """Peak learning rate of Muon; its updates have a root mean square near 0.2."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment."""
    momentum: Fraction = 0.95
    """Decay of Muon's momentum."""
    muon_block: Annotated[int, Ge(0)] = 0
    """Heads' channels or hidden neurons that Muon orthogonalises together; 0 takes each matrix
    whole. Blocks of 64 take a third of the time (docs/speedrun.md)."""
    muon_iterations: Annotated[int, Gt(0)] = 5
    """Newton-Schulz iterations of Muon's orthogonalisation; three are rougher and cheaper."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay of the matrices (times the learning rate)."""


BLOCKS = ("layers.", ".h.")
"""What the names of a block's weights hold (GPT-2's: the second)."""

VECTORS = ("ia3_l", "lora_E")
"""Vectors that an adapter holds as matrices of one row or column, as PEFT has them."""

BY_COLUMNS = ("o_proj.weight", "down_proj.weight", "c_attn.weight", "c_fc.weight")
"""Matrices of which a head, or a hidden neuron, is a column."""

# Newton-Schulz coefficients of Jordan et al. 2024, "Muon: an optimizer for hidden layers":
# the quintic's slope at zero is large, so that small singular values rise to one quickly.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(
    matrices: Float[Tensor, "n rows columns"], iterations: int = 5
) -> Float[Tensor, "n rows columns"]:
    """Replace the singular values of each matrix by ones, roughly (0.7 to 1.2).

    The quintic Newton-Schulz iteration X <- aX + (bXX' + c(XX')^2)X, several matrices at once.

    Args:
        matrices: A stack of matrices of one shape.
        iterations: How often to iterate; five are enough for an optimizer. Each multiplies small
            singular values by 3.4 at most: three leave those below a fiftieth of the Frobenius
            norm short of one.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), scaled to AdamW's size of update.

    W <- W - lr * 0.2 * sqrt(max(rows, columns)) * orthogonalize(momentum), the scale of
    Liu et al. 2025 (arXiv:2502.16982, eq. 4). Matrices of one shape are handled as one stack.

    A matrix may be cut into blocks of rows, each orthogonalised by itself (the block steps of
    Khaled et al. 2025, arXiv:2510.16981, algorithm 1): for a matrix of d x d and blocks of b rows
    that takes about b / d of the work, and where a block is one head, its directions no longer
    compete with those of the other heads.

    Args:
        params: Matrices only, or groups of them. In a group with ``by_columns`` blocks are made
            of columns.
        lr: Step size.
        momentum: Decay of the momentum, applied in Nesterov's way.
        weight_decay: Decoupled weight decay.
        block: Rows a block; 0 takes matrices whole, as those are taken whose number of rows is no
            multiple of it.
        iterations: Of the Newton-Schulz iteration.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        weight_decay: float,
        block: int = 0,
        iterations: int = 5,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        cut = {"block": block, "by_columns": False, "iterations": iterations}
        super().__init__(params, defaults | cut)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for params in by_shape.values():
                self._step_stack(params, group)

    def _step_stack(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Move matrices of one shape."""
        dtype = torch.bfloat16 if has_fast_bfloat16(params[0].device) else torch.float32
        ahead = []
        for p in params:
            assert p.grad is not None
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            ahead.append(p.grad.lerp(state["momentum"], group["momentum"]).to(dtype))
        # What is spread over ranks is orthogonalised whole, by each of them.
        stack = torch.stack([whole(a) for a in ahead])
        stack = stack.mT if group["by_columns"] else stack
        rows, columns = stack.shape[1:]
        block = rows if not group["block"] or rows % group["block"] else group["block"]
        blocks = orthogonalize(stack.reshape(-1, block, columns), group["iterations"])
        updates = blocks.reshape(stack.shape)
        updates = updates.mT if group["by_columns"] else updates
        scale = 0.2 * max(block, columns) ** 0.5
        for p, update in zip(params, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(part_of(update, p), alpha=-group["lr"] * scale)


class Optimizers:
    """The optimizers of one run, moved and saved together.

    Args:
        model: Whose trainable parameters are to be moved.
        config: With which rules.
        factors: What the learning rates of some parameters are multiplied by.
        ema: Decay of an average of the weights; 0 keeps none.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        factors: Mapping[nn.Parameter, float] | None = None,
        ema: float = 0.0,
    ) -> None:
        factors = factors or {}
        matrices, tables, vectors = sort_parameters(model)
        if config.name != "muon":
            tables, matrices = tables + list(matrices.values()), {}
        groups = _by_rate({"params": tables, "weight_decay": config.weight_decay}, factors)
        groups += _by_rate({"params": vectors, "weight_decay": 0.0}, factors)
        groups = [group | {"lr": config.lr * group.pop("factor")} for group in groups]
        settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
        if config.name == "adamw8bit":
            adamw = [eight_bit.adamw(groups, **settings)] if groups else []
        else:
            adamw = [torch.optim.AdamW(groups, **settings, fused=True)] if groups else []
        self.all: list[torch.optim.Optimizer] = [*adamw]
        if matrices:
            self.all.append(_muon(matrices, config, factors))
        self.average = Average(model, ema) if ema else None
        if self.average:
            self.all.append(self.average)  # last: it takes in what the others did
        self._peaks = [[group["lr"] for group in o.param_groups] for o in self.all]

    def step(self, factor: float) -> None:
        """Move the weights, with every learning rate at ``factor`` of its peak."""
        for optimizer, peaks in zip(self.all, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.step()

    def forget(self, params: Iterable[nn.Parameter]) -> None:
        """Lose the moments and momenta of parameters that begin anew."""
        for p in params:
            for optimizer in self.all:
                optimizer.state.pop(p, None)

    def averaged(self) -> AbstractContextManager[None]:
        """The context in which the model is its average, if one is kept."""
        return self.average.in_place() if self.average else nullcontext()

    @property
    def lr(self) -> float:
        """The learning rate of the first group, for the log; torchao keeps it as a tensor."""
        return float(self.all[0].param_groups[0]["lr"])

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """Copies of moments and momenta, whole, on rank 0; all ranks must ask."""
        return [each_tensor(stored, optimizer.state_dict()) for optimizer in self.all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Go on with those, which all ranks hold."""
        for optimizer, state in zip(self.all, states, strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            parts = {
                index: {k: part_of(v, params[index]) if _spread(v) else v for k, v in own.items()}
                for index, own in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": parts})


def _spread(value: Any) -> bool:
    """Whether a value of an optimizer's state is spread as its parameter is; counts are not."""
    return isinstance(value, Tensor) and value.dim() > 0


def _by_rate(group: dict[str, Any], factors: Mapping[nn.Parameter, float]) -> list[dict[str, Any]]:
    """A group of parameters, cut into groups of one `factor` each; empty ones are left out."""
    params: dict[float, list[nn.Parameter]] = defaultdict(list)
    for p in group["params"]:
        params[factors.get(p, 1.0)].append(p)
    return [group | {"params": some, "factor": factor} for factor, some in params.items()]


def _muon(
    matrices: dict[str, nn.Parameter],
    config: OptimizerConfig,
    factors: Mapping[nn.Parameter, float],
) -> Muon:
    """Muon for the blocks' matrices.

    Heads and hidden neurons are rows of the matrices that read from the residual stream, and
    columns of those that write into it; in GPT-2, whose matrices are transposed, the other way
    round.
    """
    groups: list[dict[str, Any]] = [{"params": list(matrices.values())}]
    if config.muon_block:
        writes = {name for name in matrices if name.endswith(BY_COLUMNS)}
        groups = [
            {"params": [p for name, p in matrices.items() if name not in writes]},
            {"params": [p for name, p in matrices.items() if name in writes], "by_columns": True},
        ]
    rated = [part for group in groups for part in _by_rate(group, factors)]
    return Muon(
        [group | {"lr": config.muon_lr * group.pop("factor")} for group in rated],
        config.muon_lr,
        config.momentum,
        config.weight_decay,
        config.muon_block,
        config.muon_iterations,
    )


def sort_parameters(
    model: nn.Module,
) -> tuple[dict[str, nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Matrices of the blocks by name, tables (embeddings and heads), vectors."""
    matrices: dict[str, nn.Parameter] = {}
    tables, vectors = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2 or name.endswith(VECTORS):
            vectors.append(p)
        elif any(part in name for part in BLOCKS):
            matrices[name] = p
        else:
            tables.append(p)
    return matrices, tables, vectors
