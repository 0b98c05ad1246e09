"""ReLoRA: low-rank steps that add up to a change of any rank (Lialin et al. 2023).

arXiv:2307.05695. From time to time what A and B have learnt is settled, and they begin anew, with
another random A; the optimizer forgets what it knew of them. No more weights learn at any time than
with LoRA, but the change is no longer bound to their rank. So the adapter that is written is a LoRA
of the rank that all its links together may have.

Shapes: I inputs, O outputs of a layer, r the rank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from instar.adapters.base import learnt_parts
from instar.adapters.lora import LoRA, LowRankConfig, added
from instar.adapters.peft_fields import outer_path
from instar.adapters.principal import principal
from instar.adapters.slots import matrix, sizes
from instar.errors import UserError
from instar.model.transformer import Headed


class ReLoRAConfig(LowRankConfig):
    """ReLoRA; the learning rate follows the run's schedule, whatever begins anew.

    The paper prunes most of the optimizer's state at each restart, and lets the rate rise anew,
    since AdamW's first steps are long. Here all of it is dropped and the rate stays: Muon's steps
    are always of one length, and AdamW wants a lower rate than with LoRA.
    """

    needs_whole = True
    begins_anew = True

    method: Literal["relora"] = "relora"  # type: ignore[assignment]
    """ReLoRA."""
    restart_every: Annotated[int, Gt(0)] = 500
    """Steps after which what was learnt is settled, and A and B begin anew."""

    def check_run(self, steps: int) -> None:
        """Raises ``UserError`` if a run of so many steps would never begin anew."""
        if steps <= self.restart_every:
            raise UserError(
                f"restart_every is {self.restart_every}, and the run has {steps} steps: nothing "
                "would begin anew",
                "Lower it, or choose lora.",
            )

    def made(self, base: nn.Module, rank: int, scale: float) -> ReLoRA:
        """A, B and nothing settled."""
        return ReLoRA(*sizes(base), rank, scale, self.dropout)

    def stepped(self, model: Headed, name: str, step: int, steps: int) -> Sequence[nn.Parameter]:
        """Settle, and begin anew; what begins anew."""
        due = step // self.restart_every
        if not due or step == steps:
            return ()
        links = [delta for delta in _links(model, name).values() if delta.learns]
        # Not by the step alone: where that was refused, the restart comes with the next. What was
        # unfrozen late has begun anew less often than the others.
        if not links or int(torch.stack([delta.restarts for delta in links]).max()) >= due:
            return ()
        for delta in links:
            delta.settle()
        return [p for delta in links for p in delta.parameters()]

    def settings_in(self, model: Headed, name: str) -> dict[str, Any]:
        """The rank of the whole change of each layer, and alphas that make its scale one."""
        links = _links(model, name).items()
        ranks = {re.escape(outer_path(model, path)): delta.whole_rank for path, delta in links}
        most = max(ranks.values())
        fewer = {path: rank for path, rank in ranks.items() if rank < most}
        return {"r": most, "lora_alpha": most, "use_rslora": False, "lora_dropout": 0.0,
                "rank_pattern": fewer, "alpha_pattern": fewer}  # fmt: skip


def _links(model: Headed, name: str) -> dict[str, ReLoRA]:
    parts = learnt_parts(model, name).items()
    return {path: part for path, part in parts if isinstance(part, ReLoRA)}


class ReLoRA(LoRA):
    """``y = (W + S) x + scale * B A x``, with what is settled in S.

    S lies in a buffer, so that the base stays whole for reference models and other adapters, and a
    run that is resumed goes on as it was.

    Args:
        inputs: I.
        outputs: O.
        rank: r.
        scale: What the product is multiplied by.
        dropout: Share of A's inputs that are left out while training.
    """

    settled: Tensor
    restarts: Tensor
    seed: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__(inputs, outputs, rank, scale, dropout)
        self.register_buffer("settled", torch.zeros(outputs, inputs))
        self.register_buffer("restarts", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def begin(self, generator: torch.Generator) -> None:
        """A at random, B zero; what is random the next time is drawn as well."""
        super().begin(generator)
        drawn = torch.randint(1 << 62, (), generator=generator, device=generator.device)
        self.seed.copy_(drawn)

    @property
    def learns(self) -> bool:
        """Whether A and B are being trained."""
        return self.lora_A.weight.requires_grad

    @property
    def whole_rank(self) -> int:
        """The most that the rank of the whole change can be."""
        rank = len(self.lora_A.weight) * (1 + int(self.restarts))
        return min(rank, *self.settled.shape)

    def change(self) -> Float[Tensor, "o i"]:
        """``S + scale * B A``."""
        return self.settled + self.scale * (self.lora_B.weight @ self.lora_A.weight)

    @torch.no_grad()
    def settle(self) -> None:
        """What was learnt goes into S; A and B begin anew, and nothing changes."""
        self.settled.copy_(self.change())
        self.restarts += 1
        self.begin(torch.Generator().manual_seed(int(self.seed)))

    def forward(self, x: Float[Tensor, "... i"], base: nn.Module) -> Float[Tensor, "... o"]:
        """The layer as it has become so far, to which the product is added."""
        y = F.linear(x, matrix(base) + self.settled, getattr(base, "bias", None))
        narrow = F.dropout(x, self.dropout, self.training)
        return added(y, narrow, self.lora_A.weight, self.lora_B.weight, self.scale)

    def merged(self, base: nn.Module) -> tuple[Float[Tensor, "o i"], Float[Tensor, " o"] | None]:
        """``W + S + scale * B A``."""
        return matrix(base) + self.change(), getattr(base, "bias", None)

    def stored(self) -> dict[str, Tensor]:
        """The whole change as a product of two thin matrices, of scale one."""
        exact = self.change().detach().double()
        left, right = principal(exact, self.whole_rank, 0, torch.Generator())
        return {"lora_A.weight": right.float(), "lora_B.weight": left.float()}
